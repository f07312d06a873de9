"""Other launch configurations of the Triton kernels, each timed in turn with the one that kernels/configs.py has for this GPU.

    python -m fastlm.benchmarking.gpu.tune --json tune.json --seconds 500

prints the rows that were clearly faster, as configs.py has them, the most important kernels first. A configuration that does not fit, spills registers or gives
other results is left out, with the reason. Nothing is changed: the table is a file that someone edits, so that bits do not depend on a timing.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import load
from fastlm.benchmarking.gpu.timing import in_turn
from fastlm.benchmarking.measure import Ratio

CLEARLY = 1.03  # times as fast, at the lower quartile, to be worth another row
ALIKE = 0.02  # of the largest value: more apart are not two roundings of the same result
ROUNDS, LEAST = 7, 5e-3

Value = Any  # of a knob: a row of the table, or a number


@dataclasses.dataclass
class Knob:
    name: str  # as configs.py writes it
    value: Value  # that it has now
    others: Callable[
        [Value], Sequence[Value]
    ]  # worth a try, given the best so far; asked again until there are no new ones
    turn: Callable[[Value], None]
    call: Callable[[], Tensor | Sequence[Tensor | None]]  # what it decides about


@dataclasses.dataclass
class Trial:
    knob: str
    value: Value
    ratio: Ratio | None  # how many times as fast as what the table has
    note: str = ""

    def __str__(self) -> str:
        return f"{self.knob}: {self.value},  # {self.note or self.ratio}"


def results(knob: Knob) -> list[Tensor]:
    made = knob.call()
    return [x.detach().float() for x in ([made] if torch.is_tensor(made) else made) if x is not None]


def differ(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return any(not (a - b).abs().max() <= ALIKE * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def spills() -> int:
    """Registers that kernels compiled since the last call of this function spill."""
    compiled = module("launch").compiled
    new = [getattr(kernel, "n_spills", 0) or 0 for kernel in compiled.values()]
    compiled.clear()
    return max(new, default=0)


def trial(knob: Knob, value: Value, expected: Sequence[Tensor], device: str, **options: Any) -> Trial:
    """Leaves the knob as it was."""

    def calling(with_value: Value) -> Callable[[], None]:
        def call() -> None:
            knob.turn(with_value)
            knob.call()

        return call

    spills()
    try:
        knob.turn(value)
        if differ(results(knob), expected):
            return Trial(knob.name, value, None, "gives other results")
        if spilled := spills():
            return Trial(knob.name, value, None, f"spills {spilled} registers")
        taken = in_turn(
            {"now": calling(knob.value), "then": calling(value)},
            device,
            **{"rounds": ROUNDS, "least": LEAST, **options},
        )
    except Exception as why:  # Triton and the driver have many names for what does not fit
        return Trial(knob.name, value, None, f"{type(why).__name__}: {' '.join(str(why).split())[:120]}")
    finally:
        knob.turn(knob.value)
    return Trial(knob.name, value, Ratio.of(taken["then"], taken["now"]))


def tried(knob: Knob, device: str, until: float, **options: Any) -> Iterator[Trial]:
    """Until `until`, a time.monotonic()."""
    expected, seen, best, most = results(knob), {knob.value}, knob.value, 1.0
    while new := [value for value in knob.others(best) if value not in seen]:
        for value in new:
            if time.monotonic() > until:
                return
            seen.add(value)
            yield (found := trial(knob, value, expected, device, **options))
            if found.ratio and found.ratio.median > most:
                best, most = value, found.ratio.median


def better(trials: Sequence[Trial]) -> Trial | None:
    """The fastest, where it is clearly faster than what the table has."""
    clear = [found for found in trials if found.ratio and found.ratio.low >= CLEARLY]
    return max(clear, key=lambda found: found.ratio.median if found.ratio else 0, default=None)


# The knobs


def tiles(best: Value) -> list[Value]:
    """Half and twice as large tiles, with either number of warps, and other stages."""
    m, n, warps, stages = best
    return [
        *(
            (other_m, other_n, other_warps, stages)
            for other_m, other_n, other_warps in itertools.product((m // 2, m, 2 * m), (n // 2, n, 2 * n), (4, 8))
            if min(other_m, other_n) >= 16 and other_m * other_n <= 128 * 128
        ),
        *((m, n, warps, other) for other in (1, 2, 3, 4)),
    ]


def attention(
    which: str, dtype: torch.dtype, head_dim: int, device: str, batch: int = 8, heads: int = 12, tokens: int = 1024
) -> Knob:
    """A pass of attention as the table names it: forward, query, key, mask or decode; "… masked": with dropout; "… exact": with a mask's gradient."""
    configs, backend = module("configs"), load("triton")
    name, _, kind = which.partition(" ")
    architecture, block = backend.architecture(index_of(device)), max(64, module("attention").block_of(head_dim))
    now = configs.attention_tile(architecture, name, dtype.itemsize, block, kind == "masked", kind == "exact")
    table = configs.ATTENTION[architecture] = dict(configs.table_of(architecture))

    def turn(value: Value) -> None:
        table[which, dtype.itemsize, block] = value

    queries = 1 if name == "decode" else tokens
    query, key, value, dout = (
        torch.randn(batch, n, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for n in (queries, tokens, tokens, queries)
    )
    seed = torch.zeros((), dtype=torch.int64, device=device) if kind == "masked" else None
    biased = name == "mask" or kind == "exact"
    mask = torch.randn(1, heads, queries, tokens, device=device, dtype=dtype) if biased else None
    settings = head_dim**-0.5, -(2**62), tokens - queries, 0.1 if seed is not None else 0.0
    out, lse = backend.attention_forward(query, key, value, mask, None, seed, *settings)
    keys = name in ("key", "mask")
    needed = True, keys, keys, biased

    def call() -> Sequence[Tensor | None]:
        if name in ("forward", "decode"):
            return backend.attention_forward(query, key, value, mask, None, seed, *settings)[:1]
        return backend.attention_backward(dout, None, query, key, value, mask, None, seed, out, lse, *settings, needed)

    return Knob(f"{(which, dtype.itemsize, block)}", now, tiles, turn, call)


def gelu_mlp(dtype: torch.dtype, device: str, rows: int = 16384, width: int = 768) -> Knob:
    """The fused products, or None: the vendor's and a pointwise pass."""
    configs, backend = module("configs"), load("triton")
    at = backend.architecture(index_of(device)), dtype.itemsize

    def turn(value: Value) -> None:
        configs.MLP.pop(at, None)
        if value is not None:
            configs.MLP[at] = value

    def others(best: Value) -> list[Value]:
        shapes = (128, 64, 32), (128, 128, 32), (128, 128, 64), (128, 256, 64), (64, 128, 32)
        return [
            None,
            *((*shape, warps, 3) for shape in shapes for warps in (4, 8)),
            *((*best[:4], stages) for stages in (2, 4) if best),
        ]

    x, dy = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    w1, w2 = (
        0.02 * torch.randn(*shape, device=device, dtype=dtype) for shape in ((width, 4 * width), (4 * width, width))
    )
    b1, b2 = (torch.zeros(n, device=device, dtype=dtype) for n in (4 * width, width))

    def call() -> Sequence[Tensor | None]:
        y, hidden, activated = backend.gelu_mlp_forward(x, w1, b1, w2, b2, "tanh", "conv1d", 1)
        return y, *backend.gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, "tanh", "conv1d", (True,) * 5)

    return Knob(f"MLP {at}", configs.MLP.get(at), others, turn, call)


