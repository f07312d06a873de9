"""The table behind backend selection: measured rows, keyed by the model of the CPU or GPU, never timed at run time.

A row says: on this machine, this operator in this dtype goes first to that backend when every named size is in its
range. Both ends of a range belong to it; None is open. Where no row matches, the device's ORDER holds.
"""

import functools
import json
import os
import pathlib
import warnings
from typing import Any

import torch

from fastlm.backends import isa, measured, registry
from fastlm.backends.rule import DTYPES, Rule

ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "cuda", "torch", "reference")}


def cpu_key() -> str:
    """The microarchitecture and the widest ISA that can run.

    A virtual machine may hide instructions: PyTorch lacks them too then, and another backend is the fastest.
    """
    module = isa.features()
    return f"{module.microarchitecture()}/{isa.usable()[0]}" if module else ""


def user_table() -> pathlib.Path:
    """Where `fastlm info --measure` writes this machine's own rows.

    The file is {cpu_key() or a GPU's name: [{"operator", "dtype", "where", "first"}, …]}.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fastlm" / "table.json"


def shipped_cpu_rules() -> tuple[Rule, ...]:
    """This CPU's rows among those that come with fastlm."""
    module = isa.features()
    if module is None or not module.has_amx():
        return measured.CPUS.get(cpu_key(), ())
    return measured.CPUS.get(cpu_key(), measured.WITH_AMX if isa.name == "amx" else measured.AMX_UNUSED)


def shipped_gpu_rules(gpu: str) -> tuple[Rule, ...] | None:
    return measured.GPUS.get(gpu)


def parse_rule(row: dict[str, Any], device: str) -> Rule:
    """A row of the user's table; ValueError, LookupError, TypeError or AttributeError if it is malformed."""
    where = {name: (low, high) for name, (low, high) in row.get("where", {}).items()}
    rule = Rule(row["operator"], row["dtype"], where, row.get("first", "torch"))
    operators = registry.operators()
    for name, given, known in (
        ("operator", rule.operator, tuple(operators)),
        ("dtype", rule.dtype, DTYPES),
        ("first", rule.first, ORDER[device][:-1]),
    ):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
    size_names = operators[rule.operator].size_names
    for name, ends in rule.where.items():
        if name not in size_names:
            raise ValueError(f"where: expected some of {', '.join(size_names)}, got {name!r}")
        if not all(end is None or isinstance(end, int) for end in ends):
            raise ValueError(f"{name}: expected two integers or null, got {list(ends)}")
    return rule


def user_rules(model: str, device: str) -> tuple[Rule, ...] | None:
    """The user's own rows for a CPU or GPU; None if there are none. A malformed file never stops a program."""
    try:
        tables = json.loads(user_table().read_text())
        return tuple(parse_rule(row, device) for row in tables[model]) if model in tables else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as wrong:
        warnings.warn(
            f"{user_table()}: cannot be read ({wrong}); the measurements that come with fastlm apply",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


@functools.cache
def cpu_rules() -> tuple[Rule, ...]:
    """This CPU's rows: the user's own if there are any, else those that come with fastlm."""
    found = user_rules(cpu_key(), "cpu")
    return shipped_cpu_rules() if found is None else found


@functools.cache
def gpu_rules(gpu: str) -> tuple[Rule, ...] | None:
    """A GPU's rows, likewise; None if it was never measured."""
    found = user_rules(gpu, "cuda")
    return shipped_gpu_rules(gpu) if found is None else found


def forget() -> None:
    """Read the tables again at the next selection."""
    cpu_rules.cache_clear()
    gpu_rules.cache_clear()


def rules_of(device: torch.device) -> tuple[Rule, ...]:
    """The rows for a device."""
    if device.type == "cpu":
        return *cpu_rules(), *measured.SMALL_CALLS
    if device.type == "cuda" and torch.cuda.is_available():  # fake tensors may be on CUDA without a GPU
        return gpu_rules(torch.cuda.get_device_name(device)) or ()
    return ()


def without_small_calls(device: torch.device) -> tuple[Rule, ...]:
    """The same without measured.SMALL_CALLS."""
    return cpu_rules() if device.type == "cpu" else rules_of(device)


def by_backend(rules: tuple[Rule, ...]) -> list[str]:
    """A phrase for each backend that rows select."""
    selected = dict.fromkeys(rule.first for rule in rules)
    return [f"{name} for {'; '.join(str(rule) for rule in rules if rule.first == name)}" for name in selected]


def cpu_summary() -> str:
    """One line for fastlm.info(): what the table selects on this CPU."""
    order = ", ".join(ORDER["cpu"])
    selected = ", ".join(by_backend((*cpu_rules(), *measured.SMALL_CALLS)))
    return f"{cpu_key() or 'this machine'}: " + (f"{selected}; otherwise {order}" if selected else order)


def gpus() -> dict[str, int]:
    """The GPU models in this machine, with the index of the first of each."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(index), index)
    return found


def gpu_summaries() -> list[str]:
    """A line for each GPU model in this machine."""
    try:
        models = gpus()
    except RuntimeError:  # CUDA cannot be initialised in a forked process
        return []
    order, lines = ", ".join(ORDER["cuda"]), []
    for model in models:
        rules = gpu_rules(model)
        if rules is None:
            lines.append(f"{model}: not measured, backend order {order} (fastlm info --measure measures it)")
        elif rules:
            lines.append(f"{model}: {', '.join(by_backend(rules))}; otherwise {order}")
        else:
            lines.append(f"{model}: {order}, as measured")
    return lines
