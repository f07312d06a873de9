"""The calls of linear, forward and backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("linear", "conv1d")


def out_width(weight: Tensor, layout: str) -> int:
    return weight.shape[layout != "linear"]


class Sizes(NamedTuple):
    rows: int
    in_width: int
    out_width: int
    conv1d: bool

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.in_width * self.out_width


def sizes(x: Tensor, weight: Tensor, layout: str) -> Sizes:
    in_width = x.shape[-1]
    return Sizes(x.numel() // in_width, in_width, out_width(weight, layout), layout == "conv1d")


class Forward(NamedTuple):
    """Result: y."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    layout: str

    @property
    def conv1d(self) -> bool:
        return self.layout == "conv1d"

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.weight, self.layout)

    def results_present(self) -> tuple[bool, ...]:
        return (True,)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        return (self.x.new_empty(*self.x.shape[:-1], out_width(self.weight, self.layout)),)

    def flops(self) -> int:
        return 2 * math.prod(self.x.shape[:-1]) * math.prod(self.weight.shape)

    def bytes(self) -> int:
        """Read x, the weight and the bias, write y."""
        rows = math.prod(self.x.shape[:-1])
        y = rows * out_width(self.weight, self.layout) * self.x.dtype.itemsize
        return self.x.nbytes + self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes) + y


class Backward(NamedTuple):
    """Results: the gradients of x, weight and bias."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None  # only double backward reads it
    layout: str
    fp32_grads: bool
    needed: tuple[bool, ...]

    @property
    def conv1d(self) -> bool:
        return self.layout == "conv1d"

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.weight, self.layout)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x, weight = self.x, self.weight
        needs_dx, needs_dweight, needs_dbias = self.needed
        return (
            x.new_empty(x.shape) if needs_dx else None,
            weight.new_empty(weight.shape) if needs_dweight else None,
            weight.new_empty(out_width(weight, self.layout)) if needs_dbias else None,
        )

    def flops(self) -> int:
        products = self.needed[0] + self.needed[1]
        return 2 * math.prod(self.x.shape[:-1]) * math.prod(self.weight.shape) * products

    def bytes(self) -> int:
        """Each product reads two of dy, x and the weight and writes the third's gradient."""
        dx = self.dy.nbytes + self.weight.nbytes + self.x.nbytes
        dweight = self.dy.nbytes + self.x.nbytes + self.weight.nbytes
        return self.needed[0] * dx + self.needed[1] * dweight
