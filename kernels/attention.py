"""Forward attention by tiles, softmax(q kᵀ · scale + mask) v, with an online softmax (Dao, 2023, arXiv:2307.08691).

4 · query_len · key_len · head_dim FLOPs per head, half of it with a causal mask. Each of q, k, v and out is transferred
once if the keys of a head stay in the L2 cache. From some hundred tokens on the kernel is compute-bound.

A program computes a tile of queries and iterates over the keys with a running maximum (row_max) and sum (row_sum) in
float32. Programs of one head are adjacent in the grid, so they share its keys in the cache. With a causal mask the tile
with the most keys is launched first. A score is scaled and rounded, as row_max is, before row_max is subtracted. The
difference is then exact; with the scale folded into a fused multiply-add it would be off by the rounding of row_max.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention_tiles import (
    LOG2E,
    Config,
    Dropout,
    Masking,
    Rows,
    Scaling,
    any_not_finite,
    cap_scores,
    load_tile,
    locate,
    mask_scores,
    multiply_rounded,
    opaque_zero,
    query_tile_of,
    recompute_rows,
    rows_of,
    store_tile,
    tiles_of_keys,
)
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def accumulate_tiles(
    acc,
    row_max,
    row_sum,
    q,
    first,
    begin,
    end,
    query_len,
    scaling,
    k_rows,
    v_rows,
    masking,
    dropout,
    config: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(Σ weights · v, running maximum, Σ weights) after tiles begin … end of the keys."""
    i = first + tl.arange(0, config.TILE_M)
    scale = 1.0 if config.CAPPED else scaling.scale
    for tile in range(begin, end):
        key = tile * config.TILE_N
        k = load_tile(k_rows, key, config.TILE_N, config, not EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
        if config.CAPPED:
            scores, _ = cap_scores(scores, scaling)
        elif config.MASK != 2:
            scores = multiply_rounded(scores, scale)
        if EDGE:
            j = key + tl.arange(0, config.TILE_N)
            scores, _ = mask_scores(
                scores, i[:, None], j[None, :], query_len, k_rows.length, scale, masking, config.MASK
            )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no visible key yet
        weights = tl.exp2((scores - safe_max[:, None]) * LOG2E)
        rescale = tl.exp2((row_max - safe_max) * LOG2E)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc *= rescale[:, None]
        if config.DROPOUT:
            keep = kept(
                dropout.seed, i, key, dropout.batch_head, dropout.threshold, config.TILE_M, config.TILE_N, False
            )
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_rows, key, config.TILE_N, config, not EDGE)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=config.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        "num_sequences",
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
    key_padding_ptr,
    key_padding_batch_stride,
    key_padding_stride,
    query_starts_ptr,
    key_starts_ptr,
    seed_ptr,
    num_sequences,
    num_heads,
    heads_per_kv_head,
    query_len,
    key_len,
    tiles,
    lower,
    upper,
    scale,
    softcap,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """MASK: 0 none, 1 bool, 2 additive. HAS_LOWER: the band has a lower edge. PRECISION: of float32 products."""
    batch, head, tile = query_tile_of(
        query_starts_ptr, key_starts_ptr, num_sequences, num_heads, query_len, key_len, tiles, TILE_M
    )
    if query_starts_ptr is not None:
        if batch >= num_sequences:
            return
    first = tile * TILE_M
    q_begin, query_len, k_begin, key_len, lower, upper = locate(
        query_starts_ptr, key_starts_ptr, batch, query_len, key_len, lower, upper
    )
    kv_head = head // heads_per_kv_head
    batch_head = batch * num_heads + head
    q_rows = rows_of(q_ptr, q_batch_stride, q_head_stride, q_stride, batch, head, q_begin, query_len)
    k_rows = rows_of(k_ptr, k_batch_stride, k_head_stride, k_stride, batch, kv_head, k_begin, key_len)
    v_rows = rows_of(v_ptr, v_batch_stride, v_head_stride, v_stride, batch, kv_head, k_begin, key_len)
    out_rows = rows_of(out_ptr, out_batch_stride, out_head_stride, out_stride, batch, head, q_begin, query_len)
    at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    lse_ptr += at[0] * lse_batch_stride + at[1] * lse_head_stride + q_begin
    if MASK != 0:
        mask_ptr += at[0] * mask_batch_stride + at[1] * mask_head_stride
    if key_padding_ptr is not None:
        key_padding_ptr += at[0] * key_padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, TILE_M, TILE_N, MASK, seed_ptr is not None, softcap is not None, PRECISION
    )
    masking = Masking(lower, upper, mask_ptr, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride)
    dropout = Dropout(seed, batch_head, threshold, keep_scale)

    q = load_tile(q_rows, first, TILE_M, config, False)
    acc = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    row_max = tl.full((TILE_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TILE_M,), tl.float32)
    last = tl.minimum(first + TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, TILE_N)
    inputs = Scaling(scale, softcap), k_rows, v_rows, masking, dropout
    if MASK != 0 or key_padding_ptr is not None:
        acc, row_max, row_sum = accumulate_tiles(
            acc, row_max, row_sum, q, first, begin, end, query_len, *inputs, config, True
        )
    else:
        if HAS_LOWER:
            acc, row_max, row_sum = accumulate_tiles(
                acc, row_max, row_sum, q, first, begin, inner, query_len, *inputs, config, True
            )
        acc, row_max, row_sum = accumulate_tiles(
            acc, row_max, row_sum, q, first, inner if HAS_LOWER else begin, outer, query_len, *inputs, config, False
        )
        acc, row_max, row_sum = accumulate_tiles(
            acc, row_max, row_sum, q, first, outer, end, query_len, *inputs, config, True
        )
    found = any_not_finite(acc)
    if found > 0:
        zero = opaque_zero(found)
        q = load_tile(Rows(q_rows.ptr, q_stride + zero, query_len), first + zero, TILE_M, config, False)
        acc, row_max, row_sum = recompute_rows(
            q,
            first + zero + tl.arange(0, TILE_M),
            begin * TILE_N + zero,
            tl.minimum(end * TILE_N, key_len),
            query_len + zero,
            Scaling(scale, softcap),
            Rows(k_rows.ptr, k_stride + zero, key_len),
            Rows(v_rows.ptr, v_stride + zero, key_len),
            masking,
            dropout,
            config,
        )
    fully_masked = row_sum == 0
    out = acc * (keep_scale / tl.where(fully_masked, 1.0, row_sum))[:, None]
    store_tile(out_rows, first, out, TILE_M, config)
    lse = tl.where(fully_masked, float("-inf"), row_max + tl.log(tl.where(fully_masked, 1.0, row_sum)))
    i = first + tl.arange(0, TILE_M)
    tl.store(lse_ptr + i, lse, mask=i < query_len)


