"""Each operator and PyTorch's own way to compute the same, at the sizes of GPT-2 small, and what they must do at least."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Timer, timed

ROWS, WIDTH, HEADS, VOCABULARY = 1024, 768, 12, 50257  # one sequence of GPT-2's context
EPSILON = 1e-5

DIRECTIONS = ("forward", "backward", "forward+backward")
# linear_cross_entropy computes its gradients in the forward pass: its backward alone would compare nothing with something.
NO_BACKWARD_ALONE = ("linear_cross_entropy",)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass
class Case:
    operator: str
    shape: str
    ours: Function
    eager: Function  # the same arguments, the same results, by PyTorch's own operators
    inputs: Sequence[Tensor]  # those with gradients
    upstream: Sequence[Tensor]  # the gradients of the results
    forward: Work
    backward: Work
    random: bool = False  # the results of two calls differ

    def least(self, direction: str) -> Work:
        return {"forward": self.forward, "backward": self.backward, "forward+backward": self.forward + self.backward}[
            direction
        ]

    def parts(self, function: Function, direction: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        """(prepare, work): work(prepare()) is one call, of which the work counts.

        forward: without gradients, as in inference. backward: alone, of a forward pass that is in the preparation.
        """
        leaves = [x.detach().requires_grad_() for x in self.inputs]

        def forward(_):
            with torch.no_grad():
                function(*leaves)

        def graph():
            results = function(*leaves)
            return results if isinstance(results, tuple) else (results,)

        upstream = [
            u.to(result.dtype) for u, result in zip(self.upstream, graph(), strict=True)
        ]  # a loss is float32 from us, bfloat16 from PyTorch

        def backward(results):
            torch.autograd.grad(results, leaves, upstream)

        def nothing():
            return None

        return {
            "forward": (nothing, forward),
            "backward": (graph, backward),
            "forward+backward": (nothing, lambda _: backward(graph())),
        }[direction]

    def results(self, function: Function, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """What the function returns, and the gradients of `inputs`; computed in dtype, from the same numbers."""
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        return (
            *(r.detach() for r in results),
            *torch.autograd.grad(results, leaves, [u.to(r.dtype) for u, r in zip(self.upstream, results, strict=True)]),
        )

    def timer(self, function: Function, direction: str) -> Timer:
        prepare, work = self.parts(function, direction)

        def timer() -> float:
            state = prepare()
            return timed(lambda: work(state))()

        return timer


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def attention(
    dtype: torch.dtype,
    rows: int = ROWS,
    width: int = WIDTH,
    heads: int = HEADS,
    vocabulary: int = VOCABULARY,
    *,
    batch: int = 1,
    dropout_p: float = 0.0,
) -> Case:
    """Causal; query, key and value are views of one packed projection, and the gradient of the result arrives token by token, as in a model."""
    packed = normal(batch, rows, 3, heads, width // heads, dtype=dtype).permute(2, 0, 3, 1, 4)
    # Two products over the half of rows × rows that is not masked; backward computes the scores again and has two products for each of forward's.
    # Forward reads query, key and value and writes the result; backward reads these four and the gradient and writes three.
    flops, size = batch * 2 * 2 * width * rows * (rows + 1) // 2, batch * rows * width * dtype.itemsize
    sequences, dropout = f"{batch} × " * (batch > 1), f", dropout {dropout_p:g}" * (dropout_p > 0)
    return Case(
        "attention",
        f"{heads} heads of {width // heads}, {sequences}{rows} tokens, causal{dropout}",
        ours=functools.partial(fastlm.attention, causal=True, dropout_p=dropout_p),
        eager=functools.partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=dropout_p),
        inputs=packed.unbind(0),
        upstream=[normal(batch, rows, heads, width // heads, dtype=dtype).transpose(1, 2)],
        forward=Work(flops, 4 * size),
        backward=Work(5 * flops / 2, 8 * size),
        random=dropout_p > 0,
    )


def uneven(rows: int) -> list[int]:
    """The lengths of eight sequences of `rows` tokens in all, of which the longest has a quarter: padded to it, half of the batch is padding."""
    ends = [round(rows * share / 32) for share in itertools.accumulate((8, 1, 2, 3, 4, 4, 4, 6))]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def attention_varlen(
    dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH, heads: int = HEADS, vocabulary: int = VOCABULARY
) -> Case:
    """Bidirectional, as in BERT. PyTorch's own operator takes the sequences one at a time, which on a CPU is faster than padding them."""
    lengths = uneven(rows)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])

    def eager(query, key, value):
        each = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in one)) for one in each]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    packed = normal(rows, 3, heads, width // heads, dtype=dtype)
    # As attention, over the square of each sequence.
    flops, size = 2 * 2 * width * sum(length**2 for length in lengths), rows * width * dtype.itemsize
    return Case(
        "attention_varlen",
        f"{heads} heads of {width // heads}, {len(lengths)} sequences of {min(lengths)}–{max(lengths)}, {rows} tokens",
        ours=lambda query, key, value: fastlm.attention_varlen(query, key, value, cu_seqlens, cu_seqlens),
        eager=eager,
        inputs=packed.unbind(1),
        upstream=[normal(rows, heads, width // heads, dtype=dtype)],
        forward=Work(flops, 4 * size),
        backward=Work(5 * flops / 2, 8 * size),
    )


def layernorm_residual(
    dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH, heads: int = HEADS, vocabulary: int = VOCABULARY
) -> Case:
    def eager(x, residual, weight, bias):
        summed = residual + x
        return F.layer_norm(summed, (width,), weight, bias, EPSILON), summed

    # Forward reads x and the residual and writes both results, some 10 operations per element; backward reads the sum and two gradients and writes one,
    # which is that of x and of the residual.
    size = rows * width * dtype.itemsize
    return Case(
        "layernorm_residual",
        f"{rows} × {width}",
        ours=lambda x, residual, weight, bias: fastlm.layernorm_residual(x, residual, weight, bias, EPSILON),
        eager=eager,
        inputs=[
            normal(rows, width, dtype=dtype),
            normal(rows, width, dtype=dtype),
            normal(width, dtype=dtype),
            normal(width, dtype=dtype),
        ],
        upstream=[normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype)],
        forward=Work(10 * rows * width, 4 * size),
        backward=Work(16 * rows * width, 4 * size),
    )


def stored(width: int, out: int, dtype: torch.dtype, layout: str) -> Tensor:
    return normal(*((width, out) if layout == "conv1d" else (out, width)), dtype=dtype, scale=0.02)


def product(x: Tensor, weight: Tensor, bias: Tensor, layout: str) -> Tensor:
    return torch.addmm(bias, x, weight) if layout == "conv1d" else F.linear(x, weight, bias)


def gelu_mlp(
    dtype: torch.dtype,
    rows: int = ROWS,
    width: int = WIDTH,
    heads: int = HEADS,
    vocabulary: int = VOCABULARY,
    *,
    approximate: str = "tanh",
    layout: str = "conv1d",
) -> Case:
    """As in GPT-2: the tanh GELU, weights stored (in, out), everything that backward wants saved."""
    hidden = 4 * width

    def ours(x, w1, b1, w2, b2):
        return fastlm.gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, layout=layout, recompute=0)

    def eager(x, w1, b1, w2, b2):
        return product(F.gelu(product(x, w1, b1, layout), approximate=approximate), w2, b2, layout)

    # Two products, in backward two for each of them. The hidden values stay in the cache at best; backward reads both sides of the GELU.
    flops, weights = 2 * 2 * rows * width * hidden, 2 * width * hidden
    return Case(
        "gelu_mlp",
        f"{rows} × {width} → {hidden} → {width}{of_linear(layout)}",
        ours=ours,
        eager=eager,
        inputs=[
            normal(rows, width, dtype=dtype),
            stored(width, hidden, dtype, layout),
            normal(hidden, dtype=dtype),
            stored(hidden, width, dtype, layout),
            normal(width, dtype=dtype),
        ],
        upstream=[normal(rows, width, dtype=dtype)],
        forward=Work(flops, (weights + 2 * rows * width) * dtype.itemsize),
        backward=Work(2 * flops, (2 * weights + rows * (3 * width + 2 * hidden)) * dtype.itemsize),
    )


def of_linear(layout: str) -> str:
    return ", weights as nn.Linear stores them" * (layout == "linear")


def linear(
    dtype: torch.dtype,
    rows: int = ROWS,
    width: int = WIDTH,
    heads: int = HEADS,
    vocabulary: int = VOCABULARY,
    *,
    out: int | None = None,
    layout: str = "conv1d",
) -> Case:
    """GPT-2's projection before attention unless `out` says otherwise, weights stored (in, out)."""
    out = out or 3 * width
    # One product, in backward two. Forward reads x and the weight and writes the result; backward reads these and the gradient and writes two gradients.
    flops, forward = 2 * rows * width * out, rows * width + width * out + rows * out
    return Case(
        "linear",
        f"{rows} × {width} → {out}{of_linear(layout)}",
        ours=lambda x, weight, bias: fastlm.linear(x, weight, bias, layout=layout),
        eager=lambda x, weight, bias: product(x, weight, bias, layout),
        inputs=[normal(rows, width, dtype=dtype), stored(width, out, dtype, layout), normal(out, dtype=dtype)],
        upstream=[normal(rows, out, dtype=dtype)],
        forward=Work(flops, forward * dtype.itemsize),
        backward=Work(2 * flops, (forward + rows * width + width * out) * dtype.itemsize),
    )


def few_rows(dtype: torch.dtype, rows: int, width: int = WIDTH, layers: int = 4, **_: int) -> Case:
    """The products of some layers of GPT-2 one after the other, as a decode step of `rows` sequences has them: no weight is still in the core's own cache."""
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers
    inputs = {size: normal(rows, size, dtype=dtype) for size in (width, 4 * width)}

    def each(product):
        return lambda x, wide, *weights: tuple(
            product(x if weight.shape[0] == width else wide, weight) for weight in weights
        )

    # As linear(), without biases: every weight is read once, in backward read once and its gradient written.
    flops, weights = 2 * rows * sum(k * n for k, n in sizes), sum(k * n for k, n in sizes)
    forward = weights + rows * sum(k + n for k, n in sizes)
    return Case(
        "linear",
        f"{rows} × the {len(sizes)} weights of {layers} layers, {width} wide",
        ours=each(lambda x, weight: fastlm.linear(x, weight, layout="conv1d")),
        eager=each(torch.mm),
        inputs=[*inputs.values(), *(normal(k, n, dtype=dtype, scale=0.02) for k, n in sizes)],
        upstream=[normal(rows, n, dtype=dtype) for _, n in sizes],
        forward=Work(flops, forward * dtype.itemsize),
        backward=Work(2 * flops, (forward + weights + rows * sum(k for k, _ in sizes)) * dtype.itemsize),
    )


def linear_cross_entropy(
    dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH, heads: int = HEADS, vocabulary: int = VOCABULARY
) -> Case:
    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    # One product, in backward two. The logits need never reach memory: forward reads x and the weight, backward these again and writes their gradients.
    flops, read = 2 * rows * width * vocabulary, (rows + vocabulary) * width * dtype.itemsize
    return Case(
        "linear_cross_entropy",
        f"{rows} × {width} → {vocabulary}",
        ours=lambda x, weight: fastlm.linear_cross_entropy(x, weight, target),
        eager=lambda x, weight: F.cross_entropy(F.linear(x, weight), target),
        inputs=[normal(rows, width, dtype=dtype), normal(vocabulary, width, dtype=dtype, scale=0.02)],
        upstream=[torch.ones(())],
        forward=Work(flops, read),
        backward=Work(2 * flops, 2 * read),
    )


CASES = {
    case.__name__: case
    for case in (attention, attention_varlen, layernorm_residual, gelu_mlp, linear, linear_cross_entropy)
}


def at(make: Callable[..., Case], **sizes: Any) -> Callable[..., Case]:
    return lambda dtype, **others: make(dtype, **others | sizes)


# Other sizes of some; the choice between backends is measured with those above alone.
OTHERS = {
    "attention_512_tokens": at(attention, rows=512, batch=2),
    "attention_2048_tokens": at(attention, rows=2048),
    "attention_dropout": at(attention, rows=512, batch=2, dropout_p=0.1),
    "layernorm_residual_16384_rows": at(layernorm_residual, rows=16384),
    "gelu_mlp_bert": at(gelu_mlp, approximate="none", layout="linear"),
    "linear_bert": at(linear, layout="linear"),
    "linear_up": at(linear, out=4 * WIDTH),
    "linear_down": at(linear, width=4 * WIDTH, out=WIDTH),
    "linear_vocabulary": at(linear, out=VOCABULARY),
    **{f"linear_{rows}_row{'s' * (rows > 1)}": at(few_rows, rows=rows) for rows in (1, 4, 16, 64)},
}


def directions(operator: str) -> tuple[str, ...]:
    return tuple(d for d in DIRECTIONS if d != "backward" or operator not in NO_BACKWARD_ALONE)
