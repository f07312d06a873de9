"""softmax(q kᵀ · scale + mask) v by tiles, forward (Dao, 2023, arXiv:2307.08691). 4 · query_len · key_len · head_dim FLOPs a head,
half of it with a causal mask; each of q, k, v, out once through memory if the keys of a head stay in the L2 cache, so bound by the
matrix units from some hundred tokens on.

A program owns a tile of queries and walks over the keys with a running maximum and sum (in float32). Programs of one head follow each other, so that they
share its keys in the cache, and the tile with the most keys comes first. Scores stay raw, and the scale goes into the exponent of 2: one fused
multiply-add per score. (For that the scale must be positive: the queries take its sign.)
"""

import triton
import triton.language as tl

from fastlm.kernels.attention_tiles import (
    LOG2E,
    any_not_finite,
    check_sequence,
    check_starts,
    find_tile,
    key_by_key,
    load_tile,
    masked,
    nothing,
    sequence,
    signed,
    store_tile,
    tiles_of_keys,
)
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def key_tiles(
    total,
    top,
    norm,
    q,
    first,
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
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Tiles begin … end of the keys: (Σ weights · v, running maximum, Σ weights)."""
    i = first + tl.arange(0, TILE_M)
    for tile in range(begin, end):
        key = tile * TILE_N
        k = load_tile(k_ptr, k_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, not EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if EDGE:
            j = key + tl.arange(0, TILE_N)
            scores, _ = masked(
                scores,
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
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        if MASK == 2:
            weights = tl.exp2((scores - base[:, None]) * LOG2E)  # the difference first: finfo.min is an ordinary number
        else:
            weights = tl.exp2(scores * unit - (base * unit)[:, None])
        decay = tl.exp2((top - base) * unit)
        norm = norm * decay + tl.sum(weights, 1)
        total *= decay[:, None]
        if DROPOUT:
            weights = tl.where(kept(seed, i, key, third, threshold, TILE_M, TILE_N, False), weights, 0.0)
        v = load_tile(v_ptr, v_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, not EDGE)
        total = tl.dot(weights.to(v.dtype), v, total, input_precision=PRECISION)
        top = new_top
    return total, top, norm


@triton.jit(
    do_not_specialize=[
        "sequences",
        "query_len",
        "key_len",
        "tiles",
        "lower",
        "upper",
        "threshold",
        "lse_batch_stride",
        "lse_head_stride",
    ]
)
def attention_forward_kernel(
    q_ptr,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_ptr,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_ptr,
    v_batch_stride,
    v_head_stride,
    v_stride,
    out_ptr,
    out_batch_stride,
    out_head_stride,
    out_stride,
    lse_ptr,
    lse_batch_stride,
    lse_head_stride,
    mask_ptr,
    mask_batch_stride,
    mask_head_stride,
    mask_query_stride,
    mask_key_stride,
    padding_ptr,
    padding_batch_stride,
    padding_stride,
    cu_query_ptr,
    cu_key_ptr,
    seed_ptr,
    sequences,
    heads,
    groups,
    query_len,
    key_len,
    tiles,
    lower,
    upper,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """MASK: 0 none, 1 bool, 2 additive. LEFT: the band has a lower edge. PRECISION of products of float32."""
    pid = tl.program_id(0)
    if cu_query_ptr is None:
        batch, head, tile = pid // tiles // heads, pid // tiles % heads, tiles - 1 - pid % tiles
    else:  # query_len and key_len are the numbers of all tokens, the band is relative to each sequence's own corner
        slot = pid % tiles
        if slot == 0:
            check_starts(cu_query_ptr, sequences, query_len)
            check_starts(cu_key_ptr, sequences, key_len)
            return
        batch, tile = find_tile(cu_query_ptr, sequences, slot - 1, TILE_M)
        head = pid // tiles
        if batch >= sequences:
            return
        check_sequence(cu_query_ptr, batch, query_len)
        check_sequence(cu_key_ptr, batch, key_len)
    first = tile * TILE_M
    q_begin, query_len = sequence(cu_query_ptr, batch, query_len)
    k_begin, key_len = sequence(cu_key_ptr, batch, key_len)
    if cu_query_ptr is not None:
        lower += key_len - query_len
        upper += key_len - query_len
    third = batch * heads + head
    at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // groups, tl.int64)
    q_ptr += at[0] * q_batch_stride + at[1] * q_head_stride + q_begin * q_stride
    k_ptr += at[0] * k_batch_stride + at[2] * k_head_stride + k_begin * k_stride
    v_ptr += at[0] * v_batch_stride + at[2] * v_head_stride + k_begin * v_stride
    out_ptr += at[0] * out_batch_stride + at[1] * out_head_stride + q_begin * out_stride
    lse_ptr += at[0] * lse_batch_stride + at[1] * lse_head_stride + q_begin
    if MASK != 0:
        mask_ptr += at[0] * mask_batch_stride + at[1] * mask_head_stride
    if padding_ptr is not None:
        padding_ptr += at[0] * padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    q = load_tile(q_ptr, q_stride, first, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
    q = signed(q, scale)
    size = tl.abs(scale)
    unit = (
        LOG2E if MASK == 2 else tl.maximum(size * LOG2E, 1e-37)
    )  # of a score in the exponent; never 0, which would make −inf a NaN
    total = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    top = tl.full((TILE_M,), float("-inf"), tl.float32)
    norm = tl.zeros((TILE_M,), tl.float32)
    last = tl.minimum(first + TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, TILE_N)
    if MASK != 0 or padding_ptr is not None:
        total, top, norm = key_tiles(
            total,
            top,
            norm,
            q,
            first,
            begin,
            end,
            query_len,
            key_len,
            lower,
            upper,
            size,
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
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            True,
        )
    else:
        if LEFT:
            total, top, norm = key_tiles(
                total,
                top,
                norm,
                q,
                first,
                begin,
                inner,
                query_len,
                key_len,
                lower,
                upper,
                size,
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
                HEAD_DIM,
                BLOCK_D,
                TILE_M,
                TILE_N,
                MASK,
                seed_ptr is not None,
                PRECISION,
                True,
            )
        total, top, norm = key_tiles(
            total,
            top,
            norm,
            q,
            first,
            inner if LEFT else begin,
            outer,
            query_len,
            key_len,
            lower,
            upper,
            size,
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
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            False,
        )
        total, top, norm = key_tiles(
            total,
            top,
            norm,
            q,
            first,
            outer,
            end,
            query_len,
            key_len,
            lower,
            upper,
            size,
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
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            True,
        )
    found = any_not_finite(total)
    if found > 0:
        zero = nothing(found)
        q = load_tile(q_ptr, q_stride + zero, first + zero, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        total, top, norm = key_by_key(
            signed(q, scale),
            first + zero + tl.arange(0, TILE_M),
            begin * TILE_N + zero,
            tl.minimum(end * TILE_N, key_len),
            query_len + zero,
            key_len,
            lower,
            upper,
            size,
            unit,
            k_ptr,
            k_stride + zero,
            v_ptr,
            v_stride + zero,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            padding_ptr,
            padding_stride,
            seed,
            third,
            threshold,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            MASK,
            seed_ptr is not None,
        )
    empty = norm == 0
    out = total * (keep_scale / tl.where(empty, 1.0, norm))[:, None]
    store_tile(out_ptr, out_stride, first, query_len, out, HEAD_DIM, TILE_M, BLOCK_D)
    lse = tl.where(empty, float("-inf"), (top if MASK == 2 else top * size) + tl.log(tl.where(empty, 1.0, norm)))
    i = first + tl.arange(0, TILE_M)
    tl.store(lse_ptr + i, lse, mask=i < query_len)


def strides(x, rank):
    """As if expanded: 0 where a size is 1; all 0 for None."""
    if x is None:
        return (0,) * rank
    shape, own = x.shape, x.stride()
    if 1 in shape:
        return tuple([0 if shape[i] == 1 else own[i] for i in range(rank)])
    return own[:rank]


def mask_kind(mask):
    return 0 if mask is None else 1 if mask.dtype.itemsize == 1 else 2


def block_of(head_dim):
    """The width of a tile that holds a head: matrix units multiply by 16 at least."""
    return max(next_power_of_2(head_dim), 16)


def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    mask,
    padding,
    cu_query,
    cu_key,
    seed,
    sizes,
    band,
    scale,
    threshold,
    keep_scale,
    precision,
    architecture,
    device,
):
    """q, out: (batch, heads, query_len, head_dim) with unit last stride; of packed sequences (1, heads, total, head_dim).

    sizes: (batch, heads, key_heads, query_len, key_len, head_dim), where of packed sequences the lengths are those of all together.
    band: (lower, upper), which fit into 32 bits; lse: (batch or 1, heads, tokens).
    """
    batch, heads, key_heads, query_len, key_len, head_dim = sizes
    block = block_of(head_dim)
    tile_m, tile_n, warps, stages = attention_tile(
        architecture,
        "forward",
        q.dtype.itemsize,
        block,
        mask is not None or padding is not None or seed is not None or cu_query is not None,
    )
    tiles = cdiv(query_len, tile_m) if cu_query is None else query_len // tile_m + batch + 1
    arguments = (
        q,
        *strides(q, 3),
        k,
        *strides(k, 3),
        v,
        *strides(v, 3),
        out,
        *strides(out, 3),
        lse,
        *strides(lse, 2),
        mask,
        *strides(mask, 4),
        padding,
        *strides(padding, 2),
        cu_query,
        cu_key,
        seed,
        batch,
        heads,
        heads // key_heads,
        query_len,
        key_len,
        tiles,
        *band,
        scale,
        threshold,
        keep_scale,
    )
    constants = (
        head_dim,
        block,
        tile_m,
        tile_n,
        mask_kind(mask),
        cu_query is not None or band[0] > 1 - query_len,
        precision,
    )
    programs = tiles * heads * (batch if cu_query is None else 1)
    launch(attention_forward_kernel, programs, arguments, constants, warps, stages, device, debug=cu_query is not None)
