"""Attention's gradient of the queries, by tiles of queries, and delta = Σ out · dout − dlse, which the other gradients
read. See attention_backward.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention_tiles import (
    Config,
    Dropout,
    Masking,
    Rows,
    Scaling,
    any_not_finite,
    cap_scores,
    load_row,
    load_tile,
    locate,
    mask_scores,
    multiply,
    opaque_zero,
    query_tile_of,
    rows_of,
    store_tile,
    tiles_of_keys,
    to_vectors,
    weights_of,
)
from fastlm.kernels.philox import kept, kept_each


@triton.jit
def query_tile(
    q,
    dout,
    lse,
    i,
    key,
    query_len,
    scaling,
    k_rows,
    v_rows,
    masking,
    dropout,
    config: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(keys, weights, dweights, slope, visibility) of queries i and the tile of keys from `key` on.

    Weights are 0 where not visible; dweights are not. slope: the derivative of the cap.
    """
    scale = 1.0 if config.CAPPED else scaling.scale
    k = load_tile(k_rows, key, config.TILE_N, config, not EDGE)
    v = load_tile(v_rows, key, config.TILE_N, config, not EDGE)
    scores = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=config.PRECISION)
    slope = 1.0
    if config.CAPPED:
        scores, slope = cap_scores(scores, scaling)
    visible = True
    if EDGE:
        j = key + tl.arange(0, config.TILE_N)
        scores, visible = mask_scores(
            scores, i[:, None], j[None, :], query_len, k_rows.length, scale, masking, config.MASK
        )
    weights = weights_of(scores, lse[:, None], scale, config.MASK)
    if EDGE:
        weights = tl.where(visible, weights, 0.0)
    if config.DROPOUT:
        keep = kept(dropout.seed, i, key, dropout.batch_head, dropout.threshold, config.TILE_M, config.TILE_N, False)
        dweights = tl.where(keep, dweights * dropout.keep_scale, 0.0)
    return k, weights, dweights, slope, visible


@triton.jit
def exact_delta(
    q, dout, lse, first, begin, end, query_len, scaling, k_rows, v_rows, masking, dropout, config: tl.constexpr
):
    """Σ weights · dweights, which is Σ out · dout without the rounding of out and of its weights to 16 bits."""
    delta = tl.zeros((config.TILE_M,), tl.float32)
    i = first + tl.arange(0, config.TILE_M)
    for tile in range(begin, end):
        _, weights, dweights, _, visible = query_tile(
            q, dout, lse, i, tile * config.TILE_N, query_len, scaling, k_rows, v_rows, masking, dropout, config, True
        )
        delta += tl.sum(tl.where(visible, weights * dweights, 0.0), 1)
    return delta


@triton.jit
def query_gradient_tiles(
    dq,
    q,
    dout,
    lse,
    delta,
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
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """dq after tiles begin … end of the keys."""
    i = first + tl.arange(0, config.TILE_M)
    for tile in range(begin, end):
        k, weights, dweights, slope, visible = query_tile(
            q, dout, lse, i, tile * config.TILE_N, query_len, scaling, k_rows, v_rows, masking, dropout, config, EDGE
        )
        dscores = weights * (dweights - delta[:, None])
        if config.CAPPED:
            dscores *= slope
        if EDGE:
            dscores = tl.where(visible, dscores, 0.0)
        dq = multiply(dscores, k, dq, config.PRECISION, EXACT)
    return dq


@triton.jit
def recompute_query_gradients(
    q, dout, lse, delta, i, begin, end, query_len, scaling, k_rows, v_rows, masking, dropout, config: tl.constexpr
):
    """For gradients that are not finite, see attention_tiles.py."""
    dq = tl.zeros((config.TILE_M, config.BLOCK_D), tl.float32)
    scale = 1.0 if config.CAPPED else scaling.scale
    for key in range(begin, end):
        k = load_row(k_rows, key, config)
        v = load_row(v_rows, key, config)
        j = key + tl.arange(0, 1)
        scores = tl.sum(q.to(tl.float32) * k[None, :], 1)[:, None]
        if config.CAPPED:
            scores, slope = cap_scores(scores, scaling)
        scores, visible = mask_scores(
            scores, i[:, None], j[None, :], query_len, k_rows.length, scale, masking, config.MASK
        )
        scores, visible = to_vectors(scores, visible)
        dweights = tl.sum(dout.to(tl.float32) * v[None, :], 1)
        if config.DROPOUT:
            keep = kept_each(dropout.seed, i, key, dropout.batch_head, dropout.threshold)
            dweights = tl.where(keep, dweights * dropout.keep_scale, 0.0)
        dscores = weights_of(scores, lse, scale, config.MASK) * (dweights - delta)
        if config.CAPPED:
            dscores *= tl.sum(slope, 1)
        dq += tl.where(visible[:, None], dscores[:, None] * k[None, :], 0.0)
    return dq


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
def attention_backward_query_kernel(
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
    dout_ptr,
    dout_batch_stride,
    dout_head_stride,
    dout_stride,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
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
    dq_ptr,
    dq_batch_stride,
    dq_head_stride,
    dq_stride,
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
    EXACT: tl.constexpr,
):
    """dq and delta of one tile of queries. lse, dlse and delta have the same layout."""
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
    dout_rows = rows_of(dout_ptr, dout_batch_stride, dout_head_stride, dout_stride, batch, head, q_begin, query_len)
    dq_rows = rows_of(dq_ptr, dq_batch_stride, dq_head_stride, dq_stride, batch, head, q_begin, query_len)
    at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    row = at[0] * lse_batch_stride + at[1] * lse_head_stride + q_begin
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
    inputs = query_len, Scaling(scale, softcap), k_rows, v_rows, masking, dropout

    dout = load_tile(dout_rows, first, TILE_M, config, False)
    q = load_tile(q_rows, first, TILE_M, config, False)
    i = first + tl.arange(0, TILE_M)
    lse = tl.load(lse_ptr + row + i, mask=i < query_len, other=float("inf"))
    last = tl.minimum(first + TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, TILE_N)
    if EXACT:
        delta = exact_delta(q, dout, lse, first, begin, end, *inputs, config)
    else:
        out = load_tile(out_rows, first, TILE_M, config, False)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + i, mask=i < query_len, other=0.0)
    tl.store(delta_ptr + row + i, delta, mask=i < query_len)
    dq = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    if MASK != 0 or key_padding_ptr is not None:
        dq = query_gradient_tiles(dq, q, dout, lse, delta, first, begin, end, *inputs, config, EXACT, True)
    else:
        if HAS_LOWER:
            dq = query_gradient_tiles(dq, q, dout, lse, delta, first, begin, inner, *inputs, config, EXACT, True)
        start = inner if HAS_LOWER else begin
        dq = query_gradient_tiles(dq, q, dout, lse, delta, first, start, outer, *inputs, config, EXACT, False)
        dq = query_gradient_tiles(dq, q, dout, lse, delta, first, outer, end, *inputs, config, EXACT, True)
    found = any_not_finite(dq)
    if found > 0:
        zero = opaque_zero(found)
        dq = recompute_query_gradients(
            load_tile(Rows(q_rows.ptr, q_stride + zero, query_len), first + zero, TILE_M, config, False),
            load_tile(Rows(dout_rows.ptr, dout_stride + zero, query_len), first + zero, TILE_M, config, False),
            lse,
            delta,
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
    store_tile(dq_rows, first, dq * scale, TILE_M, config)