def layernorm_residual(constant: str, dtype: torch.dtype, device: str, rows: int = 4096, width: int = 768) -> Knob:
    """A constant of kernels/layernorm_residual.py: ELEMENTS of a program, SHARES of the gradients of weights."""
    kernels, backend = module("layernorm_residual"), load("triton")
    x, residual, dy = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    w = torch.ones(width, device=device, dtype=dtype)

    def call() -> Sequence[Tensor | None]:
        y, summed, mean, rstd = backend.layernorm_residual_forward(x, residual, w, w, None, 1e-5, 0.0)
        return y, *backend.layernorm_residual_backward(
            dy, dy, summed, w, mean, rstd, None, 0.0, dtype, (True, False, True, True)
        )

    return Knob(
        f"{constant}, {rows} × {width}",
        getattr(kernels, constant),
        lambda best: [best // 2, best * 2],
        lambda value: setattr(kernels, constant, value),
        call,
    )


def module(name: str) -> Any:
    """Of the kernels."""
    load("triton")
    return importlib.import_module(f"fastlm.kernels.{name}")


def index_of(device: str) -> int | None:
    return torch.cuda.current_device() if device == "cuda" else None


def knobs(device: str, **sizes: int) -> Iterator[Knob]:
    """The most important first. Each is made when its turn has come, with its tensors."""
    half, single = torch.bfloat16, torch.float32
    plain, masked = ("forward", "key", "query"), ("forward masked", "key masked", "query masked")
    order = [
        (half, 64, plain),
        (half, 64, masked),
        (half, 128, plain),
        (half, 64, ("decode",)),
        (single, 64, plain),
        (half, 128, masked),
    ]
    for number, (dtype, head_dim, passes) in enumerate(order):
        for which in passes:
            yield attention(which, dtype, head_dim, device, **sizes)
        if number == 0:
            yield gelu_mlp(half, device)
            for constant, rows, width in (
                ("ELEMENTS", 4096, 768),
                ("SHARES", 4096, 768),
                ("ELEMENTS", 16384, 1600),
                ("SHARES", 16384, 1600),
            ):
                yield layernorm_residual(constant, half, device, rows, width)
    for which in ("mask", "key exact", "query exact"):
        yield attention(which, half, 64, device, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.benchmarking.gpu.tune",
        description="Other launch configurations of the Triton kernels on this GPU.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every trial")
    parser.add_argument("--seconds", type=float, default=500, help="after which no trial begins (500)")
    arguments = parser.parse_args()
    if why := load("triton").unavailable() or ([] if torch.cuda.is_available() else ["finds no GPU"]):
        parser.error(f"triton {', '.join(why)}")
    until, trials = time.monotonic() + arguments.seconds, []
    for knob in knobs("cuda"):
        if time.monotonic() > until:
            break
        found = []
        for one in tried(knob, "cuda", until):
            print(one, flush=True)
            found.append(one)
            trials.append(dataclasses.asdict(one))
            if arguments.json:
                arguments.json.write_text(json.dumps(trials, indent=1) + "\n")
        print(f"{knob.name}: {better(found) or f'stays {knob.value}'}", flush=True)


if __name__ == "__main__":
    main()
