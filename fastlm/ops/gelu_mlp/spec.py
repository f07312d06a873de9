"""The calls of gelu_mlp, forward and backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.linear.spec import out_width

APPROXIMATIONS = ("none", "tanh")
RECOMPUTE_LEVELS = (0, 1, 2)


class Sizes(NamedTuple):
    rows: int
    in_width: int
    hidden_width: int
    out_width: int
    conv1d: bool


def sizes(x: Tensor, w1: Tensor, w2: Tensor, layout: str) -> Sizes:
    in_width = x.shape[-1]
    rows = x.numel() // in_width
    return Sizes(rows, in_width, out_width(w1, layout), out_width(w2, layout), layout == "conv1d")


class Forward(NamedTuple):
    """Results: y; hidden = x W1 + b1 unless recompute is 2; gelu(hidden) if recompute is 0."""

    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    approximate: str
    layout: str
    recompute: int

    @property
    def conv1d(self) -> bool:
        return self.layout == "conv1d"

    @property
    def tanh(self) -> bool:
        return self.approximate == "tanh"

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return *self.x.shape[:-1], out_width(self.w1, self.layout)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.w1, self.w2, self.layout)

    def results_present(self) -> tuple[bool, ...]:
        return True, self.recompute < 2, self.recompute < 1

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x = self.x
        return (
            x.new_empty(*x.shape[:-1], out_width(self.w2, self.layout)),
            x.new_empty(self.hidden_shape) if self.recompute < 2 else None,
            x.new_empty(self.hidden_shape) if self.recompute < 1 else None,
        )

    def flops(self) -> int:
        return 2 * math.prod(self.x.shape[:-1]) * (math.prod(self.w1.shape) + math.prod(self.w2.shape))

    def bytes(self) -> int:
        """Read x and the weights, write y, and write what is saved."""
        hidden = math.prod(self.hidden_shape) * self.x.dtype.itemsize
        y = math.prod(self.x.shape[:-1]) * out_width(self.w2, self.layout) * self.x.dtype.itemsize
        return self.x.nbytes + self.w1.nbytes + self.w2.nbytes + y + (2 - self.recompute) * hidden


class Backward(NamedTuple):
    """Results: the gradients of x, w1, b1, w2 and b2."""

    dy: Tensor
    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None  # only double backward reads it
    hidden: Tensor | None
    activated: Tensor | None
    approximate: str
    layout: str
    fp32_grads: bool
    needed: tuple[bool, ...]

    @property
    def conv1d(self) -> bool:
        return self.layout == "conv1d"

    @property
    def tanh(self) -> bool:
        return self.approximate == "tanh"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the gradients."""
        hidden, out = out_width(self.w1, self.layout), out_width(self.w2, self.layout)
        return self.x.shape, self.w1.shape, (hidden,), self.w2.shape, (out,)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.w1, self.w2, self.layout)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        pairs = zip(self.shapes, self.needed, strict=True)
        return tuple(self.x.new_empty(shape) if need else None for shape, need in pairs)

    def flops(self) -> int:
        rows, first, second = math.prod(self.x.shape[:-1]), math.prod(self.w1.shape), math.prod(self.w2.shape)
        recomputed = first if self.hidden is None else 0
        products = first * (self.needed[0] + self.needed[1]) + second * (any(self.needed[:3]) + self.needed[3])
        return 2 * rows * (recomputed + products)

    def bytes(self) -> int:
        """Read dy, x, the weights and what was saved, write the gradients."""
        saved = sum(t.nbytes for t in (self.hidden, self.activated) if t is not None)
        read = self.dy.nbytes + self.x.nbytes + self.w1.nbytes + self.w2.nbytes + saved
        written = sum(math.prod(shape) for shape, need in zip(self.shapes, self.needed, strict=True) if need)
        return read + written * self.x.dtype.itemsize
