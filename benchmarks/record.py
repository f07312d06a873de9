"""Records the bits of every result, so that a change that must keep them can be checked against an older checkout.

    PYTHONPATH=OLDER FASTLM_ISA=avx2 python benchmarks/record.py --out before.json
    PYTHONPATH=NEWER FASTLM_ISA=avx2 python benchmarks/record.py --out after.json --compare before.json

Every operator runs forward and backward in every dtype, on ordinary and odd sizes, on contiguous and strided inputs,
under autocast, as a torch.library operator, and on each backend. So do the optimizer, a training step of each model,
and generation. For every result the file holds the SHA-256 of its bytes with its dtype, shape and strides. Only the
public API is used: the same script runs on any checkout that PYTHONPATH names.

The Triton kernels are recorded without a GPU under Triton's interpreter, on tiny sizes:

    TRITON_INTERPRET=1 python benchmarks/record.py --backends triton --out triton.json
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # an editable installation would add its own fastlm.kernels to the package of PYTHONPATH
    sys.meta_path = [finder for finder in sys.meta_path if "_EditableFinder" not in str(finder)]

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("auto", "cpu", "torch", "reference")
THREADED = ("cpu",)  # the backends that promise the same bits on any number of threads; PyTorch's operators do not
SEED = 1234
Results = dict[str, str]


# 1. Describing results


def described(result: Any) -> str:
    """The digest of the bytes of a tensor, its dtype, shape, and strides (but those of dimensions of size 0 or 1)."""
    if not isinstance(result, Tensor):
        return repr(result)
    x = result.detach()
    digest = hashlib.sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    strides = [stride if size > 1 and x.numel() else "-" for size, stride in zip(x.shape, x.stride(), strict=True)]
    return f"{digest} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} strides [{', '.join(map(str, strides))}]"


def flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]


# 2. Inputs: the same numbers on every checkout, whatever other cases there are


class Draw:
    """Draws the inputs of one case in one dtype. Each case has its own generator, seeded by the case's name."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def __call__(
        self, *shape: int, layout: str = "contiguous", scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of normal numbers in one of several memory layouts."""
        if layout == "heads last":  # (batch, length, heads, head_dim) in memory
            batch, heads, length, head_dim = shape
            return self.normal(batch, length, heads, head_dim, scale=scale, dtype=dtype).transpose(1, 2)
        if layout == "transposed":  # the last dimension is not contiguous
            return self.normal(*shape[:-2], shape[-1], shape[-2], scale=scale, dtype=dtype).transpose(-1, -2)
        if layout == "sliced":  # rows with gaps, not aligned
            return self.normal(*shape[:-1], 2 * shape[-1] + 3, scale=scale, dtype=dtype)[..., 1 : 1 + shape[-1]]
        if layout == "expanded":  # stride 0 along the first dimension
            return self.normal(1, *shape[1:], scale=scale, dtype=dtype).expand(*shape)
        return self.normal(*shape, scale=scale, dtype=dtype)

    def chosen(self, share: float, *shape: int) -> Tensor:
        """Booleans, of which about this share is True."""
        return torch.rand(shape, generator=self.generator) < share

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an operator: make(draw) returns the floating-point inputs by name, and call(backend, **inputs)."""

    operator: str
    name: str
    make: Callable[[Draw], tuple[dict[str, Tensor], Callable[..., Any]]]
    tiny: bool = False  # small enough for Triton's interpreter

    @property
    def key(self) -> str:
        return f"{self.operator}, {self.name}"


# 3. The operators' cases


