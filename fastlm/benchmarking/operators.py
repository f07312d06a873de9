"""The operators' cases: finds them, makes their calls for timing, and counts the work of a call."""

import contextlib
import dataclasses
import importlib
import importlib.util
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import registry, selection
from fastlm.backends.registry import Registered
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Timer, timed
from fastlm.ops.benchmark import Axes, Benchmark, Case, Function, Problem


def benchmarks() -> dict[str, Benchmark]:
    """By operator. An operator without a bench.py has none."""
    found = {}
    for name, operator in registry.operators().items():
        module = f"{operator.package}.bench"
        if importlib.util.find_spec(module):
            found[name] = importlib.import_module(module).benchmark
    return found


def axes(device: str) -> dict[str, Axes]:
    """Of the rows of the selection table for a kind of device, by operator."""
    found = {name: one.gpu_axes if device == "cuda" else one.axes for name, one in benchmarks().items()}
    return {name: own for name, own in found.items() if own}


def cases() -> dict[str, Case]:
    """Those for a CPU, by name."""
    return {case.name: case for benchmark in benchmarks().values() for case in benchmark.cases}


# Calls


def parts(problem: Problem, function: Function, direction: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """(prepare, run): run(prepare()) is one call, of which run is timed.

    forward: without gradients, as in inference. backward: alone; its forward pass is in the preparation. step: a call
    without inputs.
    """
    leaves = [x.detach().requires_grad_() for x in problem.inputs]

    def forward(_: Any) -> None:
        with torch.no_grad():
            function(*leaves)

    def graph() -> tuple[Tensor, ...]:
        return as_tuple(function(*leaves))

    def backward(results: tuple[Tensor, ...]) -> None:
        torch.autograd.grad(results, leaves, upstream_for(problem, results))

    def nothing() -> None:
        return None

    return {
        "step": (nothing, lambda _: function()),
        "forward": (nothing, forward),
        "backward": (graph, backward),
        "forward+backward": (nothing, lambda _: backward(graph())),
    }[direction]


def timer(problem: Problem, function: Function, direction: str) -> Timer:
    prepare, run = parts(problem, function, direction)
    if direction != "backward":
        return timed(lambda: run(None))

    def timer(n: int = 1) -> float:
        seconds = 0.0
        for _ in range(n):
            state = prepare()
            seconds += timed(lambda state=state: run(state))()  # type: ignore[misc]
        return seconds / n

    return timer


def results(problem: Problem, function: Function, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """What the function returns, and the gradients of the inputs; from the same numbers in dtype."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in problem.inputs]
    found = as_tuple(function(*leaves))
    return *(y.detach() for y in found), *torch.autograd.grad(found, leaves, upstream_for(problem, found))


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def upstream_for(problem: Problem, found: tuple[Tensor, ...]) -> list[Tensor]:
    # A loss of bfloat16 operands is float32 in fastlm and bfloat16 in PyTorch.
    return [u.to(y.dtype) for u, y in zip(problem.upstream, found, strict=True)]


# What a call of ours consists of


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple[Registered, Any]]]:
    """Every call of an operator: (the operator, the description of the call).

    The calls return uninitialised results: nothing is computed, whatever the backend and its state.
    """
    calls: list[tuple[Registered, Any]] = []
    implementation_of = Registered.implementation

    def implementation(self: Registered, backend: str) -> Any:
        found = implementation_of(self, backend)

        def record(call: Any) -> Any:
            calls.append((self, call))
            return call.empty_results()

        return dataclasses.replace(found, forward=record, backward=record, composite=None)

    selection.forget()
    try:
        with unittest.mock.patch.object(Registered, "implementation", implementation):
            yield calls
    finally:
        selection.forget()


def work_of(problem: Problem, direction: str) -> Work:
    """The sum over the calls of operators."""
    prepare, run = parts(problem, problem.ours, direction)
    with recorded_calls() as calls:
        state = prepare()
        if direction == "backward":
            calls.clear()
        run(state)
        flops, traffic = (sum(each) for each in zip(*((c.flops(), c.bytes()) for _, c in calls), strict=True))
    return Work(flops * problem.flop_share, traffic + problem.extra_bytes)


def selection_inputs(problem: Problem) -> tuple[Registered, torch.dtype, Any]:
    """(operator, dtype, sizes) that backend selection sees in the first call."""
    with recorded_calls() as calls, torch.no_grad():
        problem.ours(*problem.inputs)
        operator, call = calls[0]
        _, dtype, sizes = call.subject()
    return operator, dtype, sizes


def backends_of(call: Callable[[], object]) -> str:
    """The backends that a call runs on."""
    selection.forget()
    call()
    return ", ".join(selection.selected_backends())
