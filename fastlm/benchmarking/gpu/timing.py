"""Cases timed on a GPU: every backend that supports a case and every baseline, interleaved.

A case gives a row for each backend with kernels of its own, all from the same timings. Calls rotate through copies of
their operands, together more than the L2 cache holds, so that no call finds its operands there because the call before
left them. Peaks are measured at the start: a large copy within the GPU's memory (bytes read plus bytes written) and
large matrix products.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import registry, selection, table
from fastlm.backends.registry import Registered
from fastlm.benchmarking.compare import Row, baselines_of
from fastlm.benchmarking.measure import Timer, interleaved, timed
from fastlm.benchmarking.operators import parts, selection_inputs, work_of
from fastlm.ops.benchmark import Case, Function, Problem

Call = Callable[[], object]
ROUNDS, LEAST, BUDGET = 12, 0.01, 2.0  # as interleaved() takes them
MAX_COPIES = 64  # of the operands of a small call, which are in the L2 cache in practice too
TOO_SLOW = 20  # PyTorch's operator is not timed if it is so many times slower than our kernels


def join(row: Row, rows: list[Row]) -> None:
    """Adds a row, or its baselines to the row of the same call, whose other baselines were timed earlier."""

    def call(row: Row) -> tuple[str, ...]:
        return row.operator, row.shape, row.dtype, row.direction, row.backend

    for earlier in rows:
        if call(earlier) == call(row):
            earlier.baselines.update(row.baselines)
            return
    rows.append(row)


def timer_of(call: Call, device: str) -> Timer:
    """By the GPU's own events."""
    if device != "cuda":
        return timed(call)

    def timer(n: int = 1) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / n

    return timer


def interleaved_calls(
    calls: Mapping[str, Call], device: str, rounds: int = ROUNDS, least: float = LEAST, budget: float = BUDGET
) -> dict[str, list[float]]:
    timers = {name: timer_of(call, device) for name, call in calls.items()}
    return interleaved(timers, rounds, budget=budget, least=least, warmup=3)


def rows(
    calls: Mapping[str, Call],
    backends: Sequence[str],
    auto: str,
    device: str,
    described: Mapping[str, Any],
    memory: Mapping[str, int] = {},
    **options: Any,
) -> Iterator[Row]:
    """Times the calls; a row per backend, of torch only if it is selected automatically.

    Args:
        described: the other arguments of the rows.
        memory: the peak of each call.
    """
    seconds = interleaved_calls(calls, device, **options)
    for ours in backends:
        if ours in seconds and (ours != "torch" or ours == auto):
            yield Row(
                threads=None,
                backend=ours,
                auto=ours == auto,
                seconds=statistics.median(seconds[ours]),
                baselines=baselines_of(seconds, memory, but=backends, ours=ours),
                backends=baselines_of(seconds, memory, but=[name for name in calls if name not in backends], ours=ours),
                bytes_held=memory.get(ours),
                **described,
            )


def supporting(operator: Registered, device: str, dtype: torch.dtype, sizes: Any) -> list[str]:
    """The backends but the reference that support a call, in the usual order."""
    on = torch.device(device)
    return [name for name in table.ORDER[device][:-1] if not operator.refusals(name, on, dtype, sizes)]


def whole_backends(device: str, dtype: torch.dtype) -> list[str]:
    """The backends on which a whole model can run.

    Without rows in the table the first of them is what automatic selection selects everywhere, and is left out.
    """
    operator = registry.operators()["linear"]
    sizes = operator.sizes(*[1] * len(operator.size_names))
    able = [name for name in supporting(operator, device, dtype, sizes) if name != "torch"]
    return able if table.rules_of(torch.device(device)) else able[1:]


def error_text(call: Call) -> str:
    """Runs the call; why it fails, or "".

    PyTorch's kernels refuse a call only when it is made, and other versions of a library may take other arguments.
    """
    try:
        call()
    except Exception as error:
        return " ".join(str(error).split())[:500] or type(error).__name__
    return ""


