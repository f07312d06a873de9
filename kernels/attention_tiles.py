"""What the passes of attention share: where a sequence lies, which keys a tile of queries sees, scores with everything that masks them, and
the way around matrix units for a NaN behind the mask, which must not get out.

A pass walks over tiles from the first to the last that is seen at all: empty tiles are skipped. Tiles that the band (lower ≤ j − i ≤ upper) cuts and those
that reach over the end of the keys are the edges, and only they compare positions; with a mask or padding every tile is an edge.

A product adds 0 · NaN for a value that a weight of 0 should hide. So where the result of a tile is not finite it is computed again, one key or query at a
time, and what is not seen is not added. That is slow, and happens only where there is a NaN or an infinity.
"""

import triton
import triton.language as tl

from fastlm.kernels.philox import kept_each

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(cu_ptr, batch, length):
    """(first token, number of tokens) of a sequence: of a packed batch by its cumulative lengths, else length tokens from 0."""
    begin = batch * 0
    if cu_ptr is not None:
        begin = tl.load(cu_ptr + batch).to(tl.int32)
        length = tl.load(cu_ptr + batch + 1).to(tl.int32) - begin
    return begin.to(tl.int64), length


@triton.jit
def find_tile(cu_ptr, sequences, slot, TILE: tl.constexpr):
    """(sequence, tile) number `slot` of all tiles of a packed batch; (sequences, …) beyond the last.

    So the host need not know the lengths: it launches as many programs as there can be tiles, total // TILE + sequences, and waits for nothing.
    """
    batch = slot * 0
    tile = slot
    tiles = tile * 0
    if batch < sequences:
        tiles = tl.cdiv(tl.load(cu_ptr + 1) - tl.load(cu_ptr), TILE).to(tl.int32)
    while (batch < sequences) & (tile >= tiles):
        tile -= tiles
        batch += 1
        if batch < sequences:
            tiles = tl.cdiv(tl.load(cu_ptr + batch + 1) - tl.load(cu_ptr + batch), TILE).to(tl.int32)
    return batch, tile


@triton.jit
def check_sequence(cu_ptr, batch, total):
    """A device assert where a program's own sequence would lead it out of the tensors, which the program that checks all might notice too late."""
    begin, end = tl.load(cu_ptr + batch), tl.load(cu_ptr + batch + 1)
    tl.device_assert(
        (begin >= 0) & (begin <= end) & (end <= total),
        "cu_seqlens: expected values that never decrease, from 0 to the number of tokens",
    )


