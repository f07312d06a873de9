"""The checks of what users give AdamW: the settings of parameter groups, and state dicts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.core.errors import (
    check_flag,
    check_floating,
    check_number,
    check_storage,
    check_tensor,
    mismatch,
    shown,
    wrong_type,
)
from fastlm.core.tracing import PLAIN_TYPES

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTER = "master_param"
STATE = ("step", "exp_avg", "exp_avg_sq")  # of every parameter after its first step
SETTINGS = ("lr", "betas", "eps", "weight_decay")
NOT_NEGATIVE = "a finite number of 0 or more"


def missing_state(key: str) -> ValueError:
    return mismatch(key, "a tensor in the state of every parameter, or no state at all", "none")


def check_group(group: Mapping[str, Any]) -> None:
    """Check the settings that a parameter group brings."""
    if "lr" in group:
        check_setting("lr", group["lr"], math.inf)
    for name in ("eps", "weight_decay"):
        if name in group and check_number(name, group[name], NOT_NEGATIVE) < 0:
            raise mismatch(name, NOT_NEGATIVE, shown(group[name]))
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise wrong_type("betas", "two numbers in [0, 1)", betas)
        for beta in betas:
            check_setting("betas", beta, 1.0)
    for name in ("amsgrad", "maximize"):
        if name in group:
            check_flag(name, group[name])


def check_setting(name: str, value: Any, below: float) -> None:
    """The value, a number or a tensor of one, must be in [0, below)."""
    expected = NOT_NEGATIVE if below == math.inf else "two numbers in [0, 1)"
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.is_meta:
            raise wrong_type(name, expected, value)
        value = value.item()
    number = check_number(name, value, expected)
    if not 0 <= number < below:
        raise mismatch(name, expected, shown(value))


def check_is_state_dict(state_dict: Any) -> None:
    expected = 'a dict with the keys "state" and "param_groups"'
    if not isinstance(state_dict, dict):
        raise wrong_type("state_dict", expected, state_dict)
    for key, kind in (("state", dict), ("param_groups", list | tuple)):
        if key not in state_dict:
            raise mismatch("state_dict", expected, f"one without {key!r}")
        if not isinstance(state_dict[key], kind):
            words = "a dict" if kind is dict else "a list"
            raise wrong_type(f"state_dict[{key!r}]", words, state_dict[key])


def check_state_dict(groups: Sequence[Mapping[str, Any]], state_dict: Any) -> None:
    """Check, before anything changes, a state dict against the parameter groups that it is loaded into."""
    check_is_state_dict(state_dict)
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise mismatch("param_groups", f"{len(groups)}, as the optimiser has", len(saved_groups))
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"param_groups[{number}]"
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), list | tuple):
            raise wrong_type(where, 'a dict with the list "params"', saved)
        if missing := [name for name in SETTINGS if name not in saved]:
            raise mismatch(f"{where}[{missing[0]!r}]", "a value", "none")
        check_group(saved)
        if len(saved["params"]) != len(group["params"]):
            raise mismatch(f"{where}['params']", f"{len(group['params'])} parameters", len(saved["params"]))
        for i, p in zip(saved["params"], group["params"], strict=True):
            check_state(p, state_dict["state"].get(i, {}))


def check_state(p: Tensor, state: Any) -> None:
    """Check what a state dict has of one parameter."""
    if not isinstance(state, dict):
        raise wrong_type("state", "a dict for every parameter", state)
    if not state:
        return
    for key in STATE:
        if key not in state:
            raise missing_state(key)
    check_step(state["step"])
    for key in (*MOMENTS, MASTER):
        if key in state:
            check_moment(key, state[key], p)


def check_step(step: Any) -> None:
    """PyTorch's older state dicts have a number."""
    if not isinstance(step, Tensor):
        if check_number("step", step, NOT_NEGATIVE) < 0:
            raise mismatch("step", NOT_NEGATIVE, shown(step))
        return
    check_tensor("step", step)
    if step.dim() != 0:
        raise mismatch("step", "shape ()", tuple(step.shape))
    if type(step) in PLAIN_TYPES:
        check_storage("step", step)
    if step.is_complex() or step.dtype == torch.bool or step.is_quantized or step.is_meta:
        raise wrong_type("step", "a number", step)


def check_moment(key: str, value: Any, p: Tensor) -> None:
    """value: a moment or the master copy of a parameter."""
    check_tensor(key, value)
    if p.is_complex():
        if not value.is_complex():
            raise mismatch(key, "a complex tensor, as its parameter", value.dtype)
    else:
        check_floating(key, value)
    if value.is_meta and not p.is_meta:
        raise mismatch(key, "a tensor with storage", "one on the meta device")
    if type(value) in PLAIN_TYPES and type(p) in PLAIN_TYPES:
        if value.shape != p.shape:
            raise mismatch(key, f"shape {tuple(p.shape)}, as its parameter", tuple(value.shape))
        check_storage(key, value)
