"""The calls of rotary, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.tokens * self.head_dim


class Forward(NamedTuple):
    """Results: query and key, rotated."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.query, self.query.dtype, Sizes(*self.query.shape)

    def results_present(self) -> tuple[bool, ...]:
        return True, True

    def empty_results(self) -> tuple[Tensor | None, ...]:
        return self.query.new_empty(self.query.shape), self.key.new_empty(self.key.shape)

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """Read and write queries and keys; the tables are read once."""
        return 2 * (self.query.nbytes + self.key.nbytes) + self.cos.nbytes + self.sin.nbytes


class Backward(NamedTuple):
    """Results: the gradients of query and key, by the inverse rotation."""

    dquery: Tensor | None  # of the rotated query
    dkey: Tensor | None
    cos: Tensor
    sin: Tensor
    needed: tuple[bool, ...]

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        x = self.dkey if self.dquery is None else self.dquery
        assert x is not None
        return x, x.dtype, Sizes(*x.shape)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        return tuple(
            x.new_empty(x.shape) if x is not None and need else None
            for x, need in zip((self.dquery, self.dkey), self.needed, strict=True)
        )

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        upstream = sum(d.nbytes for d in (self.dquery, self.dkey) if d is not None)
        return 2 * upstream + self.cos.nbytes + self.sin.nbytes
