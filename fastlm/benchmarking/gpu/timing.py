"""Cases timed on a GPU: every backend that can serve and every rival in turn, by the GPU's own events.

A case gives a row for each backend with kernels of its own, all from the same timings. Ratios are of pairs timed one after the other in one process. Peaks are
measured at the start: a large copy between two places in the GPU's memory (bytes read plus bytes written), and the largest of a few matrix products.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastlm.backends import choice, table
from fastlm.benchmarking.gpu.cases import Case
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import LEAST_ROUNDS, Ratio

Call = Callable[[], object]
ROUNDS, LEAST, BUDGET = (
    12,
    0.01,
    2.0,
)  # rounds of each pair; seconds that one timing should take; seconds after which no round begins
HOPELESS = 20  # times as slow as our kernels: PyTorch's operator that would take them minutes, and is nobody's choice
# Whom a call may go to. On the CPU, where only the code is tested, the emulated CUDA kernels may take part.
BACKENDS = {"cuda": table.ORDER["cuda"][:-1], "cpu": ("cpu", "cuda", "torch")}


@dataclasses.dataclass
class Row:
    operator: str
    shape: str
    dtype: str
    direction: str
    served_by: str  # the backend; auto: of a whole step, whichever each call takes
    auto: bool  # whether it is the one that `auto` takes
    seconds: float
    rivals: dict[
        str, dict[str, float]
    ]  # PyTorch's and others' → seconds, and the ratio (how many times as fast as they): median, low and high quartile
    backends: dict[str, dict[str, float]]  # the other backends that `auto` may take, likewise
    features: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # of the call, as the table of backends names them
    flops: float | None = None
    bytes: float | None = None
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # of memory, by whose step


def clock(device: str) -> Callable[[Call, int], float]:
    """A function that takes (call, n) and returns the mean seconds of n calls."""

    def by_events(call: Call, n: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / n

    def by_clock(call: Call, n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - begin) / n

    return by_events if device == "cuda" else by_clock


def in_turn(
    calls: Mapping[str, Call], device: str, rounds: int = ROUNDS, least: float = LEAST, budget: float = BUDGET
) -> dict[str, list[float]]:
    """Seconds per call of each, once per round, every other round backwards."""
    seconds = clock(device)
    times = {}
    for name, call in calls.items():
        for _ in range(3):  # compiles, allocates
            call()
        times[name] = max(1, round(least / max(seconds(call, 1), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.monotonic() - began > budget:
            break
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(seconds(calls[name], times[name]))
    return taken


def rows(
    calls: Mapping[str, Call], backends: Sequence[str], auto: str, device: str, work: Work, **options: Any
) -> Iterator[dict[str, Any]]:
    """What was timed of each backend among the calls, as arguments of Row; PyTorch's operator has a row of its own only where `auto` takes it."""
    taken = in_turn(calls, device, **options)

    def against(ours: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
        ratios = {name: Ratio.of(taken[ours], taken[name]) for name in names if name in taken and name != ours}
        return {
            name: {"seconds": statistics.median(taken[name]), **dataclasses.asdict(ratio)}
            for name, ratio in ratios.items()
        }

    others = [name for name in calls if name not in backends]
    for ours in backends:
        if ours in taken and (ours != "torch" or ours == auto):
            yield {
                "served_by": ours,
                "auto": ours == auto,
                "seconds": statistics.median(taken[ours]),
                "rivals": against(ours, others),
                "backends": against(ours, backends),
                "flops": work.flops,
                "bytes": work.bytes,
            }


def serving(operator: str, device: str, dtype: torch.dtype, features: dict[str, int]) -> list[str]:
    """The backends that can, in the usual order."""
    return [
        name for name in BACKENDS[device] if not choice.refusals(name, operator, torch.device(device), dtype, features)
    ]


def whole_backends(device: str, dtype: torch.dtype) -> list[str]:
    """Those that can compute a whole model, besides what `auto` takes: without a table that is the first, everywhere."""
    able = [
        name for name in serving("linear", device, dtype, dict.fromkeys(table.FEATURES["linear"], 1)) if name != "torch"
    ]
    return able if table.of(torch.device(device)) else able[1:]


def both_ways(function: Callable[..., Any], case: Case) -> dict[str, Call]:
    """{direction: call}: forward without gradients, and where the case has it forward with backward."""
    leaves = [x.detach().requires_grad_(case.both is not None) for x in case.inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, leaves, [u.to(r.dtype) for u, r in zip(case.upstream, results, strict=True)])

    ways: dict[str, Call] = {"forward": forward}
    return ways | {"forward+backward": both} if case.both else ways


def refusal(call: Call) -> str:
    """Why it does not work: PyTorch's kernels refuse what they cannot do when they are called, and another version of a library may want other arguments."""
    try:
        call()
    except Exception as why:
        return " ".join(str(why).split())[:500] or type(why).__name__
    return ""


def hopeless(call: Call, ours: Sequence[Call], device: str) -> bool:
    seconds = clock(device)
    return seconds(call, 1) > max(
        0.05, HOPELESS * min((seconds(one, 1) for one in ours for _ in range(2)), default=float("inf"))
    )


def compare(case: Case, device: str, rivals: bool = True, **options: Any) -> Iterator[Row]:
    """A row for each direction and backend. Raises RuntimeError after them, if a backend that says it can serve failed."""
    backends = serving(case.operator, device, case.dtype, case.features)
    auto, _ = choice.decide(case.operator, torch.device(device), case.dtype, None, case.features)
    functions: dict[str, Callable[..., Any]] = {name: functools.partial(case.ours, backend=name) for name in backends}
    functions |= case.rivals if rivals else {}
    calls = {who: both_ways(function, case) for who, function in functions.items()}
    broken = []
    for direction, work in (("forward", case.forward), ("forward+backward", case.both)):
        if work is None:
            continue
        chosen: dict[str, Call] = {}
        for name in functions:
            call, ours = calls[name][direction], name in backends and name != "torch"
            why = refusal(call)
            if ours and why:
                broken.append(f"{direction} by {name}: {why}")
            elif not why and not (name == "torch" and hopeless(call, list(chosen.values()), device)):
                chosen[name] = call
        for found in rows(chosen, backends, auto, device, work, **options):
            yield Row(
                case.operator,
                case.shape,
                str(case.dtype).removeprefix("torch."),
                direction,
                features=case.features,
                **found,
            )
    if broken:
        raise RuntimeError("; ".join(broken))


def peaks(device: str, dtypes: Sequence[torch.dtype], size: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), FLOP/s of a square product in each dtype."""
    seconds = clock(device)

    def best(call: Call) -> float:
        for _ in range(3):
            call()
        return min(seconds(call, 5) for _ in range(5))

    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy_bytes_per_second": 2 * copied / best(lambda: target.copy_(source))}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"{str(dtype).removeprefix('torch.')}_product_flops_per_second"] = (
            2 * size**3 / best(functools.partial(torch.mm, a, b))
        )
    return found