def attention_case(
    name: str,
    sizes: tuple[int, int, int, int, int, int],
    *,
    layout: str = "contiguous",
    mask: str = "",
    padding: bool = False,
    tiny: bool = False,
    **options: Any,
) -> Case:
    """sizes: batch, heads, key heads, query length, key length, head dimension."""
    batch, heads, key_heads, query_len, key_len, head_dim = sizes

    def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        inputs = {
            "query": draw(batch, heads, query_len, head_dim, layout=layout),
            "key": draw(batch, key_heads, key_len, head_dim, layout=layout),
            "value": draw(batch, key_heads, key_len, head_dim, layout=layout),
        }
        fixed: dict[str, Any] = dict(options)
        if mask == "bool":
            fixed["mask"] = draw.chosen(0.7, batch, 1, query_len, key_len)
            fixed["mask"][:, :, :1] = False  # a fully masked row
        elif mask == "bool of keys":
            fixed["mask"] = draw.chosen(0.7, 1, 1, 1, key_len)
        elif mask == "infinite":
            fixed["mask"] = draw(1, heads, query_len, key_len).masked_fill(
                draw.chosen(0.3, 1, heads, query_len, key_len), -torch.inf
            )
        elif mask == "learned":
            inputs["mask"] = draw(1, heads, query_len, key_len)
        elif mask == "learned, float32":
            inputs["mask"] = draw(batch, 1, query_len, key_len, dtype=torch.float32)
        if padding:
            lengths = torch.linspace(key_len, max(1, key_len // 3), batch).long()
            fixed["key_padding"] = torch.arange(key_len) < lengths[:, None]
        return inputs, lambda backend, **x: fastlm.attention(**x, **fixed, backend=backend)

    return Case("attention", name, make, tiny)


def attention_cases() -> Iterator[Case]:
    usual, odd = (2, 4, 4, 96, 96, 64), (2, 6, 3, 37, 53, 40)
    shapes = {
        "usual": usual,
        "odd": odd,
        "long": (1, 2, 2, 700, 700, 64),
        "long, grouped": (1, 8, 2, 260, 530, 128),
        "one query": (3, 8, 2, 1, 257, 64),
        "one of each": (1, 1, 1, 1, 1, 1),
        "more queries than keys": (1, 2, 2, 65, 17, 80),
        "wide heads": (1, 2, 1, 33, 33, 256),
        "narrow heads": (2, 3, 3, 50, 50, 3),
        "heads of 96": (1, 3, 3, 130, 130, 96),
        "no batch": (0, 2, 2, 4, 4, 8),
        "no keys": (1, 2, 2, 4, 0, 8),
        "tiny": (1, 2, 1, 5, 7, 16),
    }
    for name, sizes in shapes.items():
        yield attention_case(name, sizes, tiny=name == "tiny")
        yield attention_case(f"{name}, causal", sizes, causal=True, tiny=name == "tiny")
    everything = {"causal": True, "window": (20, 3), "dropout_p": 0.2, "return_lse": True, "scale": 0.2}
    for shape, sizes in (("usual", usual), ("odd", odd), ("tiny", shapes["tiny"])):
        tiny = shape == "tiny"
        for mask in ("bool", "bool of keys", "infinite", "learned", "learned, float32"):
            yield attention_case(f"{shape}, {mask} mask", sizes, mask=mask, tiny=tiny)
        yield attention_case(f"{shape}, padding", sizes, padding=True, tiny=tiny)
        yield attention_case(f"{shape}, log-sum-exp", sizes, return_lse=True, scale=0.3, tiny=tiny)
        yield attention_case(f"{shape}, dropout", sizes, dropout_p=0.3, tiny=tiny)
        yield attention_case(f"{shape}, causal, dropout", sizes, causal=True, dropout_p=0.1, tiny=tiny)
        yield attention_case(
            f"{shape}, everything", sizes, layout="heads last", mask="learned", padding=True, tiny=tiny, **everything
        )
        for window in ((5, None), (None, 2), (3, 4), (0, 0)):
            yield attention_case(f"{shape}, window {window}", sizes, window=window, tiny=tiny)
        yield attention_case(f"{shape}, causal, window (9, None)", sizes, causal=True, window=(9, None), tiny=tiny)
        for layout in ("heads last", "transposed", "sliced", "expanded"):
            yield attention_case(f"{shape}, {layout}", sizes, layout=layout, causal=True, tiny=tiny)
    yield attention_case("long, padding, dropout", shapes["long"], padding=True, dropout_p=0.1, causal=True)
    yield attention_case("one query, padding", shapes["one query"], padding=True)

    def dropped(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        """With equal scores and an identity for values the output is the dropout mask."""
        zeros = torch.zeros(2, 3, 40, 40, dtype=draw.dtype)
        identity = torch.eye(40, dtype=draw.dtype).expand(2, 3, 40, 40)
        return {"query": zeros}, lambda backend, query: fastlm.attention(
            query, zeros, identity, dropout_p=0.4, backend=backend
        )

    yield Case("attention", "dropout mask", dropped)


def attention_varlen_cases() -> Iterator[Case]:
    batches = {
        "usual": ([64, 17, 128, 3], [64, 17, 128, 3], 4, 4, 64),
        "odd": ([5, 0, 33, 1], [9, 4, 0, 40], 6, 2, 40),
        "long": ([300, 1, 290], [300, 1, 290], 2, 1, 128),
        "tiny": ([3, 1, 4], [5, 1, 2], 2, 1, 16),
    }
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (4, 2)},
        "causal window": {"causal": True, "window": (9, None)},
        "dropout": {"dropout_p": 0.2, "causal": True},
        "log-sum-exp": {"return_lse": True, "scale": 0.2},
    }

    def case(shape: str, variant: str, layout: str = "contiguous", starts: torch.dtype = torch.int64) -> Case:
        queries, keys, heads, key_heads, head_dim = batches[shape]
        q, k = (torch.tensor([0, *lengths]).cumsum(0).to(starts) for lengths in (queries, keys))

        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {
                "query": draw(sum(queries), heads, head_dim, layout=layout),
                "key": draw(sum(keys), key_heads, head_dim, layout=layout),
                "value": draw(sum(keys), key_heads, head_dim, layout=layout),
            }
            return inputs, lambda backend, query, key, value: fastlm.attention_varlen(
                query, key, value, q, k, **variants[variant], backend=backend
            )

        name = ", ".join(filter(None, (shape, variant, layout, str(starts).removeprefix("torch."))))
        return Case("attention_varlen", name, make, shape == "tiny")

    for shape in batches:
        for variant in variants:
            yield case(shape, variant)
        yield case(shape, "causal", "sliced", torch.int32)
        yield case(shape, "plain", "transposed")


def scaled_dot_product_attention_cases() -> Iterator[Case]:
    def case(name: str, query: tuple, key: tuple, value: tuple, mask: tuple = (), tiny: bool = False, **options: Any):
        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {"query": draw(*query), "key": draw(*key), "value": draw(*value)}
            fixed = dict(options, attn_mask=draw.chosen(0.8, *mask)) if mask else options
            return inputs, lambda backend, **x: fastlm.scaled_dot_product_attention(**x, **fixed, backend=backend)

        return Case("scaled_dot_product_attention", name, make, tiny)

    yield case("4-D, causal", (2, 4, 33, 40), (2, 4, 57, 40), (2, 4, 57, 40), is_causal=True)
    yield case("grouped", (2, 4, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), enable_gqa=True, scale=0.1)
    yield case("3-D", (4, 33, 40), (4, 20, 40), (4, 20, 40))
    yield case("2-D", (33, 40), (20, 40), (20, 40))
    yield case("5-D, broadcast", (2, 3, 4, 17, 16), (1, 3, 4, 9, 16), (2, 1, 4, 9, 16))
    yield case("narrow values", (1, 2, 19, 48), (1, 2, 19, 48), (1, 2, 19, 24), is_causal=True)
    yield case("wide values", (1, 2, 19, 24), (1, 2, 19, 24), (1, 2, 19, 48))
    yield case("mask", (2, 4, 33, 40), (2, 4, 57, 40), (2, 4, 57, 40), (33, 57))
    yield case("dropout", (2, 4, 33, 40), (2, 4, 57, 40), (2, 4, 57, 40), dropout_p=0.2)
    yield case("tiny", (1, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16), is_causal=True, tiny=True)


def layernorm_residual_cases() -> Iterator[Case]:
    def case(
        rows: tuple[int, ...],
        width: int,
        *,
        residual: bool = True,
        bias: bool = True,
        layout: str = "contiguous",
        stream: torch.dtype | None = None,
        parameters: torch.dtype | None = None,
        tiny: bool = False,
        **options: Any,
    ) -> Case:
        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {"x": draw(*rows, width, layout=layout)}
            if residual:
                inputs["residual"] = draw(*rows, width, layout=layout, dtype=stream)
            inputs["weight"] = draw(width, dtype=parameters)
            if bias:
                inputs["bias"] = draw(width, dtype=parameters)
            return inputs, lambda backend, **x: fastlm.layernorm_residual(
                x["x"], x.get("residual"), x["weight"], x.get("bias"), **options, backend=backend
            )

        parts = [f"{'x'.join(map(str, rows))} of {width}", "residual" if residual else "", "bias" if bias else ""]
        parts += [layout, *(f"{name} {value}" for name, value in options.items())]
        parts += [f"stream {stream}" if stream else "", f"parameters {parameters}" if parameters else ""]
        return Case("layernorm_residual", ", ".join(filter(None, parts)), make, tiny)

    for rows, width in (
        ((2, 16), 64),
        ((3, 7), 33),
        ((130,), 768),
        ((1,), 1),
        ((2, 3, 5), 257),
        ((600,), 48),
        ((0,), 8),
    ):
        for residual in (True, False):
            for bias in (True, False):
                yield case(rows, width, residual=residual, bias=bias)
        yield case(rows, width, dropout_p=0.3)
        yield case(rows, width, dropout_p=0.1, residual=False, eps=1e-3)
        yield case(rows, width, stream=torch.float32, parameters=torch.float32)
        yield case(rows, width, stream=torch.float32, dropout_p=0.1)
    for layout in ("transposed", "sliced", "expanded"):
        yield case((4, 9), 40, layout=layout)
        yield case((4, 9), 40, layout=layout, residual=False)
    yield case((2, 3), 24, tiny=True)
    yield case((2, 3), 24, tiny=True, dropout_p=0.3)
    yield case((5,), 19, tiny=True, residual=False, bias=False)

    def dropped(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        """With ones for x and zeros for residual the sum is the dropout mask."""
        ones = torch.ones(37, 100, dtype=draw.dtype)
        weight = torch.ones(100, dtype=draw.dtype)
        return {"x": ones}, lambda backend, x: fastlm.layernorm_residual(
            x, torch.zeros_like(x), weight, dropout_p=0.4, backend=backend
        )

    yield Case("layernorm_residual", "dropout mask", dropped)


PRODUCTS = (  # rows, in, out
    ((1,), 64, 64),
    ((2,), 16, 16),
    ((3, 5), 33, 47),
    ((4, 32), 192, 160),
    ((257,), 100, 31),
    ((7,), 768, 300),
    ((64,), 8, 515),
    ((1,), 1, 1),
    ((300,), 512, 6),
    ((2, 150), 384, 384),
    ((0,), 8, 4),
)


def linear_cases() -> Iterator[Case]:
    def case(
        rows: tuple[int, ...],
        width: int,
        out: int,
        storage: str,
        bias: bool = True,
        layouts: tuple[str, str] = ("contiguous", "contiguous"),
        tiny: bool = False,
    ) -> Case:
        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            shape = (out, width) if storage == "linear" else (width, out)
            inputs = {
                "x": draw(*rows, width, layout=layouts[0]),
                "weight": draw(*shape, layout=layouts[1], scale=width**-0.5),
            }
            if bias:
                inputs["bias"] = draw(out)
            return inputs, lambda backend, x, weight, bias=None: fastlm.linear(
                x, weight, bias, layout=storage, backend=backend
            )

        name = f"{'x'.join(map(str, rows))}, {width} to {out}, {storage}, {'bias, ' * bias}{' by '.join(layouts)}"
        return Case("linear", name, make, tiny)

    for rows, width, out in PRODUCTS:
        for storage in ("linear", "conv1d"):
            yield case(rows, width, out, storage)
            yield case(rows, width, out, storage, bias=False)
    for storage in ("linear", "conv1d"):
        for layouts in (
            ("transposed", "contiguous"),
            ("sliced", "contiguous"),
            ("expanded", "sliced"),
            ("contiguous", "transposed"),
            ("sliced", "transposed"),
        ):
            yield case((6, 9), 40, 56, storage, layouts=layouts)
        yield case((3,), 16, 24, storage, tiny=True)


def gelu_mlp_cases() -> Iterator[Case]:
    def case(
        rows: tuple[int, ...],
        sizes: tuple[int, int, int],
        storage: str,
        bias: bool = True,
        layout: str = "contiguous",
        tiny: bool = False,
        **options: Any,
    ) -> Case:
        width, hidden, out = sizes

        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            first, second = (
                ((hidden, width), (out, hidden)) if storage == "linear" else ((width, hidden), (hidden, out))
            )
            inputs = {
                "x": draw(*rows, width, layout=layout),
                "w1": draw(*first, scale=width**-0.5),
                "w2": draw(*second, scale=hidden**-0.5),
            }
            if bias:
                inputs |= {"b1": draw(hidden), "b2": draw(out)}
            return inputs, lambda backend, x, w1, w2, b1=None, b2=None: fastlm.gelu_mlp(
                x, w1, b1, w2, b2, layout=storage, backend=backend, **options
            )

        parts = [f"{'x'.join(map(str, rows))}, {width} to {hidden} to {out}", storage, "bias" if bias else "", layout]
        parts += [f"{name} {value}" for name, value in options.items()]
        return Case("gelu_mlp", ", ".join(filter(None, parts)), make, tiny)

    for rows, sizes in (
        ((2,), (16, 64, 16)),
        ((3, 5), (33, 70, 41)),
        ((4, 24), (96, 384, 96)),
        ((1,), (64, 256, 64)),
        ((257,), (40, 50, 9)),
        ((0,), (8, 16, 8)),
    ):
        for approximate in ("none", "tanh"):
            for recompute in (0, 1, 2):
                yield case(rows, sizes, "linear", approximate=approximate, recompute=recompute)
        yield case(rows, sizes, "conv1d", approximate="tanh", recompute=1)
        yield case(rows, sizes, "linear", bias=False)
        yield case(rows, sizes, "conv1d", bias=False, recompute=2)
    for layout in ("transposed", "sliced", "expanded"):
        yield case((4, 9), (40, 80, 40), "linear", layout=layout)
    yield case((3,), (16, 32, 16), "linear", tiny=True)
    yield case((3,), (16, 32, 16), "conv1d", tiny=True, approximate="tanh", recompute=2)


def linear_cross_entropy_cases() -> Iterator[Case]:
    def case(
        rows: tuple[int, ...],
        width: int,
        vocab: int,
        bias: bool = False,
        layouts: tuple[str, str] = ("contiguous", "contiguous"),
        tiny: bool = False,
        **options: Any,
    ) -> Case:
        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {
                "x": draw(*rows, width, layout=layouts[0]),
                "weight": draw(vocab, width, layout=layouts[1], scale=width**-0.5),
            }
            if bias:
                inputs["bias"] = draw(vocab)
            target = draw.integers(vocab, *rows)
            target[draw.chosen(0.2, *rows)] = options.get("ignore_index", -100)
            return inputs, lambda backend, x, weight, bias=None: fastlm.linear_cross_entropy(
                x, weight, target, bias, **options, backend=backend
            )

        parts = [f"{'x'.join(map(str, rows))} of {width}, vocabulary {vocab}", "bias" if bias else ""]
        parts += [" by ".join(layouts), *(f"{name} {value}" for name, value in options.items())]
        return Case("linear_cross_entropy", ", ".join(filter(None, parts)), make, tiny)

    for rows, width, vocab in (((2, 20), 48, 500), ((17,), 33, 97), ((300,), 64, 5003), ((1,), 8, 2), ((0,), 8, 5)):
        for reduction in ("mean", "sum", "none"):
            yield case(rows, width, vocab, reduction=reduction)
        yield case(rows, width, vocab, bias=True, label_smoothing=0.1)
        yield case(rows, width, vocab, bias=True, reduction="none", label_smoothing=0.2, ignore_index=1)
    yield case((1100,), 32, 8200, bias=True)  # several chunks of logits
    for layouts in (("transposed", "contiguous"), ("sliced", "sliced"), ("contiguous", "transposed")):
        yield case((2, 9), 40, 130, layouts=layouts)
    yield case((5,), 16, 24, bias=True, tiny=True)
    yield case((5,), 16, 24, reduction="none", label_smoothing=0.1, tiny=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "attention_varlen": attention_varlen_cases,
    "scaled_dot_product_attention": scaled_dot_product_attention_cases,
    "layernorm_residual": layernorm_residual_cases,
    "gelu_mlp": gelu_mlp_cases,
    "linear": linear_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}


# 4. Running a case


def run_case(case: Case, dtype: torch.dtype, backend: str, way: str) -> Results:
    """One of WAYS of calling an operator: its results, and its gradients where the way has some."""
    draw = Draw(case.key, dtype)
    inputs, call = case.make(draw)
    wanted = list(inputs) if way != "some gradients" else list(inputs)[::2]
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    autocast = way.removeprefix("autocast ") if way.startswith("autocast ") else ""
    counter = FlopCounterMode(display=False) if way == "torch.library operator" else None
    torch.manual_seed(SEED)  # the seed of dropout
    with torch.autocast("cpu", DTYPES.get(autocast), enabled=bool(autocast)), counter or contextlib.nullcontext():
        if way == "inference":
            with torch.no_grad():
                return {f"result {i}": described(y) for i, y in enumerate(flat(call(backend, **leaves)))}
        results = flat(call(backend, **leaves))
        differentiable = [y for y in results if y.requires_grad]
        if way == "zero-stride gradient":
            upstreams = [torch.ones((), dtype=y.dtype).expand(y.shape) for y in differentiable]
        else:
            upstreams = [draw.normal(*y.shape, dtype=y.dtype) for y in differentiable]
        asked = [leaves[name] for name in wanted]
        double = way == "double backward"
        gradients = torch.autograd.grad(differentiable, asked, upstreams, create_graph=double, allow_unused=True)
    found = {f"result {i}": described(y) for i, y in enumerate(results)}
    found |= {f"gradient of {name}": described(g) for name, g in zip(wanted, gradients, strict=True)}
    if double:
        total = sum(g.float().square().sum() for g in gradients if g is not None and g.requires_grad)
        seconds = torch.autograd.grad(total, asked, allow_unused=True)
        found |= {f"second gradient of {name}": described(g) for name, g in zip(wanted, seconds, strict=True)}
    if counter:
        found["FLOPs"] = str(counter.get_total_flops())
    return found


def ways_of(case: Case, dtype: str, backend: str) -> list[str]:
    if backend == "triton":
        return ["inference", "training"]
    if backend != "cpu":
        return ["training", *(["autocast bfloat16"] if dtype == "float32" else [])]
    ways = ["inference", "training", "some gradients", "zero-stride gradient", "torch.library operator"]
    if dtype == "float32":
        ways += ["autocast bfloat16", "autocast float16"] + (["double backward"] if case.tiny else [])
    return ways


def record_operators(names: list[str], backends: list[str], threads: int) -> Results:
    found: Results = {}
    for name in names:
        for case in CASES[name]():
            for backend in backends:
                if backend == "triton" and not case.tiny:
                    continue
                torch.set_num_threads(threads if backend in THREADED else 1)
                dtypes = [*DTYPES, *(["float64"] if backend in ("auto", "reference") and case.tiny else [])]
                for dtype in dtypes:
                    for way in ways_of(case, dtype, backend):
                        key = f"{case.key}; {dtype}; {backend}; {way}"
                        found |= guarded(
                            key, run_case, case, getattr(torch, dtype), None if backend == "auto" else backend, way
                        )
    return found


def guarded(key: str, function: Callable[..., Results], *arguments: Any) -> Results:
    """The results under the key; of an exception only its type, as its text may change."""
    try:
        results = function(*arguments)
    except fastlm.Unsupported:
        return {key: "Unsupported"}
    except Exception as error:
        print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
        return {key: f"raises {type(error).__name__}"}
    return {f"{key}; {name}": value for name, value in results.items()}


# 5. The optimizer


ADAMW: dict[str, dict[str, Any]] = {
    "plain": {},
    "no decay": {"weight_decay": 0.0, "eps": 1e-6, "betas": (0.8, 0.95)},
    "clipping": {"max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
    "zeroed gradients": {"zero_gradients": True, "max_grad_norm": 100.0},
    "everything": {"master_weights": True, "zero_gradients": True, "max_grad_norm": 0.1, "maximize": True},
    "amsgrad": {"amsgrad": True},
}


def adamw_steps(name: str, dtype: torch.dtype, backend: str | None) -> Results:
    draw = Draw(f"adamw, {name}", dtype)
    parameters = [draw(*shape).requires_grad_() for shape in ((3,), (40, 33), (1,), (5, 7, 2), (70_001,), (0,))]
    parameters.append(draw(9, 12, layout="transposed").requires_grad_())
    options = {"lr": 1e-2} | ADAMW[name]
    optimizer = fastlm.optim.AdamW(parameters, backend=backend, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = draw(*p.shape)
        optimizer.step()
    found = {f"parameter {i}": described(p) for i, p in enumerate(parameters)}
    found |= {f"gradient {i}": described(p.grad) for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        found |= {f"state {i}, {key}": described(x) for key, x in sorted(optimizer.state[p].items())}
    if "max_grad_norm" in options:
        found["norm"] = described(optimizer.grad_norm)
    return found


def record_adamw(backends: list[str], threads: int) -> Results:
    found: Results = {}
    for backend in backends:
        torch.set_num_threads(threads if backend in THREADED else 1)
        for name in ADAMW:
            for dtype in DTYPES:
                key = f"adamw, {name}; {dtype}; {backend}"
                found |= guarded(key, adamw_steps, name, DTYPES[dtype], None if backend == "auto" else backend)
    return found


# 6. Models: a training step, an evaluation, and generation


def gpt2() -> torch.nn.Module:
    from fastlm.models import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=101, n_positions=64))


def bert() -> torch.nn.Module:
    from fastlm.models import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=101, max_position_embeddings=64))


def accelerated(kind: str, head: str, **settings: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=101, **settings)
    return fastlm.accelerate(getattr(transformers, f"{kind}{head}")(config))


ENCODER = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "GPT-2": gpt2,
    "BERT": bert,
    "transformers GPT-2": lambda: accelerated("GPT2", "LMHeadModel", n_layer=2, n_embd=48, n_head=4, n_positions=64),
    "transformers BERT": lambda: accelerated("Bert", "ForMaskedLM", **ENCODER),
    "transformers BERT classifier": lambda: accelerated("Bert", "ForSequenceClassification", **ENCODER),
    "transformers RoBERTa": lambda: accelerated("Roberta", "ForMaskedLM", **ENCODER),
    "transformers ELECTRA": lambda: accelerated("Electra", "ForMaskedLM", embedding_size=32, **ENCODER),
    "transformers DistilBERT": lambda: accelerated(
        "DistilBert", "ForMaskedLM", n_layers=2, dim=48, n_heads=4, hidden_dim=96, max_position_embeddings=64
    ),
}
STEPS = ("float32", "bfloat16 autocast", "bfloat16", "float32, padded")


