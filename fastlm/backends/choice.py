"""Which backend serves a call. Each backend answers with its reasons for refusing; no reasons means it can."""

import collections
import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from fastlm.backends import table
from fastlm.backends.table import FEATURES, ORDER

NAMES = ("cpu", "triton", "cuda", "torch", "reference")
ELSEWHERE = ("torch", "reference")  # MPS, XPU, …

# A call with sizes seen before costs one dictionary lookup; the bound only matters to a program that never repeats a size.
CHOICES: dict[tuple, tuple[ModuleType, str | None]] = {}
MOST_CHOICES = 4096

fallbacks: collections.Counter[str] = (
    collections.Counter()
)  # auto took a later backend: how often, per operator and backend


class Unsupported(RuntimeError):
    """No backend, or not the one that was forced, can serve a call."""


class Traced:
    """What torch.compile sees of use_backend: it guards on a plain attribute and recompiles when it changes, but cannot read a ContextVar."""

    name: str | None = None


traced = Traced()
within: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastlm_backend", default=None)
from_environment = os.environ.get("FASTLM_BACKEND") or None  # read once, at import, as FASTLM_ISA is


def check_name(name: str, said_by: str = "backend") -> None:
    if name not in NAMES:
        raise ValueError(f"{said_by}: expected one of {', '.join(NAMES)}, got {name!r}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every call inside the `with` block; None gives the choice back to `auto`.

    The argument `backend=` of a call comes first, then the innermost use_backend, then the environment variable FASTLM_BACKEND.
    It holds for the current thread or asyncio task. A function compiled by torch.compile is compiled once for each backend;
    there, threads that force different backends at the same time see the latest.

    Raises:
        ValueError: a name that is not one of cpu, triton, cuda, torch, reference.
    """
    if name is not None:
        check_name(name)
    before, token = traced.name, within.set(name)
    traced.name = name
    try:
        yield
    finally:
        traced.name = before
        within.reset(token)


def requested(backend: str | None) -> str | None:
    """The backend asked for by the argument, by use_backend or by the environment; None = auto."""
    if backend is not None:
        check_name(backend)
        return backend
    name = traced.name if torch.compiler.is_compiling() else within.get()
    if name is None and from_environment is not None:
        check_name(from_environment, "FASTLM_BACKEND")
        return from_environment
    return name


def name_of(backend: ModuleType | str | None) -> str | None:
    """As torch.library operators take a backend: by name, None = auto."""
    return backend.__name__.rpartition(".")[2] if isinstance(backend, ModuleType) else backend


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f"fastlm.backends.{name}")


def unavailable(name: str) -> list[str]:
    """Why a backend serves nothing at all here."""
    if importlib.util.find_spec(f"fastlm.backends.{name}") is None:
        return ["is not part of this build"]
    return getattr(load(name), "unavailable", list)()


def refusals(name: str, operator: str, device: torch.device, dtype: torch.dtype, features: dict) -> list[str]:
    return unavailable(name) or load(name).refuses(operator, device, dtype, **features)


def choose(
    operator: str, x: torch.Tensor, dtype: torch.dtype, backend: str | None, *features: int | bool
) -> ModuleType:
    """The backend that serves `operator` on x's device in dtype with these FEATURES; Unsupported, with every backend's reasons, if none does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported(
            f"{operator} under a torch.func transform (vmap, grad, jvp, …): not supported; use torch.autograd"
        )
    forced = requested(backend)
    key = (operator, x.is_cpu or x.device, dtype, forced, features)  # of two GPUs one may be older
    choice = CHOICES.get(key)
    if choice is None:
        name, fallback = decide(operator, x.device, dtype, forced, dict(zip(FEATURES[operator], features, strict=True)))
        if len(CHOICES) >= MOST_CHOICES:
            CHOICES.clear()
        choice = CHOICES[key] = load(name), fallback
    module, fallback = choice
    if fallback is not None:
        fallbacks[fallback] += 1
    return module


def automatic(operator: str, device: torch.device, dtype: torch.dtype, features: dict) -> tuple[str, ...]:
    """The device's order, with what the table puts first at its head. That PyTorch's operator, though the faster one, does not do what a call asks for is
    no fallback; that the CUDA kernels are not built is."""
    order = ORDER.get(device.type, ELSEWHERE)
    for rule in table.of(device):
        if not rule.holds(operator, str(dtype).removeprefix("torch."), features):
            continue
        if rule.first != "torch" or not refusals("torch", operator, device, dtype, features):
            return rule.first, *(name for name in order if name != rule.first)
    return order


def decide(
    operator: str, device: torch.device, dtype: torch.dtype, forced: str | None, features: dict
) -> tuple[str, str | None]:
    """The backend, and what to count if auto did not get the first of its order."""
    order = (forced,) if forced else automatic(operator, device, dtype, features)
    for name in order:
        if not refusals(name, operator, device, dtype, features):
            return name, None if name == order[0] else f"{operator}: {name} instead of {order[0]}"
    reasons = {name: refusals(name, operator, device, dtype, features) for name in NAMES}
    listed = "; ".join(f"{name} {', '.join(why) or 'could, but another was forced'}" for name, why in reasons.items())
    raise Unsupported(f"{operator} on {device} in {dtype}{f' with backend={forced!r}' if forced else ''}: {listed}")
