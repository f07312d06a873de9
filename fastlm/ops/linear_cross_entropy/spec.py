"""The call of linear_cross_entropy, which computes the gradients together with the losses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class Sizes(NamedTuple):
    rows: int
    width: int
    vocab: int

    @property
    def multiply_adds(self) -> int:
        """Of the logits."""
        return self.rows * self.width * self.vocab


class Settings(NamedTuple):
    """What a loss depends on besides tensors; fields of Forward."""

    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float


class Forward(NamedTuple):
    """Results: the loss of each row in float32 (float64 for float64); the needed gradients of Σ row_scale · loss."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_scale: Tensor | None  # like target, float32 (float64 for float64); None without gradients
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float  # 0: none
    fp32_grads: bool
    needed: tuple[bool, ...]  # of x, weight and bias

    def settings(self) -> Settings:
        return Settings(self.ignore_index, self.label_smoothing, self.logit_scale, self.softcap)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        width = self.x.shape[-1]
        return self.x, self.x.dtype, Sizes(self.x.numel() // width, width, self.weight.shape[0])

    def results_present(self) -> tuple[bool, ...]:
        return True, *self.needed

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x, weight = self.x, self.weight
        losses = x.new_empty(self.target.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        pairs = zip((x.shape, weight.shape, weight.shape[:1]), self.needed, strict=True)
        return losses, *(x.new_empty(shape) if need else None for shape, need in pairs)

    def flops(self) -> int:
        products = 1 + self.needed[0] + self.needed[1]
        return 2 * math.prod(self.x.shape[:-1]) * math.prod(self.weight.shape) * products

    def bytes(self) -> int:
        """Read x and the weight, write the gradients. Chunks of logits stay in the cache."""
        gradients = self.needed[0] * self.x.nbytes + self.needed[1] * self.weight.nbytes
        return self.x.nbytes + self.weight.nbytes + gradients
