"""The calls of attention, forward and backward.

A batch is dense, with tensors (batch, heads, tokens, head_dim), or packed, with tensors (tokens, heads, head_dim) and
the boundaries of its sequences in cu_seqlens.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

UNLIMITED = 2**62  # a limit of the band that no position reaches


class Sizes(NamedTuple):
    batch: int  # sequences
    heads: int
    query_len: int  # of a packed batch: tokens
    key_len: int
    head_dim: int
    packed: bool
    masked: bool
    dropout: bool
    return_lse: bool
    mask_gradient: bool
    softcap: bool


def sizes(call: "Forward | Backward", mask_gradient: bool) -> Sizes:
    query, key, cu_seqlens_q, lower, upper = call.query, call.key, call.cu_seqlens_q, call.lower, call.upper
    dropout, return_lse, softcap = call.seed is not None, call.return_lse, call.softcap > 0
    if cu_seqlens_q is not None:
        tokens, heads, head_dim = query.shape
        batch, masked = cu_seqlens_q.shape[0] - 1, lower > -UNLIMITED or upper < UNLIMITED
        shape = batch, heads, tokens, key.shape[0], head_dim
        return Sizes(*shape, True, masked, dropout, return_lse, mask_gradient, softcap)
    batch, heads, query_len, head_dim = query.shape
    key_len = key.shape[2]
    masked = call.mask is not None or call.key_padding is not None or lower > 1 - query_len or upper < key_len - 1
    shape = batch, heads, query_len, key_len, head_dim
    # In less than two thirds of the time of a call of Sizes.
    return Sizes._make((*shape, False, masked, dropout, return_lse, mask_gradient, softcap))


class Forward(NamedTuple):
    """Results: out like query; lse, the log-sum-exp of the scores of each query, in float32 (float64 for float64).

    The scores are q kᵀ · scale, or softcap · tanh(q kᵀ · scale / softcap), and then masked.
    Query i attends to key j if lower ≤ j − i ≤ upper, mask and key_padding permitting. In a packed batch the band is
    relative to the last query and key of each sequence, and to positions i and j counted from there.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # (batch or 1, heads or 1, query_len or 1, key_len or 1), bool or additive
    key_padding: Tensor | None  # (batch, key_len), bool, True = a real token
    cu_seqlens_q: Tensor | None  # (sequences + 1,) of a packed batch
    cu_seqlens_k: Tensor | None
    seed: Tensor | None  # of the dropout; None without
    scale: float
    softcap: float  # 0: none
    lower: int
    upper: int
    dropout_p: float
    return_lse: bool
    mask_gradient: bool

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.query, self.query.dtype, sizes(self, self.mask_gradient)

    def results_present(self) -> tuple[bool, ...]:
        return True, True

    def empty_results(self) -> tuple[Tensor | None, ...]:
        query, dtype = self.query, torch.promote_types(self.query.dtype, torch.float32)
        if self.cu_seqlens_q is None:
            return tokens_first(query), query.new_empty(query.shape[:3], dtype=dtype)
        return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=dtype)

    def flops(self) -> int:
        """Two products; as PyTorch counts its own attention, masked scores count too."""
        return 4 * multiply_adds(self)

    def bytes(self) -> int:
        """Read query, key and value, write out."""
        return 2 * self.query.nbytes + self.key.nbytes + self.value.nbytes


class Backward(NamedTuple):
    """Results: the gradients of query, key, value and mask."""

    dout: Tensor | None
    dlse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    key_padding: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    out: Tensor
    lse: Tensor
    scale: float
    softcap: float  # 0: none
    lower: int
    upper: int
    dropout_p: float
    return_lse: bool
    needed: tuple[bool, ...]

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.query, self.query.dtype, sizes(self, self.needed[3])

    def empty_results(self) -> tuple[Tensor | None, ...]:
        packed = self.cu_seqlens_q is not None
        inputs = zip((self.query, self.key, self.value), self.needed[:3], strict=True)
        gradients = [(x.new_empty(x.shape) if packed else tokens_first(x)) if need else None for x, need in inputs]
        return *gradients, self.mask.new_empty(self.mask.shape) if self.mask is not None and self.needed[3] else None

    def flops(self) -> int:
        """Five products, one of which recomputes the scores."""
        return 10 * multiply_adds(self)

    def bytes(self) -> int:
        """Read dout, out, query, key and value, write the gradients."""
        return 4 * self.query.nbytes + 2 * (self.key.nbytes + self.value.nbytes)


def tokens_first(x: Tensor, wanted: bool = True) -> Tensor | None:
    """An uninitialised result like x, (B, H, T, D), stored as (B, T, H, D): merging its heads is then a view."""
    if not wanted:
        return None
    _, heads, length, head_dim = x.shape
    # Half the time of a transposed view.
    return x.new_empty_strided(x.shape, (length * heads * head_dim, head_dim, heads * head_dim, 1))


def multiply_adds(call: Forward | Backward) -> int:
    """Of one product. Of a traced packed batch the lengths are unknown; equal ones are counted."""
    query, key, cu_seqlens_q, cu_seqlens_k = call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return math.prod(query.shape) * key.shape[2]
    tokens, heads, head_dim = query.shape
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        return heads * head_dim * (tokens * key.shape[0] // max(1, cu_seqlens_q.shape[0] - 1))
    pairs = zip(lengths(cu_seqlens_q), lengths(cu_seqlens_k), strict=True)
    return heads * head_dim * sum(q * k for q, k in pairs)


def lengths(cu_seqlens: Tensor) -> list[int]:
    return [end - start for start, end in itertools.pairwise(cu_seqlens.tolist())]
