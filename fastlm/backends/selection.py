"""Backend selection: which backend a call runs on.

Each backend answers with its reasons for refusing a call; the first in the device's order without a reason is selected.
The decision depends on the operator, device, dtype and sizes alone, and is cached by them.
"""

import collections
import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import isa, table
from fastlm.backends.contract import Implementation
from fastlm.backends.registry import BACKENDS, Registered
from fastlm.backends.rule import Rule
from fastlm.backends.table import ORDER
from fastlm.core.errors import Unsupported, did_you_mean, mismatch, shown

ORDER_ELSEWHERE = ("torch", "reference")  # MPS, XPU, …

# A call with sizes seen before costs one dictionary lookup. The bound matters only to a program that repeats no size.
_selected: dict[tuple, tuple[Implementation[Any, Any], str | None]] = {}
MAX_SELECTED = 4096
_parts: dict[tuple, bool] = {}  # the same of is_selected(), on a CPU
_selected_for_parts: set[str] = set()  # the backends of such functions

# How often auto fell back to a later backend, by operator and backend.
fallbacks: collections.Counter[str] = collections.Counter()


class Traced:
    """use_backend as torch.compile sees it: it guards on an attribute, and cannot read a ContextVar."""

    name: str | None = None


traced = Traced()
in_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastlm_backend", default=None)
from_environment = os.environ.get("FASTLM_BACKEND") or None  # read once, at import, as FASTLM_ISA is


def check_name(name: str, argument: str = "backend") -> None:
    if not isinstance(name, str) or name not in BACKENDS:
        raise mismatch(argument, f"one of {', '.join(BACKENDS)}", f"{shown(name)}{did_you_mean(name, BACKENDS)}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every call inside the `with` block; None returns to automatic selection.

    The argument `backend=` of a call takes precedence, then the innermost use_backend, then the environment variable
    FASTLM_BACKEND. The context belongs to the current thread or asyncio task. A function compiled by torch.compile is
    recompiled for each backend; there, threads that force different backends at the same time see the latest one.

    Raises:
        ValueError: a name that is not one of cpu, triton, cuda, torch, reference.
    """
    if name is not None:
        check_name(name)
    before, token = traced.name, in_context.set(name)
    traced.name = name
    try:
        yield
    finally:
        traced.name = before
        in_context.reset(token)


def requested(backend: str | None) -> str | None:
    """The backend forced by the argument, by use_backend or by the environment; None = automatic."""
    if backend is not None:
        check_name(backend)
        return backend
    name = traced.name if torch.compiler.is_compiling() else in_context.get()
    if name is None and from_environment is not None:
        check_name(from_environment, "FASTLM_BACKEND")
        return from_environment
    return name


def source_of(forced: str) -> str:
    """What forces a backend, as the user writes it. Another source of the same name leaves it forced."""
    name = traced.name if torch.compiler.is_compiling() else in_context.get()
    if name == forced:
        return f"use_backend({forced!r})"
    return f"FASTLM_BACKEND={forced}" if name is None and from_environment == forced else f"backend={forced!r}"


def forced_summary() -> str:
    """For fastlm.info(): the backend that is forced for every call, and by what; "" if none is."""
    try:
        name = requested(None)
    except ValueError as error:
        return f"{error} (every call is this error)"
    return "" if name is None else f"backend {name} ({source_of(name)})"


def refuse_transforms(operator: Registered) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported(
            f"{operator.name} under a torch.func transform (vmap, grad, jvp, …): not supported; use torch.autograd"
        )


def select(
    operator: Registered, x: Tensor, dtype: torch.dtype, sizes: Any, backend: str | None
) -> Implementation[Any, Any]:
    """The implementation that runs a call on x's device, in dtype, with these sizes.

    Raises:
        Unsupported: no backend, or not the forced one, supports it; the message lists every backend's reasons.
    """
    refuse_transforms(operator)
    forced = requested(backend)
    key = (operator.name, x.is_cpu or x.device, dtype, forced, sizes)  # the device: of two GPUs one may be older
    found = _selected.get(key)
    if found is None:
        name, fallback = decide(operator, x.device, dtype, forced, sizes)
        if len(_selected) >= MAX_SELECTED:
            _selected.clear()
        found = _selected[key] = operator.implementation(name), fallback
    implementation, fallback = found
    if fallback is not None:
        fallbacks[fallback] += 1
    return implementation


def forget() -> None:
    """Forget the decisions made: the table, or what is available, has changed."""
    _selected.clear()
    _parts.clear()
    _selected_for_parts.clear()


def selected_backends() -> list[str]:
    """The backends that calls have been run on since forget()."""
    return sorted({implementation.backend.name for implementation, _ in _selected.values()} | _selected_for_parts)


def is_selected(name: str, calls: Iterable[tuple[Registered, Any]], x: Tensor) -> bool:
    """Whether all parts of one compiled function would run on this backend, given as operators and sizes.

    They are selected as separate calls are, except that the rows for small calls do not apply: these compare the costs
    of autograd, of which such a function has none.
    """
    forced, dtype = requested(None), x.dtype
    if forced is not None and forced != name:
        return False
    for operator, sizes in calls:
        key = operator.name, dtype, forced, sizes
        found = _parts.get(key)
        if found is None:
            rules = () if forced else table.without_small_calls(x.device)
            found = order_of(operator, x.device, dtype, sizes, rules)[0] == name
            found = found and not operator.refusals(name, x.device, dtype, sizes)
            if len(_parts) >= MAX_SELECTED:
                _parts.clear()
            _parts[key] = found
        if not found:
            return False
    _selected_for_parts.add(name)
    return True


def order_of(
    operator: Registered, device: torch.device, dtype: torch.dtype, sizes: Any, rules: Iterable[Rule] | None = None
) -> tuple[str, ...]:
    """The device's backend order, the table's choice moved to the front. rules: used instead of the table's.

    A row for PyTorch whose operator does not do what the call asks for is skipped: that is no fallback. That a kernel
    module is not built is one.
    """
    order = ORDER.get(device.type, ORDER_ELSEWHERE)
    for rule in table.rules_of(device) if rules is None else rules:
        if not rule.matches(operator, dtype, sizes):
            continue
        if rule.first != "torch" or not operator.refusals("torch", device, dtype, sizes):
            return rule.first, *(name for name in order if name != rule.first)
    return order


def decide(
    operator: Registered, device: torch.device, dtype: torch.dtype, forced: str | None, sizes: Any
) -> tuple[str, str | None]:
    """(the backend's name, what to count as a fallback if auto did not get the first of its order)."""
    if isa.wrong_isa:
        raise ValueError(isa.wrong_isa)
    order = (forced,) if forced else order_of(operator, device, dtype, sizes)
    for name in order:
        if not operator.refusals(name, device, dtype, sizes):
            return name, None if name == order[0] else f"{operator.name}: {name} instead of {order[0]}"
    reasons = {name: operator.refusals(name, device, dtype, sizes) for name in BACKENDS}
    listed = "; ".join(f"{name} {', '.join(why) or 'is available, but not selected'}" for name, why in reasons.items())
    forced_words = f" with {source_of(forced)}" if forced else ""
    raise Unsupported(f"{operator.name} on {device} in {dtype}{forced_words}: {listed}")
