"""Packed batches: the real tokens alone, one sequence after another, gathered before a model and scattered after it."""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the sequences of a packed batch are, and where they were in the padded one."""

    cu_seqlens: Tensor  # (batch + 1,), int32: 0, then where each sequence ends
    index: Tensor  # (real tokens,): the position of each in batch · tokens
    batch: int
    tokens: int

    @functools.cached_property
    def padding(self) -> Tensor:
        """(batch, tokens), True for real tokens."""
        is_real = torch.zeros(self.batch * self.tokens, dtype=torch.bool, device=self.index.device)
        return is_real.index_fill_(0, self.index, True).view(self.batch, self.tokens)


def packed(padding: Tensor, real: int) -> Packed:
    """padding: (batch, tokens), True for the `real` tokens."""
    index = torch.nonzero_static(padding.flatten(), size=real)[:, 0]
    cu_seqlens = F.pad(padding.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return Packed(cu_seqlens, index, *padding.shape)


class Gather(torch.autograd.Function):
    """Rows of x by an index without repetitions, so that the backward pass does not accumulate."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy):
        return Scatter.apply(dy, ctx.saved_tensors[0], ctx.rows), None


class Scatter(torch.autograd.Function):
    """The inverse of Gather: rows that are not in the index are 0."""

    @staticmethod
    def forward(ctx, y, index, rows):
        ctx.save_for_backward(index)
        return y.new_zeros(rows, y.shape[1]).index_copy_(0, index, y)

    @staticmethod
    def backward(ctx, dx):
        return Gather.apply(dx, ctx.saved_tensors[0]), None, None


def attention_with_bias(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, bias: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """Attention of packed sequences with a bias of the scores, which attention_varlen does not take.

    Rows are padded for this operator alone.

    Args:
        query, key, value: (real tokens, heads, head_dim).
        bias: (1 or batch, heads, tokens, tokens), added to the scaled scores.

    Returns:
        (real tokens, heads, head_dim).
    """
    heads, head_dim = query.shape[1:]
    shape = packed.batch, packed.tokens, heads, head_dim
    padded = [
        Scatter.apply(x.flatten(1), packed.index, packed.batch * packed.tokens).view(shape).transpose(1, 2)
        for x in (query, key, value)
    ]
    out = attention(*padded, mask=bias, key_padding=packed.padding, scale=scale, dropout_p=dropout_p)
    return Gather.apply(out.transpose(1, 2).flatten(2).flatten(0, 1), packed.index).view(-1, heads, head_dim)