def too_slow(call: Call, ours: Sequence[Call], device: str) -> bool:
    """Whether PyTorch's operator would take minutes and could not be selected anyway."""
    fastest = min((timer_of(one, device)(1) for one in ours for _ in range(2)), default=float("inf"))
    return timer_of(call, device)(1) > max(0.05, TOO_SLOW * fastest)


def l2_bytes(device: str) -> int:
    """Of the L2 cache of a GPU; 0 on a CPU, where only the code is tested."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def copies(problem: Problem, cache: int) -> list[Problem]:
    """The problem and copies of it, whose operands together have at least twice the bytes of the cache."""
    operands = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in (*problem.inputs, *problem.upstream)}
    size = sum(storage.nbytes() for storage in operands.values())
    count = min(-(-2 * cache // max(size, 1)), MAX_COPIES)

    def copy() -> Problem:
        copied = {address: storage.clone() for address, storage in operands.items()}  # layouts remain as they are

        def of(x: Tensor) -> Tensor:
            storage = copied[x.untyped_storage().data_ptr()]
            empty = torch.empty(0, dtype=x.dtype, device=x.device)
            return empty.set_(storage, x.storage_offset(), x.shape, x.stride())

        return dataclasses.replace(problem, inputs=[*map(of, problem.inputs)], upstream=[*map(of, problem.upstream)])

    return [problem, *(copy() for _ in range(count - 1))]


def rotating(problems: Sequence[Problem], function: Function, direction: str) -> Call:
    """A call of the function on the operands of the next problem each time."""
    runs = itertools.cycle([parts(problem, function, direction)[1] for problem in problems])
    return lambda: next(runs)(None)


def compare(
    case: Case,
    dtype: torch.dtype,
    device: str,
    baselines: bool = True,
    compiled: bool = False,
    cache: int | None = None,
    **options: Any,
) -> Iterator[Row]:
    """A row for each direction and backend. compiled: against the baselines that torch.compile makes, and no others.

    Raises:
        RuntimeError: after the rows, if a backend that supports the case failed.
    """
    problem = case.problem(dtype, device)
    operator, _, sizes = selection_inputs(problem)
    backends = supporting(operator, device, dtype, sizes)
    auto, _ = selection.decide(operator, torch.device(device), dtype, None, sizes)
    functions: dict[str, Function] = {name: functools.partial(problem.ours, backend=name) for name in backends}
    if compiled:
        functions |= problem.compiled_baselines()
    elif baselines:
        functions |= problem.baselines
    problems = copies(problem, l2_bytes(device) if cache is None else cache)
    failed = []
    for direction in ("forward", "forward+backward"):
        if direction not in case.directions:
            continue
        calls: dict[str, Call] = {}
        for name, function in functions.items():
            call, ours = rotating(problems, function, direction), name in backends and name != "torch"
            why = error_text(call)
            if ours and why:
                failed.append(f"{direction} by {name}: {why}")
            elif not why and not (name == "torch" and too_slow(call, list(calls.values()), device)):
                calls[name] = call
        described = {
            "operator": operator.name,
            "shape": problem.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
            "sizes": sizes._asdict(),
            "work": work_of(problem, direction),
        }
        yield from rows(calls, backends, auto, device, described, **options)
    if failed:
        raise RuntimeError("; ".join(failed))


def peaks(device: str, dtypes: Sequence[torch.dtype], size: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), FLOP/s of a square product in each dtype."""

    def best(call: Call) -> float:
        for _ in range(3):
            call()
        timer = timer_of(call, device)
        return min(timer(5) for _ in range(5))

    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy_bytes_per_second": 2 * copied / best(lambda: target.copy_(source))}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = best(functools.partial(torch.mm, a, b))
        found[f"{str(dtype).removeprefix('torch.')}_product_flops_per_second"] = 2 * size**3 / seconds
    return found
