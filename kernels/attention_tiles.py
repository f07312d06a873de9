"""What the attention kernels share: the boundaries of sequences, the range of keys that a tile of queries attends to,
and the masking of scores.

A kernel iterates over the visible tiles only. Edge tiles compare positions: those that the band (lower ≤ j − i ≤ upper)
or the end of the keys cuts, and every tile if there is a mask or key padding. They compare with the ends that can cut
them, START and STOP.

A matrix product adds 0 · NaN for a value whose weight is 0. A kernel therefore flags the tiles of its results that are
not finite. A second launch of the same kernel, with REPAIR, reads the flags and recomputes these tiles by
multiply_visible; without a NaN or an infinity it has nothing to do. Inside the first launch the recomputation would
take registers, and Triton before 3.8 does not compile it for sm_100.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastlm.kernels.elementary import tanh

LOG2E = tl.constexpr(1.4426950408889634)
FLAGS = tl.constexpr(16)  # that a program of the second launch reads


class Heads(NamedTuple):
    """q, k, v, out or a gradient: (batch, heads, tokens, head_dim). The elements of a row are adjacent."""

    ptr: tl.tensor
    batch_stride: tl.tensor
    head_stride: tl.tensor
    stride: tl.tensor


class Rows(NamedTuple):
    """The rows of one head of q, k, v, out or a gradient. The elements of a row are adjacent."""

    ptr: tl.tensor
    stride: tl.tensor
    length: tl.tensor


class Scaling(NamedTuple):
    """How a product q kᵀ becomes a score: scale · product, or softcap · tanh(scale · product / softcap)."""

    scale: tl.tensor
    softcap: tl.tensor


class Masking(NamedTuple):
    """What decides the visible scores of one head: lower ≤ j − i ≤ upper, the mask and the padding of the keys."""

    lower: tl.tensor
    upper: tl.tensor
    ptr: tl.tensor
    query_stride: tl.tensor
    key_stride: tl.tensor
    padding_ptr: tl.tensor
    padding_stride: tl.tensor


class Dropout(NamedTuple):
    """The counters of one head, see philox.py, and 1 / (1 − p)."""

    seed: tl.tensor
    batch_head: tl.tensor
    threshold: tl.tensor
    keep_scale: tl.tensor


class Config(NamedTuple):
    """Constants of a kernel. A tile has TILE_M queries and TILE_N keys, whose HEAD_DIM channels lie in BLOCK_D.

    MASK: 0 none, 1 bool, 2 additive. CAPPED: there is a softcap. PRECISION: of float32 products.
    """

    HEAD_DIM: tl.constexpr
    BLOCK_D: tl.constexpr
    TILE_M: tl.constexpr
    TILE_N: tl.constexpr
    MASK: tl.constexpr
    DROPOUT: tl.constexpr
    CAPPED: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def sequence_of(starts_ptr, batch, length):
    """(first token, number of tokens) of a sequence. Without starts_ptr every sequence has `length` tokens."""
    begin = batch * 0
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + batch).to(tl.int32)
        length = tl.load(starts_ptr + batch + 1).to(tl.int32) - begin
    return begin.to(tl.int64), length


@triton.jit
def find_tile(starts_ptr, num_sequences, slot, TILE: tl.constexpr):
    """(sequence, tile within it) of tile number `slot` of a packed batch; (num_sequences, …) beyond the last tile.

    The host does not know the lengths: without synchronising it launches one program for each possible tile,
    tokens // TILE + num_sequences. Each adds the tiles of 128 sequences at a time.
    """
    BLOCK: tl.constexpr = 128
    first, before = slot * 0, slot * 0  # sequences and tiles of the blocks before
    batch, tile = first + num_sequences, slot
    while (first < num_sequences) & (batch == num_sequences):
        at = first + tl.arange(0, BLOCK)
        inside = at < num_sequences
        lengths = tl.load(starts_ptr + at + 1, mask=inside, other=0) - tl.load(starts_ptr + at, mask=inside, other=0)
        ends = before + tl.cumsum(tl.cdiv(lengths, TILE).to(tl.int32), 0)
        passed = first + tl.sum((ends <= slot).to(tl.int32), 0)
        if passed < tl.minimum(first + BLOCK, num_sequences):
            batch = passed
            tile = slot - tl.max(tl.where(ends <= slot, ends, before), 0)
        before = tl.max(ends, 0)
        first += BLOCK
    return batch, tile


@triton.jit
def check_sequence(starts_ptr, batch, num_tokens):
    """Asserts that a sequence is inside the tensors, because the program of check_starts may run later."""
    begin, end = tl.load(starts_ptr + batch), tl.load(starts_ptr + batch + 1)
    tl.device_assert(
        (begin >= 0) & (begin <= end) & (end <= num_tokens),
        "cu_seqlens: expected values that never decrease, from 0 to the number of tokens",
    )


@triton.jit
def check_starts(starts_ptr, num_sequences, num_tokens):
    """Asserts that the starts begin with 0, never decrease and end with the number of tokens.

    One program does only this, because with wrong values a sequence may have no tile and no program. Inside another
    program it would take registers.
    """
    BLOCK: tl.constexpr = 128
    tl.device_assert(tl.load(starts_ptr) == 0, "cu_seqlens: expected 0 as its first value")
    tl.device_assert(
        tl.load(starts_ptr + num_sequences) == num_tokens, "cu_seqlens: expected the number of tokens as its last value"
    )
    for first in range(0, num_sequences, BLOCK):
        at = first + tl.arange(0, BLOCK)
        begin = tl.load(starts_ptr + at, mask=at < num_sequences, other=0)
        tl.device_assert(
            begin <= tl.load(starts_ptr + at + 1, mask=at < num_sequences, other=0),
            "cu_seqlens: expected values that never decrease",
        )


@triton.jit
def query_tile_of(slot, query_starts_ptr, key_starts_ptr, num_sequences, num_heads, tiles, TILE_M: tl.constexpr):
    """(sequence, head, tile of queries) of a program; the sequence is num_sequences where there is nothing to do.

    In a dense batch the last tile of a head is launched first: with a causal mask it has the most keys. In a packed
    batch the first program of each head is for check_tile().
    """
    head = slot // tiles
    if query_starts_ptr is None:
        batch, head, tile = head // num_heads, head % num_heads, tiles - 1 - slot % tiles
    else:
        batch, tile = num_sequences, slot * 0
        if slot % tiles > 0:
            batch, tile = find_tile(query_starts_ptr, num_sequences, slot % tiles - 1, TILE_M)
    return batch, head, tile


@triton.jit
def check_tile(slot, batch, query_starts_ptr, key_starts_ptr, num_sequences, query_len, key_len, tiles):
    """Asserts that the sequence is inside the tensors; the first program of a head checks all boundaries.

    query_len and key_len are the total numbers of tokens.
    """
    if slot % tiles == 0:
        check_starts(query_starts_ptr, num_sequences, query_len)
        check_starts(key_starts_ptr, num_sequences, key_len)
    elif batch < num_sequences:
        check_sequence(query_starts_ptr, batch, query_len)
        check_sequence(key_starts_ptr, batch, key_len)


@triton.jit
def locate(query_starts_ptr, key_starts_ptr, batch, query_len, key_len, lower, upper):
    """(first query, queries, first key, keys, lower, upper) of a sequence. In a packed batch the band is given relative
    to the end of each.
    """
    q_begin, query_len = sequence_of(query_starts_ptr, batch, query_len)
    k_begin, key_len = sequence_of(key_starts_ptr, batch, key_len)
    if query_starts_ptr is not None:
        lower += key_len - query_len
        upper += key_len - query_len
    return q_begin, query_len, k_begin, key_len, lower, upper


@triton.jit
def rows_of(x, batch, head, begin, length):
    """The rows of one head of one sequence."""
    offset = tl.cast(batch, tl.int64) * x.batch_stride + tl.cast(head, tl.int64) * x.head_stride
    return Rows(x.ptr + offset + begin * x.stride, x.stride, length)


@triton.jit
def load_tile(rows, first, TILE: tl.constexpr, config: tl.constexpr, ALL_ROWS: tl.constexpr):
    """(TILE, BLOCK_D) rows from `first` on, 0 beyond the sequence and the head. Tile offsets have 32 bits."""
    row = tl.arange(0, TILE)
    channel = tl.arange(0, config.BLOCK_D)
    at = rows.ptr + tl.cast(first, tl.int64) * rows.stride + (row[:, None] * rows.stride + channel[None, :])
    if config.HEAD_DIM != config.BLOCK_D:
        tile = tl.load(at, mask=(row < rows.length - first)[:, None] & (channel < config.HEAD_DIM)[None, :], other=0.0)
    elif ALL_ROWS:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(row < rows.length - first)[:, None], other=0.0)
    return tile


@triton.jit
def copy_or_load_tile(
    copies, batch, head, rows, first, TILE: tl.constexpr, config: tl.constexpr, ALL_ROWS: tl.constexpr
):
    """load_tile(), by the tensor descriptor of all heads if there is one (copies.py)."""
    if copies is not None:
        tile = copies.load([batch, head, first, 0]).reshape([TILE, config.BLOCK_D])
    else:
        tile = load_tile(rows, first, TILE, config, ALL_ROWS)
    return tile


@triton.jit
def store_tile(rows, first, x, TILE: tl.constexpr, config: tl.constexpr):
    row = tl.arange(0, TILE)
    channel = tl.arange(0, config.BLOCK_D)
    at = rows.ptr + tl.cast(first, tl.int64) * rows.stride + (row[:, None] * rows.stride + channel[None, :])
    inside = (row < rows.length - first)[:, None] & (channel < config.HEAD_DIM)[None, :]
    tl.store(at, x.to(rows.ptr.dtype.element_ty), mask=inside)


@triton.jit
def tiles_of_keys(first, last, lower, upper, key_len, TILE_N: tl.constexpr):
    """(begin, inner, outer, end), in tiles of keys.

    Queries first … last attend to keys in begin … end, and all of them to all keys in inner … outer.
    """
    begin = tl.maximum(first + lower, 0) // TILE_N
    end = tl.cdiv(tl.maximum(tl.minimum(last + upper + 1, key_len), 0), TILE_N)
    inner = tl.maximum(tl.cdiv(tl.maximum(last + lower, 0), TILE_N), begin)
    outer = tl.maximum(tl.minimum(first + upper + 1, key_len), 0) // TILE_N
    inner = tl.minimum(inner, end)
    return begin, inner, tl.minimum(tl.maximum(outer, inner), end), end


@triton.jit
def tiles_of_queries(first, last, lower, upper, query_len, TILE_M: tl.constexpr):
    """Likewise the tiles of queries that attend to keys first … last.

    Queries beyond the end have weights of 0 and need no edge tile.
    """
    begin = tl.maximum(first - upper, 0) // TILE_M
    end = tl.cdiv(tl.maximum(tl.minimum(last - lower + 1, query_len), 0), TILE_M)
    inner = tl.maximum(tl.cdiv(tl.maximum(last - upper, 0), TILE_M), begin)
    first_full = first - lower + 1
    outer = tl.where(first_full >= query_len, end, tl.maximum(first_full, 0) // TILE_M)
    inner = tl.minimum(inner, end)
    return begin, inner, tl.minimum(tl.maximum(outer, inner), end), end


@triton.jit
def keys_of(i, lower, upper, key_len):
    """(first, end) of the keys in the band of each query."""
    return i + lower, tl.minimum(i + upper + 1, key_len)


@triton.jit
def queries_of(j, lower, upper, query_len):
    """(first, end) of the queries in whose band each key is."""
    return j - upper, tl.minimum(j - lower + 1, query_len)


@triton.jit
def mask_scores(
    scores,
    at,
    first,
    end,
    i,
    j,
    inside,
    key_len,
    scale,
    masking,
    MASK: tl.constexpr,
    START: tl.constexpr,
    STOP: tl.constexpr,
):
    """(scores, −inf where not visible; visibility). All positions broadcast against each other.

    Visible are first ≤ at, compared if START, and at < end, if STOP. The mask is read where `inside`. With an additive
    mask (MASK 2) scores become scale · scores + mask; an additive −inf masks any score.
    """
    if START:
        visible = at >= first
        if STOP:
            visible = visible & (at < end)
    else:
        visible = at < end
    if MASK != 0:
        at_mask = masking.ptr + i.to(tl.int64) * masking.query_stride + j.to(tl.int64) * masking.key_stride
        if MASK == 1:
            visible = visible & (tl.load(at_mask, mask=inside, other=0) != 0)
        else:
            bias = tl.load(at_mask, mask=inside, other=float("-inf")).to(tl.float32)
            visible = visible & (bias != float("-inf"))
            scores = tl.fma(scores, scale, bias)
    if masking.padding_ptr is not None:
        at_padding = masking.padding_ptr + j.to(tl.int64) * masking.padding_stride
        visible = visible & (tl.load(at_padding, mask=j < key_len, other=0) != 0)
    return tl.where(visible, scores, float("-inf")), visible


@triton.jit
def multiply_rounded(x, y):
    """x · y, rounded: as an fma it is not fused with an addition that follows."""
    return tl.fma(x, y, 0.0)


@triton.jit
def cap_scores(scores, scaling):
    """(softcap · tanh(scale · scores / softcap), its derivative by scale · scores). The scale of the result is 1."""
    ratio = tanh(multiply_rounded(scores, scaling.scale) / scaling.softcap)
    return multiply_rounded(ratio, scaling.softcap), 1 - ratio * ratio


@triton.jit
def any_not_finite(x):
    """1 if an element is not finite, otherwise 0."""
    return tl.max(tl.where(x - x == 0, 0, 1))


@triton.jit
def flags_of(flags_ptr, programs):
    """(first program, whether any is flagged) of the programs of the first launch that one of the second repairs."""
    first = tl.program_id(0) * FLAGS
    at = first + tl.arange(0, FLAGS)
    return first, tl.max(tl.load(flags_ptr + at, mask=at < programs, other=0.0), 0) > 0


@triton.jit
def weights_of(scores, lse, scale, MASK: tl.constexpr):
    """exp(score − log-sum-exp). lse broadcasts and is +∞ beyond the queries. The caller sets masked weights to 0.

    Scores are rounded as in the forward pass: the weight of the only visible key is exactly 1.
    """
    if MASK != 2:
        scores = multiply_rounded(scores, scale)
    return tl.exp2((scores - lse) * LOG2E)


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """acc + x y, with x rounded to the dtype of y. EXACT: the rounding error of x is multiplied too."""
    rounded = x.to(y.dtype)
    acc = tl.dot(rounded, y, acc, input_precision=PRECISION)
    if EXACT:
        acc = tl.dot((x - rounded.to(tl.float32)).to(y.dtype), y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply_visible(x, y, visible, acc, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """As multiply, where an element of x multiplies a row of y only if it is visible; elsewhere x is 0.

    Infinities and NaNs of y are multiplied apart: a sum of products is infinite if all of those that are not finite
    are infinities of the same sign.
    """
    finite = y - y == 0
    acc = multiply(x, tl.where(finite, y, 0.0), acc, PRECISION, EXACT)
    signs = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(y.dtype)
    infinities = tl.where(y == float("inf"), 1.0, tl.where(y == float("-inf"), -1.0, 0.0)).to(y.dtype)
    count = tl.dot(visible.to(y.dtype), tl.where(finite, 0.0, 1.0).to(y.dtype), input_precision=PRECISION)
    total = tl.dot(signs, infinities, input_precision=PRECISION)
    one_sign = tl.where(total == count, float("inf"), tl.where(total == -count, float("-inf"), float("nan")))
    return acc + tl.where(count == 0, 0.0, one_sign)
