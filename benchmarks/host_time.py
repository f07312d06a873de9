"""The time that Python and PyTorch take to launch an operator's Triton kernels: python benchmarks/host_time.py [WORD…]

No GPU is needed and none is used: operands are small tensors of the CPU, and a launch is a call of a function that does
nothing. What is left is checks, backend selection, autograd, allocations, and the arguments of the launches. Printed is
the least CPU time of a call in microseconds, as other processes do not shorten it; beside it PyTorch's own operator,
whose arithmetic on such operands is included.
"""

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastlm
import fastlm.backends.triton as triton_backend  # finds fastlm.kernels in a checkout
from fastlm.kernels import launch

Call = Callable[[], object]


def without_launches(architecture: str) -> None:
    """Makes the backend `triton` take CPU tensors as if they were on that GPU, and launches do nothing."""

    def nothing(*arguments: object) -> None:
        pass

    binary = types.SimpleNamespace(run=nothing, function=0, packed_metadata=(), metadata=types.SimpleNamespace())
    launch.launch_by_triton = lambda *arguments: binary
    launch.current_stream = lambda: lambda device: 0
    for operator in ("linear_cross_entropy", "linear_log_prob"):  # on a GPU the kernel checks the targets
        module = importlib.import_module(f"fastlm.ops.{operator}.triton")
        module.check_targets = lambda *arguments: None  # type: ignore[attr-defined]
    triton_backend.architecture = lambda index: architecture  # type: ignore[assignment]
    triton_backend.Triton.unavailable = lambda self: []  # type: ignore[method-assign]
    triton_backend.Triton.refuses = lambda self, device, dtype: []  # type: ignore[method-assign]


def without_products() -> None:
    """Makes PyTorch's matrix products return at once a tensor of zeros, the same for each shape and dtype."""
    earlier: dict[tuple, torch.Tensor] = {}

    def result(like: torch.Tensor, *shape: int) -> torch.Tensor:
        key = *shape, like.dtype
        return earlier[key] if key in earlier else earlier.setdefault(key, like.new_zeros(shape))

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        return result(a, a.shape[0], b.shape[1]) if out is None else out

    def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        return mm(a, b, out=out)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return result(x, *x.shape[:-1], weight.shape[0])

    torch.mm, torch.addmm, F.linear = mm, addmm, linear  # type: ignore[assignment]
    torch.Tensor.addmm_ = lambda self, a, b: self  # type: ignore[assignment, method-assign]