def strides(x, rank):
    """The first strides of x, 0 where a size is 1; all 0 for None."""
    if x is None:
        return (0,) * rank
    shape, own = x.shape, x.stride()
    if 1 in shape:
        return tuple([0 if shape[i] == 1 else own[i] for i in range(rank)])
    return own[:rank]


def mask_kind(mask):
    return 0 if mask is None else 1 if mask.dtype.itemsize == 1 else 2


def block_of(head_dim):
    """The width of a tile that holds a head. Matrix units need 16 at least."""
    return max(next_power_of_2(head_dim), 16)


def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    mask,
    key_padding,
    query_starts,
    key_starts,
    seed,
    sizes,
    band,
    scale,
    softcap,
    threshold,
    keep_scale,
    precision,
    architecture,
    device,
):
    """q, out: (batch, num_heads, query_len, head_dim) with unit last stride; if packed (1, num_heads, tokens,
    head_dim).

    sizes: (batch, num_heads, num_kv_heads, query_len, key_len, head_dim); if packed, batch is the number of sequences
    and the lengths are the total numbers of tokens. band: (lower, upper), of 32 bits. lse: (batch or 1, num_heads,
    tokens). softcap: 0 for none.
    """
    batch, num_heads, num_kv_heads, query_len, key_len, head_dim = sizes
    block_d = block_of(head_dim)
    tile_m, tile_n, warps, stages = attention_tile(
        architecture,
        "forward",
        q.dtype.itemsize,
        block_d,
        mask is not None or key_padding is not None or seed is not None or query_starts is not None,
    )
    tiles = cdiv(query_len, tile_m) if query_starts is None else query_len // tile_m + batch + 1
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
        key_padding,
        *strides(key_padding, 2),
        query_starts,
        key_starts,
        seed,
        batch,
        num_heads,
        num_heads // num_kv_heads,
        query_len,
        key_len,
        tiles,
        *band,
        scale,
        softcap or None,
        threshold,
        keep_scale,
    )
    constants = (
        head_dim,
        block_d,
        tile_m,
        tile_n,
        mask_kind(mask),
        query_starts is not None or band[0] > 1 - query_len,
        precision,
    )
    programs = tiles * num_heads * (batch if query_starts is None else 1)
    launch(
        attention_forward_kernel, programs, arguments, constants, warps, stages, device, debug=query_starts is not None
    )
