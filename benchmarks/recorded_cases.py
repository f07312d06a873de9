"""The operators' cases for record.py: calls on ordinary and odd sizes and strides, with the same numbers everywhere.

Only the public API is used: record.py runs these cases on other checkouts too.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastlm

# Inputs: the same numbers on every checkout, whatever other cases there are


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


# The operators' cases


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
        yield attention_case(f"{shape}, softcap", sizes, softcap=1.5, causal=True, tiny=tiny)
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


def glu_mlp_cases() -> Iterator[Case]:
    def case(
        rows: tuple[int, ...],
        sizes: tuple[int, int, int],
        bias: bool = True,
        halves: bool = False,
        layout: str = "contiguous",
        tiny: bool = False,
        **options: Any,
    ) -> Case:
        width, hidden, out = sizes

        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {"x": draw(*rows, width, layout=layout), "w_down": draw(out, hidden, scale=hidden**-0.5)}
            if halves:
                inputs["w_both"] = draw(2 * hidden, width, scale=width**-0.5)
            else:
                inputs |= {name: draw(hidden, width, scale=width**-0.5) for name in ("w_gate", "w_up")}
            if bias:
                inputs |= {"b_gate": draw(hidden), "b_up": draw(hidden), "b_down": draw(out)}

            def call(backend: str, w_both: Tensor | None = None, **given: Tensor) -> Tensor:
                if w_both is not None:
                    given["w_gate"], given["w_up"] = w_both.chunk(2)
                return fastlm.glu_mlp(**given, backend=backend, **options)

            return inputs, call

        parts = [f"{'x'.join(map(str, rows))}, {width} to {hidden} to {out}", "bias" if bias else "", layout]
        parts += ["halves" if halves else "", *(f"{name} {value}" for name, value in options.items())]
        return Case("glu_mlp", ", ".join(filter(None, parts)), make, tiny)

    for rows, sizes in (
        ((2,), (16, 40, 16)),
        ((3, 5), (33, 70, 41)),
        ((4, 24), (96, 256, 96)),
        ((1,), (64, 160, 64)),
        ((257,), (40, 50, 9)),
        ((130,), (450, 820, 30)),
        ((0,), (8, 16, 8)),
    ):
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            yield case(rows, sizes, activation=activation)
        for recompute in (0, 2):
            yield case(rows, sizes, bias=False, recompute=recompute)
        yield case(rows, sizes, bias=False, halves=True)
    for layout in ("transposed", "sliced", "expanded"):
        yield case((4, 9), (40, 80, 40), layout=layout)
    yield case((3,), (16, 40, 16), tiny=True)
    yield case((3,), (16, 40, 16), tiny=True, activation="gelu_tanh", recompute=2)


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
        yield case(rows, width, vocab, label_smoothing=0.1, logit_scale=2.0, softcap=3.0)
    yield case((1100,), 32, 8200, bias=True)  # several chunks of logits
    for layouts in (("transposed", "contiguous"), ("sliced", "sliced"), ("contiguous", "transposed")):
        yield case((2, 9), 40, 130, layouts=layouts)
    yield case((5,), 16, 24, bias=True, tiny=True)
    yield case((5,), 16, 24, reduction="none", label_smoothing=0.1, tiny=True)


def linear_log_prob_cases() -> Iterator[Case]:
    def case(rows: tuple[int, ...], width: int, vocab: int, tiny: bool = False, **options: Any) -> Case:
        def make(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
            inputs = {
                "x": draw(*rows, width),
                "weight": draw(vocab, width, scale=width**-0.5),
                "bias": draw(vocab),
            }
            target = draw.integers(vocab, *rows)
            target[draw.chosen(0.2, *rows)] = -100
            return inputs, lambda backend, x, weight, bias: fastlm.linear_log_prob(
                x, weight, target, bias, **options, backend=backend
            )

        parts = [f"{'x'.join(map(str, rows))} of {width}, vocabulary {vocab}"]
        parts += [f"{name} {value}" for name, value in options.items()]
        return Case("linear_log_prob", ", ".join(parts), make, tiny)

    for rows, width, vocab in (((2, 20), 48, 500), ((300,), 64, 5003), ((1,), 8, 2), ((0,), 8, 5)):
        yield case(rows, width, vocab)
        yield case(rows, width, vocab, temperature=0.7, softcap=3.0)
    yield case((1100,), 32, 8200)  # several chunks of logits
    yield case((5,), 16, 24, tiny=True, temperature=2.0)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "attention_varlen": attention_varlen_cases,
    "scaled_dot_product_attention": scaled_dot_product_attention_cases,
    "layernorm_residual": layernorm_residual_cases,
    "gelu_mlp": gelu_mlp_cases,
    "glu_mlp": glu_mlp_cases,
    "linear": linear_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "linear_log_prob": linear_log_prob_cases,
}