def least(call: Call, rounds: int, calls: int) -> float:
    """Microseconds of CPU time."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time_ns()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time_ns() - begin) / calls / 1e3)
    return best


def cases() -> dict[str, tuple[Call, Call | None, Call | None]]:
    """name → (forward, forward + backward, PyTorch's forward)."""

    def normal(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(grad)

    def of(function: Callable, inputs: list[torch.Tensor], upstream: torch.Tensor) -> tuple[Call, Call]:
        def forward() -> object:
            with torch.no_grad():
                return function()

        def both() -> object:
            out = function()
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, inputs, upstream)

        return forward, both

    made: dict[str, tuple[Call, Call | None, Call | None]] = {}
    rows, width = 4, 64
    x, residual, weight, bias = normal(rows, width), normal(rows, width), normal(width), normal(width)
    triton = {"backend": "triton"}
    made["layernorm_residual"] = (
        *of(
            lambda: fastlm.layernorm_residual(x, residual, weight, bias, **triton),
            [x, residual, weight, bias],
            normal(rows, width, grad=False),
        ),
        lambda: F.layer_norm(x.detach() + residual.detach(), (width,), weight.detach(), bias.detach()),
    )
    made["rms_norm_residual"] = (
        *of(
            lambda: fastlm.rms_norm_residual(x, residual, weight, **triton),
            [x, residual, weight],
            normal(rows, width, grad=False),
        ),
        lambda: F.rms_norm(x.detach() + residual.detach(), (width,), weight.detach()),
    )
    q, k, v = (normal(1, 2, 4, 64) for _ in range(3))
    made["attention"] = (
        *of(lambda: fastlm.attention(q, k, v, causal=True, **triton), [q, k, v], normal(1, 2, 4, 64, grad=False)),
        lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), is_causal=True),
    )
    one, keys, values = normal(1, 2, 1, 64), normal(1, 2, 300, 64), normal(1, 2, 300, 64)
    made["decode"] = (
        of(lambda: fastlm.attention(one, keys, values, causal=True, **triton), [], one)[0],
        None,
        lambda: F.scaled_dot_product_attention(one.detach(), keys.detach(), values.detach()),
    )
    cos, sin, square = torch.randn(1, 4, 64), torch.randn(1, 4, 64), normal(width, width)

    def rotate() -> torch.Tensor:
        return fastlm.rotary(q, k, cos, sin, **triton)[0]

    made["rotary"] = (*of(rotate, [q], normal(1, 2, 4, 64, grad=False)), None)
    made["linear"] = (
        *of(lambda: fastlm.linear(x, square, weight, **triton), [x, square, weight], normal(rows, width, grad=False)),
        lambda: F.linear(x.detach(), square.detach(), weight.detach()),
    )
    w1, b1, w2, b2 = normal(128, width), normal(128), normal(width, 128), normal(width)
    made["gelu_mlp"] = (
        *of(lambda: fastlm.gelu_mlp(x, w1, b1, w2, b2, **triton), [x, w1, b1, w2, b2], normal(rows, width, grad=False)),
        lambda: F.linear(F.gelu(F.linear(x.detach(), w1.detach(), b1.detach())), w2.detach(), b2.detach()),
    )
    gate, up, down = normal(128, width), normal(128, width), normal(width, 128)
    made["glu_mlp"] = (
        *of(lambda: fastlm.glu_mlp(x, gate, up, down, **triton), [x, gate, up, down], normal(rows, width, grad=False)),
        lambda: F.linear(
            F.silu(F.linear(x.detach(), gate.detach())) * F.linear(x.detach(), up.detach()), down.detach()
        ),
    )
    vocabulary, target = normal(256, width), torch.arange(rows)
    made["linear_cross_entropy"] = (
        *of(
            lambda: fastlm.linear_cross_entropy(x, vocabulary, target, **triton),
            [x, vocabulary],
            torch.ones((), dtype=torch.bfloat16),
        ),
        lambda: F.cross_entropy(F.linear(x.detach(), vocabulary.detach()).float(), target),
    )
    made["linear_log_prob"] = (
        *of(lambda: fastlm.linear_log_prob(x, vocabulary, target, **triton), [x, vocabulary], torch.ones(rows)),
        lambda: F.cross_entropy(F.linear(x.detach(), vocabulary.detach()).float(), target),
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="measure the operators with one of these in their name")
    parser.add_argument("--architecture", default="sm_90", help="whose launches are made")
    parser.add_argument("--without-products", action="store_true", help="PyTorch's matrix products do nothing either")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="print where the time of forward + backward goes")
    options = parser.parse_args()
    without_launches(options.architecture)
    if options.without_products:
        without_products()
    torch.set_num_threads(1)
    for name, (forward, both, eager) in cases().items():
        if name == "linear" and options.without_products:  # nothing but a product
            continue
        if options.words and not any(word in name for word in options.words):
            continue
        times = [f"{least(call, options.rounds, options.calls):6.1f}" if call else "     –" for call in (forward, both)]
        plain = f"{least(eager, options.rounds, options.calls):6.1f}" if eager else "     –"
        print(f"{name:24} forward {times[0]} µs   forward + backward {times[1]} µs   PyTorch's forward {plain} µs")
        if options.profile:
            import cProfile
            import pstats

            with cProfile.Profile() as profiler:
                for _ in range(500):
                    (both or forward)()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