def model_step(name: str, way: str) -> Results:
    """Two training steps with AdamW and dropout, then the logits of an evaluation."""
    torch.manual_seed(SEED)
    model = MODELS[name]().train()
    if way == "bfloat16":
        model = model.bfloat16()
    draw = Draw(f"{name}, tokens", torch.float32)
    batch = {"input_ids": 3 + draw.integers(98, 3, 40)}
    if "classifier" in name:
        batch["labels"] = draw.integers(2, 3)
    elif "GPT" in name:
        batch["labels"] = batch["input_ids"].clone()
    else:
        batch["labels"] = batch["input_ids"].masked_fill(~draw.chosen(0.3, 3, 40), -100)
    if "padded" in way:
        batch["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [25], [9]])).long()
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, master_weights=True)
    found: Results = {}
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
            loss = model(**batch).loss
        loss.backward()
        found[f"loss {step}"] = described(loss)
        found |= {f"gradient {step} of {n}": described(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found |= {f"parameter {n}": described(p) for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return found | {"evaluated loss": described(output.loss), "logits": described(output.logits)}


def recomputed_step(name: str, level: int, checkpointed: bool) -> Results:
    torch.manual_seed(SEED)
    model = MODELS[name]().train()
    model.recompute = level
    if checkpointed:
        model.gradient_checkpointing_enable()
    tokens = 3 + Draw(f"{name}, tokens", torch.float32).integers(98, 3, 40)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": described(loss)} | {f"gradient of {n}": described(p.grad) for n, p in model.named_parameters()}


def generation(dtype: torch.dtype, padded: bool, options: dict[str, Any]) -> Results:
    torch.manual_seed(SEED)
    model = gpt2().to(dtype).eval()
    tokens = Draw("generation", torch.float32).integers(101, 2, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long() if padded else None
    out = model.generate(tokens, max_new_tokens=40, eos_token_id=(), attention_mask=mask, **options)
    return {"tokens": described(out)}


def accelerated_generation() -> Results:
    torch.manual_seed(SEED)
    model = MODELS["transformers GPT-2"]().eval()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    tokens = Draw("generation", torch.float32).integers(101, 2, 9)
    with torch.no_grad():
        return {"tokens": described(model.generate(tokens, max_new_tokens=20, do_sample=False))}


def record_models(threads: int) -> Results:
    found: Results = {}
    for name in MODELS:
        torch.set_num_threads(
            1 if name.startswith("transformers") else threads
        )  # PyTorch's operators are left in those
        for way in STEPS:
            found |= guarded(f"training step, {name}; {way}", model_step, name, way)
    torch.set_num_threads(threads)
    for name in ("GPT-2", "BERT"):
        for level, checkpointed in ((0, False), (1, False), (2, False), (1, True)):
            key = f"training step, {name}; recompute {level}{', gradient checkpointing' * checkpointed}"
            found |= guarded(key, recomputed_step, name, level, checkpointed)
    sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    for dtype in DTYPES:
        for padded in (False, True):
            for way, options in (("greedy", {}), ("sampled", sampled)):
                key = f"generation, {way}; {dtype}{', padded' * padded}"
                found |= guarded(key, generation, DTYPES[dtype], padded, options)
    return found | guarded("generation, transformers GPT-2; float32", accelerated_generation)


# 7. Recording and comparing


def selected(operators: list[str] | None) -> list[str]:
    every = [*CASES, "adamw", "models"]
    wrong = set(operators or []) - set(every)
    if wrong:
        sys.exit(f"operators: expected some of {', '.join(every)}, got {', '.join(sorted(wrong))}")
    return [name for name in every if operators is None or name in operators]


def correct_interpreter() -> None:
    """Triton's interpreter needs corrections, which the tests have; an older checkout installs its own."""
    corrections = Path(__file__).parents[1] / "tests" / "kernels" / "interpreter.py"
    if not (Path(fastlm.__file__).parents[1] / "kernels" / "interpreter.py").exists():
        spec = importlib.util.spec_from_file_location("corrections", corrections)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.install()


def record(operators: list[str], backends: list[str], threads: int) -> Results:
    found = record_operators([name for name in operators if name in CASES], backends, threads)
    if "adamw" in operators:
        found |= record_adamw([name for name in backends if name != "triton"], threads)
    if "models" in operators and "triton" not in backends:
        found |= record_models(threads)
    return found


def differences(before: Results, after: Results) -> list[str]:
    lines = []
    for key in before | after:
        if key not in after or key not in before:
            lines.append(f"{key}: {'before' if key in before else 'after'} only")
        elif before[key] != after[key]:
            lines.append(f"{key}\n    before {before[key]}\n    after  {after[key]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record the bits of every result, and compare them with an older record."
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an older record; exit status 1 if a result differs"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="compare this record instead of running anything")
    parser.add_argument("--operators", help=f"some of {','.join([*CASES, 'adamw', 'models'])}")
    parser.add_argument("--backends", help=f"some of {','.join(BACKENDS)},triton; default: all but triton")
    parser.add_argument(
        "--threads", type=int, default=1, help="for the CPU kernels (default: 1; the bits are the same on any)"
    )
    parser.add_argument("--show", type=int, default=20, help="how many differences to print (default: 20)")
    given = parser.parse_args()
    operators = selected(given.operators and given.operators.split(","))
    backends = given.backends.split(",") if given.backends else list(BACKENDS)
    if given.results:
        written = json.loads(given.results.read_text(encoding="utf-8"))
    else:
        if "triton" in backends and os.environ.get("TRITON_INTERPRET") == "1":
            correct_interpreter()
        results = record(operators, backends, given.threads)
        setting = {"isa": fastlm.info().isa, "torch": torch.__version__, "operators": operators, "backends": backends}
        written = {"setting": setting, "results": results}
        refused = sum(value == "Unsupported" for value in results.values())
        print(f"{fastlm.__file__}: {len(results)} results on {setting['isa']}, {refused} calls refused")
    if given.out:
        given.out.write_text(json.dumps(written, indent=0) + "\n", encoding="utf-8")
    if given.compare:
        before = json.loads(given.compare.read_text(encoding="utf-8"))
        if given.operators:  # only what has been run
            run = {"training step", "generation"} if "models" in operators else set()
            run |= set(operators)
            before["results"] = {key: v for key, v in before["results"].items() if key.split(",")[0] in run}
        if before["setting"]["isa"] != written["setting"]["isa"]:
            print(f"the ISA differs: {before['setting']['isa']} before, {written['setting']['isa']} after")
        found = differences(before["results"], written["results"])
        print(f"{len(before['results'])} results before, {len(written['results'])} after: {len(found)} differ")
        print("\n".join(found[: given.show]))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
