"""The calls of glu_mlp, forward and backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RECOMPUTE_LEVELS = (0, 1, 2)


class Sizes(NamedTuple):
    rows: int
    in_width: int
    hidden_width: int
    out_width: int


def sizes(x: Tensor, w_gate: Tensor, w_down: Tensor) -> Sizes:
    in_width = x.shape[-1]
    return Sizes(x.numel() // in_width, in_width, w_gate.shape[0], w_down.shape[0])


class Forward(NamedTuple):
    """Results: y; gate x and up x unless recompute is 2; act(gate x) · up x if recompute is 0."""

    x: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    b_down: Tensor | None
    activation: str
    recompute: int

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return *self.x.shape[:-1], self.w_gate.shape[0]

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.w_gate, self.w_down)

    def results_present(self) -> tuple[bool, ...]:
        return True, self.recompute < 2, self.recompute < 2, self.recompute < 1

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x = self.x
        hidden = (x.new_empty(self.hidden_shape) if there else None for there in self.results_present()[1:])
        return x.new_empty(*x.shape[:-1], self.w_down.shape[0]), *hidden

    def flops(self) -> int:
        weights = 2 * math.prod(self.w_gate.shape) + math.prod(self.w_down.shape)
        return 2 * math.prod(self.x.shape[:-1]) * weights

    def bytes(self) -> int:
        """Read x and the weights, write y, and write what is saved."""
        hidden = math.prod(self.hidden_shape) * self.x.dtype.itemsize
        y = math.prod(self.x.shape[:-1]) * self.w_down.shape[0] * self.x.dtype.itemsize
        saved = sum(self.results_present()[1:]) * hidden
        return self.x.nbytes + 2 * self.w_gate.nbytes + self.w_down.nbytes + y + saved


class Backward(NamedTuple):
    """Results: the gradients of x, w_gate, w_up, w_down, b_gate, b_up and b_down."""

    dy: Tensor
    x: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    b_down: Tensor | None  # only double backward reads it
    gate: Tensor | None
    up: Tensor | None
    activated: Tensor | None
    activation: str
    fp32_grads: bool
    needed: tuple[bool, ...]

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return *self.x.shape[:-1], self.w_gate.shape[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the gradients."""
        hidden, out = self.w_gate.shape[0], self.w_down.shape[0]
        return self.x.shape, self.w_gate.shape, self.w_up.shape, self.w_down.shape, (hidden,), (hidden,), (out,)

    @property
    def needs_gate(self) -> tuple[bool, bool, bool]:
        """Whether the gradients of x, w_gate and b_gate are needed."""
        return self.needed[0], self.needed[1], self.needed[4]

    @property
    def needs_up(self) -> tuple[bool, bool, bool]:
        """The same of x, w_up and b_up."""
        return self.needed[0], self.needed[2], self.needed[5]

    @property
    def needs_hidden(self) -> bool:
        """Whether the gradients of gate x and up x are needed."""
        return any(self.needs_gate) or any(self.needs_up)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.w_gate, self.w_down)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        pairs = zip(self.shapes, self.needed, strict=True)
        return tuple(self.x.new_empty(shape) if need else None for shape, need in pairs)

    def flops(self) -> int:
        rows, inner, down = math.prod(self.x.shape[:-1]), math.prod(self.w_gate.shape), math.prod(self.w_down.shape)
        recomputed = 2 * inner if self.gate is None else 0
        products = inner * (2 * self.needed[0] + self.needed[1] + self.needed[2])
        return 2 * rows * (recomputed + products + down * (self.needs_hidden + self.needed[3]))

    def bytes(self) -> int:
        """Read dy, x, the weights and what was saved, write the gradients."""
        saved = sum(t.nbytes for t in (self.gate, self.up, self.activated) if t is not None)
        read = self.dy.nbytes + self.x.nbytes + 2 * self.w_gate.nbytes + self.w_down.nbytes + saved
        written = sum(math.prod(shape) for shape, need in zip(self.shapes, self.needed, strict=True) if need)
        return read + written * self.x.dtype.itemsize
