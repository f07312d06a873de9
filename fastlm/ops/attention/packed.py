"""A packed batch as one dense call per sequence: what the backends without a kernel for packed batches do."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastlm.backends.contract import Results
from fastlm.ops.attention.spec import Backward, Forward


def check_boundaries(argument: str, cu_seqlens: Tensor, name: str, total: int) -> list[int]:
    """The values of cu_seqlens. On a GPU this synchronises."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"{argument}: expected 0 as its first value, got {starts[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        if end < start:
            raise ValueError(f"{argument}: expected values that never decrease, got {end} at [{i + 1}], after {start}")
    if starts[-1] != total:
        expected = f"{total}, the number of tokens of {name}, as its last value"
        raise ValueError(f"{argument}: expected {expected}, got {starts[-1]}")
    return starts


def boundaries(call: Forward | Backward) -> tuple[list[int], list[int]]:
    """Of the queries and of the keys, checked."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    return (
        check_boundaries("cu_seqlens_q", call.cu_seqlens_q, "query", call.query.shape[0]),
        check_boundaries("cu_seqlens_k", call.cu_seqlens_k, "key", call.key.shape[0]),
    )


def sequences(call: Forward | Backward) -> Iterator[tuple[int, slice, slice, int]]:
    """(index, its queries, its keys, what its band moves by: the last query attends to the last key)."""
    starts_q, starts_k = (itertools.pairwise(starts) for starts in boundaries(call))
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(starts_q, starts_k, strict=True)):
        yield index, slice(q0, q1), slice(k0, k1), (k1 - k0) - (q1 - q0)


def as_batch(x: Tensor, tokens: slice) -> Tensor:
    """Some tokens of (T, H, D) as (1, H, T, D)."""
    return x[tokens].transpose(0, 1)[None]


def forward(call: Forward, dense: Callable[[Forward, int], Results]) -> Results:
    """dense(call of one sequence, its index) for each sequence."""
    query, key, value = call.query, call.key, call.value
    dtype = torch.promote_types(query.dtype, torch.float32)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=dtype)
    for index, queries, keys, offset in sequences(call):
        tensors = (
            as_batch(query, queries),
            as_batch(key, keys),
            as_batch(value, keys),
            None,
            None,
            None,
            None,
            call.seed,
        )
        band = call.lower + offset, call.upper + offset
        one = dense(Forward(*tensors, call.scale, call.softcap, *band, call.dropout_p, call.return_lse, False), index)
        out[queries], lse[:, queries] = one[0][0].transpose(0, 1), one[1][0]
    return out, lse


def backward(call: Backward, dense: Callable[[Backward, int], Results]) -> Results:
    query, key, value, out, lse = call.query, call.key, call.value, call.out, call.lse
    dout, dlse = torch.zeros_like(out) if call.dout is None else call.dout, call.dlse
    pairs = zip((query, key, value), call.needed[:3], strict=True)
    gradients = [x.new_empty(x.shape) if need else None for x, need in pairs]
    for index, queries, keys, offset in sequences(call):
        upstream = as_batch(dout, queries), None if dlse is None else dlse[None, :, queries]
        inputs = as_batch(query, queries), as_batch(key, keys), as_batch(value, keys)
        saved = None, None, None, None, call.seed, as_batch(out, queries), lse[None, :, queries]
        band = call.lower + offset, call.upper + offset
        attributes = call.scale, call.softcap, *band, call.dropout_p, call.return_lse, call.needed
        one = dense(Backward(*upstream, *inputs, *saved, *attributes), index)
        for gradient, part, tokens in zip(gradients, one[:3], (queries, keys, keys), strict=True):
            if gradient is not None and part is not None:
                gradient[tokens] = part[0].transpose(0, 1)
    return *gradients, None
