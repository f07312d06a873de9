"""The calls of linear_log_prob, forward and backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    rows: int
    width: int
    vocab: int

    @property
    def multiply_adds(self) -> int:
        """Of the logits."""
        return self.rows * self.width * self.vocab


class Settings(NamedTuple):
    """What the results depend on besides tensors; fields of both calls."""

    ignore_index: int
    temperature: float
    softcap: float  # 0: none


class Forward(NamedTuple):
    """Results: log_prob and entropy of each row; what the backward reads: the largest logit of each row, and its sum of
    exp((logit − largest) / temperature). All are like target, in float32 (float64 for float64).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    temperature: float
    softcap: float

    def settings(self) -> Settings:
        return Settings(self.ignore_index, self.temperature, self.softcap)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.weight)

    def results_present(self) -> tuple[bool, ...]:
        return True, True, True, True

    def empty_results(self) -> tuple[Tensor | None, ...]:
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return tuple(self.x.new_empty(self.target.shape, dtype=dtype) for _ in range(4))

    def flops(self) -> int:
        return product_flops(self.x, self.weight)

    def bytes(self) -> int:
        """Read x and the weight. Chunks of logits stay in the cache."""
        return self.x.nbytes + self.weight.nbytes


class Backward(NamedTuple):
    """Results: the gradients of x, weight and bias."""

    dlog_prob: Tensor | None
    dentropy: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    entropy: Tensor
    row_max: Tensor
    row_sum: Tensor
    ignore_index: int
    temperature: float
    softcap: float
    fp32_grads: bool
    needed: tuple[bool, ...]

    def settings(self) -> Settings:
        return Settings(self.ignore_index, self.temperature, self.softcap)

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.x, self.x.dtype, sizes(self.x, self.weight)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x, weight = self.x, self.weight
        pairs = zip((x.shape, weight.shape, weight.shape[:1]), self.needed, strict=True)
        return tuple(x.new_empty(shape) if need else None for shape, need in pairs)

    def flops(self) -> int:
        """The logits are computed again."""
        return product_flops(self.x, self.weight) * (1 + self.needed[0] + self.needed[1])

    def bytes(self) -> int:
        """Read x and the weight, write the gradients."""
        gradients = self.needed[0] * self.x.nbytes + self.needed[1] * self.weight.nbytes
        return self.x.nbytes + self.weight.nbytes + gradients


def sizes(x: Tensor, weight: Tensor) -> Sizes:
    width = x.shape[-1]
    return Sizes(x.numel() // width, width, weight.shape[0])


def product_flops(x: Tensor, weight: Tensor) -> int:
    return 2 * math.prod(x.shape[:-1]) * math.prod(weight.shape)
