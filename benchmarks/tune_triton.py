"""Tries other launch configurations of the Triton kernels, each interleaved with the one of kernels/configs.py.

    python benchmarks/tune_triton.py --json tune.json --seconds 500

It prints the rows that were clearly faster as configs.py has them, the most important kernels first. A configuration
that does not fit, spills registers or gives other results is left out, with the reason. Nothing is changed: the table
is edited by hand, so that results do not depend on a timing.
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

from fastlm.backends import registry
from fastlm.backends import triton as backend
from fastlm.benchmarking.gpu.timing import interleaved_calls
from fastlm.benchmarking.measure import Ratio
from fastlm.ops.attention import spec as attention_spec
from fastlm.ops.gelu_mlp import spec as gelu_mlp_spec
from fastlm.ops.layernorm_residual import spec as layernorm_residual_spec

CLEARLY = 1.03  # the least speedup, at the lower quartile, for another row
TOLERANCE = 0.02  # of the largest value: beyond it two results are not two roundings of the same
ROUNDS, LEAST = 7, 5e-3

Value = Any  # of a knob: a row of the table, or a number


@dataclasses.dataclass
class Knob:
    """A launch configuration that can be changed."""

    name: str  # as configs.py writes it
    value: Value  # the present one
    others: Callable[[Value], Sequence[Value]]  # candidates, given the best so far; called until there are no new ones
    set: Callable[[Value], None]
    call: Callable[[], Tensor | Sequence[Tensor | None]]  # what it configures


@dataclasses.dataclass
class Trial:
    knob: str
    value: Value
    ratio: Ratio | None  # speedup over the present value
    note: str = ""

    def __str__(self) -> str:
        return f"{self.knob}: {self.value},  # {self.note or self.ratio}"


def results(knob: Knob) -> list[Tensor]:
    made = knob.call()
    return [x.detach().float() for x in ([made] if torch.is_tensor(made) else made) if x is not None]


def differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return any(not (a - b).abs().max() <= TOLERANCE * b.abs().max() for a, b in zip(found, expected, strict=True))


def spills() -> int:
    """The most registers that a kernel compiled since the last call of this function spills.

    The second launches of attention, with REPAIR as their last constant, have little to do.
    """
    compiled = module("launch").compiled
    new = [getattr(kernel, "n_spills", 0) or 0 for key, kernel in compiled.items() if key[4][-1:] != (True,)]
    compiled.clear()
    return max(new, default=0)


def try_value(knob: Knob, value: Value, expected: Sequence[Tensor], device: str, **options: Any) -> Trial:
    """Leaves the knob as it was."""

    def calling(with_value: Value) -> Callable[[], None]:
        def call() -> None:
            knob.set(with_value)
            knob.call()

        return call

    spills()
    try:
        knob.set(value)
        if differ(results(knob), expected):
            return Trial(knob.name, value, None, "gives other results")
        if spilled := spills():
            return Trial(knob.name, value, None, f"spills {spilled} registers")
        calls = {"before": calling(knob.value), "after": calling(value)}
        seconds = interleaved_calls(calls, device, **{"rounds": ROUNDS, "least": LEAST, **options})
    except Exception as error:  # Triton and the driver have many types for what does not fit
        return Trial(knob.name, value, None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    finally:
        knob.set(knob.value)
    return Trial(knob.name, value, Ratio.of(seconds["after"], seconds["before"]))


def search(knob: Knob, device: str, until: float, **options: Any) -> Iterator[Trial]:
    """until: a time.monotonic() after which no trial starts."""
    expected, seen, best, most = results(knob), {knob.value}, knob.value, 1.0
    while new := [value for value in knob.others(best) if value not in seen]:
        for value in new:
            if time.monotonic() > until:
                return
            seen.add(value)
            yield (found := try_value(knob, value, expected, device, **options))
            if found.ratio and found.ratio.median > most:
                best, most = value, found.ratio.median


def better(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that is clearly faster than the present value."""
    clear = [found for found in trials if found.ratio and found.ratio.low >= CLEARLY]
    return max(clear, key=lambda found: found.ratio.median if found.ratio else 0, default=None)


# The knobs


def implementation(operator: str) -> Any:
    return registry.operators()[operator].implementation("triton")


