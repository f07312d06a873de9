"""Packed batches: the real tokens alone, one sequence after another, gathered before a model and scattered after it;
and several sequences in a row, which a caller has packed.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.core.errors import check_tensor, mismatch, shown
from fastlm.core.tracing import needs_custom_op
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


def cu_seqlens_of(positions: Tensor) -> Tensor:
    """Where the sequences of packed rows begin, and the end: (sequences + 1,), int32.

    Args:
        positions: (batch, tokens): the position of each token in its sequence, 0 at the beginning of each row.
    """
    begins = (positions.flatten() == 0).nonzero()[:, 0]  # on a GPU this synchronises
    return F.pad(begins, (0, 1), value=positions.numel()).int()


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Checks the boundaries of the sequences in (batch, tokens); returns them in int32.

    Shape, dtype and device are checked everywhere, values on a CPU only: reading them on a GPU would synchronise.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < batch + 1:
        expected = f"shape (sequences + 1,) with at least {batch} sequences, as no sequence crosses rows"
        raise mismatch("cu_seqlens", expected, tuple(cu_seqlens.shape))
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise mismatch("cu_seqlens", "dtype torch.int32 or torch.int64", cu_seqlens.dtype)
    if cu_seqlens.device != device:
        raise mismatch("cu_seqlens", f"a tensor on {device}, as the model", cu_seqlens.device)
    if device.type == "cpu" and not needs_custom_op(cu_seqlens):
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != batch * tokens or (cu_seqlens.diff() < 0).any():
            raise mismatch("cu_seqlens", f"ascending values from 0 to {batch * tokens}", shown_values(cu_seqlens))
        if not torch.isin(torch.arange(0, batch * tokens, tokens), cu_seqlens).all():
            expected = f"a sequence that begins at each row, at multiples of {tokens}"
            raise mismatch("cu_seqlens", expected, shown_values(cu_seqlens))
    return cu_seqlens.int()


def shown_values(values: Tensor) -> str:
    return str(values.tolist()) if len(values) <= 16 else f"{values[:16].tolist()} and {len(values) - 16} more"


def positions_of(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """The position of each token in its sequence: (batch, tokens), int64."""
    index = torch.arange(batch * tokens, device=cu_seqlens.device)
    begins = cu_seqlens[torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True) - 1]
    return (index - begins).view(batch, tokens)


def check_alone(**others: object) -> None:
    """Arguments that packed sequences exclude must not be given."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise mismatch(name, "none with cu_seqlens", shown(value))
