"""The calls of rms_norm_residual, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    rows: int
    width: int
    dropout: bool

    @property
    def elements(self) -> int:
        return self.rows * self.width


class Forward(NamedTuple):
    """Results: y; summed, None where it is x itself; rstd of each row in float32 (float64 for float64)."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    seed: Tensor | None  # of the dropout; None without
    eps: float
    dropout_p: float
    unit_offset: bool

    @property
    def stream(self) -> Tensor:
        """The tensor whose dtype the sum has."""
        return self.x if self.residual is None else self.residual

    def makes_sum(self) -> bool:
        return self.residual is not None or self.seed is not None

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        x = self.x
        width = x.shape[-1]
        return x, x.dtype, Sizes(x.numel() // width, width, self.seed is not None)

    def results_present(self) -> tuple[bool, ...]:
        return True, self.makes_sum(), True

    def empty_results(self) -> tuple[Tensor | None, ...]:
        x, statistics = self.x, torch.promote_types(self.x.dtype, torch.float32)
        summed = x.new_empty(x.shape, dtype=self.stream.dtype) if self.makes_sum() else None
        return x.new_empty(x.shape), summed, x.new_empty(x.shape[:-1], dtype=statistics)

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """Read x and the residual, write the sum and y."""
        stream = self.x.numel() * self.stream.dtype.itemsize
        return 2 * self.x.nbytes + (self.residual is not None) * stream + self.makes_sum() * stream


class Backward(NamedTuple):
    """Results: the gradients of x, residual and weight. Of the inputs only their sum was saved."""

    dy: Tensor | None
    dsummed: Tensor | None
    summed: Tensor
    weight: Tensor
    rstd: Tensor
    seed: Tensor | None
    eps: float
    dropout_p: float
    unit_offset: bool
    x_dtype: torch.dtype
    needed: tuple[bool, ...]

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        summed, width = self.summed, self.weight.shape[0]
        return summed, self.x_dtype, Sizes(summed.numel() // width, width, self.seed is not None)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        summed, weight = self.summed, self.weight
        shapes = ((summed, self.x_dtype), (summed, summed.dtype), (weight, weight.dtype))
        return tuple(
            like.new_empty(like.shape, dtype=dtype) if need else None
            for (like, dtype), need in zip(shapes, self.needed, strict=True)
        )

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """Read the upstream gradients and the sum, write the gradients of x and residual."""
        upstream = sum(d.nbytes for d in (self.dy, self.dsummed) if d is not None)
        dx = self.summed.numel() * self.x_dtype.itemsize
        return upstream + self.summed.nbytes + self.needed[0] * dx + self.needed[1] * self.summed.nbytes