def tiles(best: Value) -> list[Value]:
    """Tiles of half and twice the size with either number of warps, and other numbers of stages."""
    m, n, warps, stages = best
    sizes = itertools.product((m // 2, m, 2 * m), (n // 2, n, 2 * n), (4, 8))
    fitting = [
        (other_m, other_n, other_warps, stages)
        for other_m, other_n, other_warps in sizes
        if min(other_m, other_n) >= 16 and other_m * other_n <= 128 * 128
    ]
    return [*fitting, *((m, n, warps, other) for other in (1, 2, 3, 4))]


def attention(
    which: str, dtype: torch.dtype, head_dim: int, device: str, batch: int = 8, heads: int = 12, tokens: int = 1024
) -> Knob:
    """A pass of attention as the table names it: forward, query, key, mask or decode.

    "… masked": with dropout; "… exact": with a mask that needs a gradient. Where bulk copies load the tiles, their row
    is tuned.
    """
    name, _, kind = which.partition(" ")
    configs, run = module("configs"), implementation("attention")
    architecture, block = backend.architecture(index_of(device)), max(64, module("attention").block_of(head_dim))
    present = configs.attention_tile(architecture, name, dtype.itemsize, block, kind == "masked", kind == "exact")
    copies = None if kind else configs.copies_tile(architecture, name, dtype.itemsize, block)
    if copies:
        which, present = f"{name} copies", copies
    table = configs.ATTENTION[architecture] = dict(configs.table_of(architecture))

    def set_tile(value: Value) -> None:
        table[which, dtype.itemsize, block] = value
        module("plan").variant = which, value

    queries = 1 if name == "decode" else tokens
    query, key, value, dout = (
        torch.randn(batch, n, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for n in (queries, tokens, tokens, queries)
    )
    dropout, mask_gradient = kind == "masked", name == "mask" or kind == "exact"
    shared = {
        "query": query,
        "key": key,
        "value": value,
        "mask": torch.randn(1, heads, queries, tokens, device=device, dtype=dtype) if mask_gradient else None,
        "key_padding": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "seed": torch.zeros((), dtype=torch.int64, device=device) if dropout else None,
        "scale": head_dim**-0.5,
        "softcap": 0.0,
        "lower": -attention_spec.UNLIMITED,
        "upper": tokens - queries,
        "dropout_p": 0.1 if dropout else 0.0,
        "return_lse": False,
    }
    forward = attention_spec.Forward(**shared, mask_gradient=mask_gradient)
    if name in ("forward", "decode"):
        return Knob(f"{(which, dtype.itemsize, block)}", present, tiles, set_tile, lambda: run.forward(forward)[:1])
    out, lse = run.forward(forward)
    keys = name in ("key", "mask")
    backward = attention_spec.Backward(
        dout=dout, dlse=None, out=out, lse=lse, needed=(True, keys, keys, mask_gradient), **shared
    )
    return Knob(f"{(which, dtype.itemsize, block)}", present, tiles, set_tile, lambda: run.backward(backward))


def gelu_mlp(dtype: torch.dtype, device: str, rows: int = 16384, width: int = 768) -> Knob:
    """The fused products; None: the vendor's products and a pointwise pass."""
    configs, run = module("configs"), implementation("gelu_mlp")
    at = backend.architecture(index_of(device)), dtype.itemsize

    def set_tile(value: Value) -> None:
        configs.MLP.pop(at, None)
        if value is not None:
            configs.MLP[at] = value

    def others(best: Value) -> list[Value]:
        shapes = (128, 64, 32), (128, 128, 32), (128, 128, 64), (128, 256, 64), (64, 128, 32)
        with_warps = [(*shape, warps, 3) for shape in shapes for warps in (4, 8)]
        return [None, *with_warps, *((*best[:4], stages) for stages in (2, 4) if best)]

    x, dy = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    shapes = (width, 4 * width), (4 * width, width)
    w1, w2 = (0.02 * torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
    b1, b2 = (torch.zeros(n, device=device, dtype=dtype) for n in (4 * width, width))
    weights = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "approximate": "tanh", "layout": "conv1d"}

    def call() -> Sequence[Tensor | None]:
        y, hidden, activated = run.forward(gelu_mlp_spec.Forward(**weights, recompute=1))
        saved = {"hidden": hidden, "activated": activated, "fp32_grads": False, "needed": (True,) * 5}
        return y, *run.backward(gelu_mlp_spec.Backward(dy=dy, **weights, **saved))

    return Knob(f"MLP {at}", configs.MLP.get(at), others, set_tile, call)


def layernorm_residual(constant: str, dtype: torch.dtype, device: str, rows: int = 4096, width: int = 768) -> Knob:
    """A constant of kernels/residual_norm.py: how large a program, or the number of partial sums."""
    kernels, run = module("residual_norm"), implementation("layernorm_residual")
    x, residual, dy = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    weight = torch.ones(width, device=device, dtype=dtype)
    common = {"weight": weight, "seed": None, "eps": 1e-5, "dropout_p": 0.0}
    forward = layernorm_residual_spec.Forward(x=x, residual=residual, bias=weight, **common)

    def call() -> Sequence[Tensor | None]:
        y, summed, mean, rstd = run.forward(forward)
        saved = {"summed": summed, "mean": mean, "rstd": rstd, "x_dtype": dtype, "needed": (True, False, True, True)}
        return y, *run.backward(layernorm_residual_spec.Backward(dy=dy, dsummed=dy, **saved, **common))

    return Knob(
        f"{constant}, {rows} × {width}",
        getattr(kernels, constant),
        lambda best: [best // 2, best * 2],
        lambda value: setattr(kernels, constant, value),
        call,
    )


def module(name: str) -> Any:
    """A module of the kernels."""
    return importlib.import_module(f"fastlm.kernels.{name}")


def index_of(device: str) -> int | None:
    return torch.cuda.current_device() if device == "cuda" else None


def knobs(device: str, **sizes: int) -> Iterator[Knob]:
    """The most important first. Each is made, with its tensors, when it is asked for."""
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
            for rows, width in ((4096, 768), (16384, 1600)):
                for constant in ("ELEMENTS_PER_PROGRAM", "MAX_PARTIALS"):
                    yield layernorm_residual(constant, half, device, rows, width)
    for which in ("mask", "key exact", "query exact"):
        yield attention(which, half, 64, device, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try other launch configurations of the Triton kernels on this GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial to this file")
    parser.add_argument("--seconds", type=float, default=500, help="no trial starts after this time (default: 500)")
    arguments = parser.parse_args()
    if why := registry.unavailable("triton") or ([] if torch.cuda.is_available() else ["finds no GPU"]):
        parser.error(f"triton {', '.join(why)}")
    until, trials = time.monotonic() + arguments.seconds, []
    for knob in knobs("cuda"):
        if time.monotonic() > until:
            break
        found = []
        for one in search(knob, "cuda", until):
            print(one, flush=True)
            found.append(one)
            trials.append(dataclasses.asdict(one))
            if arguments.json:
                arguments.json.write_text(json.dumps(trials, indent=1) + "\n")
        print(f"{knob.name}: {better(found) or f'stays {knob.value}'}", flush=True)


if __name__ == "__main__":
    main()