@triton.jit
def check_starts(cu_ptr, sequences, total):
    """A device assert where the cumulative lengths do not start at 0, decrease, or do not end at the number of tokens. A program of its own checks them all:
    what is wrong may leave a sequence without a tile, and so without a program. (In a program that goes on it takes registers all the way.)
    """
    AT_ONCE: tl.constexpr = 128
    tl.device_assert(tl.load(cu_ptr) == 0, "cu_seqlens: expected 0 as its first value")
    tl.device_assert(
        tl.load(cu_ptr + sequences) == total, "cu_seqlens: expected the number of tokens as its last value"
    )
    for first in range(0, sequences, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        begin = tl.load(cu_ptr + at, mask=at < sequences, other=0)
        tl.device_assert(
            begin <= tl.load(cu_ptr + at + 1, mask=at < sequences, other=0),
            "cu_seqlens: expected values that never decrease",
        )


@triton.jit
def load_tile(
    pointer,
    stride,
    first,
    length,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """(TILE, BLOCK_D) tokens from `first` on; 0 beyond the end of the sequence and of the head. The offsets within a tile are 32-bit numbers."""
    token = tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    at = pointer + tl.cast(first, tl.int64) * stride + (token[:, None] * stride + channel[None, :])
    if HEAD_DIM != BLOCK_D:
        tile = tl.load(at, mask=(token < length - first)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    elif ALL_ROWS:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(token < length - first)[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(pointer, stride, first, length, x, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    at = pointer + tl.cast(first, tl.int64) * stride + (token[:, None] * stride + channel[None, :])
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(token < length - first)[:, None] & (channel < HEAD_DIM)[None, :])


@triton.jit
def tiles_of_keys(first, last, lower, upper, key_len, TILE_N: tl.constexpr):
    """What queries first … last see: keys from `begin` to `end`, of which whole tiles from `inner` to `outer` are seen by all of them. In tiles."""
    begin = tl.maximum(first + lower, 0) // TILE_N
    end = tl.cdiv(tl.maximum(tl.minimum(last + upper + 1, key_len), 0), TILE_N)
    inner = tl.maximum(tl.cdiv(tl.maximum(last + lower, 0), TILE_N), begin)
    outer = tl.maximum(tl.minimum(first + upper + 1, key_len), 0) // TILE_N
    inner = tl.minimum(inner, end)
    return begin, inner, tl.minimum(tl.maximum(outer, inner), end), end


@triton.jit
def tiles_of_queries(first, last, lower, upper, query_len, TILE_M: tl.constexpr):
    """The same the other way round: the queries that see keys first … last. Queries beyond the end need no edge: they weigh nothing."""
    begin = tl.maximum(first - upper, 0) // TILE_M
    end = tl.cdiv(tl.maximum(tl.minimum(last - lower + 1, query_len), 0), TILE_M)
    inner = tl.maximum(tl.cdiv(tl.maximum(last - upper, 0), TILE_M), begin)
    whole = first - lower + 1
    outer = tl.where(whole >= query_len, end, tl.maximum(whole, 0) // TILE_M)
    inner = tl.minimum(inner, end)
    return begin, inner, tl.minimum(tl.maximum(outer, inner), end), end


@triton.jit
def masked(
    scores,
    i,
    j,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    padding_ptr,
    padding_stride,
    MASK: tl.constexpr,
):
    """(scores, −inf where not seen; what is seen). i and j are the positions, shaped to broadcast against each other in either order.

    With an additive mask (MASK 2) scores become scale · scores + mask; an additive −inf masks whatever stands there.
    """
    inside = (i < query_len) & (j < key_len)
    seen = (j - i >= lower) & (j - i <= upper) & inside
    if MASK == 2:
        scores *= scale
    if MASK != 0:
        at = mask_ptr + i.to(tl.int64) * mask_query_stride + j.to(tl.int64) * mask_key_stride
        if MASK == 1:
            seen = seen & (tl.load(at, mask=inside, other=0) != 0)
        else:
            bias = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            seen = seen & (bias != float("-inf"))
            scores += bias
    if padding_ptr is not None:
        seen = seen & (tl.load(padding_ptr + j.to(tl.int64) * padding_stride, mask=j < key_len, other=0) != 0)
    return tl.where(seen, scores, float("-inf")), seen


@triton.jit
def signed(x, scale):
    """x with the sign of the scale."""
    wide = x.to(tl.float32)
    return tl.where(scale < 0, -wide, wide).to(x.dtype)


@triton.jit
def any_not_finite(x):
    """1 or 0."""
    return tl.max(tl.max(tl.where(x - x == 0, 0, 1), 1), 0)


@triton.jit
def nothing(found):
    """The 0 that is found − 1. What the rare second run computes with it the compiler cannot compute before the first, and keep in registers all the while."""
    return tl.multiple_of(found - 1, 16)


@triton.jit
def load_token(pointer, stride, token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) one token in float32."""
    channel = tl.arange(0, BLOCK_D)
    return tl.load(pointer + tl.cast(token, tl.int64) * stride + channel, mask=channel < HEAD_DIM, other=0.0).to(
        tl.float32
    )


@triton.jit
def column(scores, seen):
    """(ROWS, 1) as vectors. By a sum of one number each: Triton before 3.9 spreads what it reshapes otherwise over the threads, and then holds all twice."""
    return tl.sum(scores, 1), tl.max(seen.to(tl.int32), 1) > 0


@triton.jit
def key_by_key(
    q,
    i,
    begin,
    end,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    unit,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    padding_ptr,
    padding_stride,
    seed,
    third,
    threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The forward of queries i and keys begin … end without matrix units, where only what is seen is ever added."""
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    for key in range(begin, end):
        if DROPOUT:
            keep = kept_each(seed, i, key, third, threshold)
        k = load_token(k_ptr, k_stride, key, HEAD_DIM, BLOCK_D)
        v = load_token(v_ptr, v_stride, key, HEAD_DIM, BLOCK_D)
        j = key + tl.arange(0, 1)
        scores, seen = masked(
            tl.sum(q.to(tl.float32) * k[None, :], 1)[:, None],
            i[:, None],
            j[None, :],
            query_len,
            key_len,
            lower,
            upper,
            scale,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            padding_ptr,
            padding_stride,
            MASK,
        )
        scores, seen = column(scores, seen)
        new_top = tl.maximum(top, scores)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((scores - base) * unit)
        decay = tl.exp2((top - base) * unit)
        norm = norm * decay + weights
        if DROPOUT:
            weights = tl.where(keep, weights, 0.0)
        total = total * decay[:, None] + tl.where(seen[:, None], weights[:, None] * v[None, :], 0.0)
        top = new_top
    return total, top, norm
