"""Attention's gradients of the keys and values, by tiles of keys. See attention_backward.py.

Scores are transposed, (TILE_N, TILE_M), keys by queries, so that both products that follow take them from registers.
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
    find_tile,
    load_row,
    load_tile,
    locate,
    mask_scores,
    multiply,
    opaque_zero,
    rows_of,
    store_tile,
    tiles_of_queries,
    to_vectors,
    weights_of,
)
from fastlm.kernels.philox import kept, kept_each


@triton.jit
def key_gradient_tiles(
    dk,
    dv,
    k,
    v,
    first,
    begin,
    end,
    key_len,
    scaling,
    q_rows,
    dout_rows,
    lse_ptr,
    delta_ptr,
    masking,
    dropout,
    config: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(dk, dv) after tiles begin … end of the queries."""
    j = first + tl.arange(0, config.TILE_N)
    scale = 1.0 if config.CAPPED else scaling.scale
    for tile in range(begin, end):
        query = tile * config.TILE_M
        i = query + tl.arange(0, config.TILE_M)
        q = load_tile(q_rows, query, config.TILE_M, config, False)
        dout = load_tile(dout_rows, query, config.TILE_M, config, False)
        # Queries beyond the end have weights of 0.
        lse = tl.load(lse_ptr + i, mask=i < q_rows.length, other=float("inf"))
        delta = tl.load(delta_ptr + i, mask=i < q_rows.length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=config.PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=config.PRECISION)
        if config.CAPPED:
            scores, slope = cap_scores(scores, scaling)
        visible = True
        if EDGE:
            scores, visible = mask_scores(
                scores, i[None, :], j[:, None], q_rows.length, key_len, scale, masking, config.MASK
            )
        weights = weights_of(scores, lse[None, :], scale, config.MASK)
        if EDGE:
            weights = tl.where(visible, weights, 0.0)
        kept_weights = weights
        if config.DROPOUT:
            keep = kept(
                dropout.seed, i, first, dropout.batch_head, dropout.threshold, config.TILE_M, config.TILE_N, True
            )
            kept_weights = tl.where(keep, weights * dropout.keep_scale, 0.0)
            dweights = tl.where(keep, dweights * dropout.keep_scale, 0.0)
        dscores = weights * (dweights - delta[None, :])
        if config.CAPPED:
            dscores *= slope
        if EDGE:
            dscores = tl.where(visible, dscores, 0.0)
        dv = multiply(kept_weights, dout, dv, config.PRECISION, EXACT)
        dk = multiply(dscores, q, dk, config.PRECISION, EXACT)
    return dk, dv


@triton.jit
def recompute_key_gradients(
    dk,
    dv,
    k,
    v,
    first,
    begin,
    end,
    query_len,
    key_len,
    scaling,
    q_rows,
    dout_rows,
    lse_ptr,
    delta_ptr,
    masking,
    dropout,
    config: tl.constexpr,
):
    """For gradients that are not finite, see attention_tiles.py."""
    j = first + tl.arange(0, config.TILE_N)
    scale = 1.0 if config.CAPPED else scaling.scale
    for query in range(begin, end):
        q = load_row(q_rows, query, config)
        dout = load_row(dout_rows, query, config)
        i = query + tl.arange(0, 1)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1)[:, None]
        if config.CAPPED:
            scores, slope = cap_scores(scores, scaling)
        scores, visible = mask_scores(scores, i[None, :], j[:, None], query_len, key_len, scale, masking, config.MASK)
        scores, visible = to_vectors(scores, visible)
        weights = weights_of(scores, tl.load(lse_ptr + query), scale, config.MASK)
        dweights = tl.sum(v.to(tl.float32) * dout[None, :], 1)
        kept_weights = weights
        if config.DROPOUT:
            keep = kept_each(dropout.seed, query, j, dropout.batch_head, dropout.threshold)
            kept_weights = tl.where(keep, weights * dropout.keep_scale, 0.0)
            dweights = tl.where(keep, dweights * dropout.keep_scale, 0.0)
        dscores = weights * (dweights - tl.load(delta_ptr + query))
        if config.CAPPED:
            dscores *= tl.sum(slope, 1)
        dv += tl.where(visible[:, None], kept_weights[:, None] * dout[None, :], 0.0)
        dk += tl.where(visible[:, None], dscores[:, None] * q[None, :], 0.0)
    return dk, dv


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
def attention_backward_key_kernel(
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
    dout_ptr,
    dout_batch_stride,
    dout_head_stride,
    dout_stride,
    lse_ptr,
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
    dk_ptr,
    dk_batch_stride,
    dk_head_stride,
    dk_stride,
    dv_ptr,
    dv_batch_stride,
    dv_head_stride,
    dv_stride,
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
    """dk and dv of one tile of keys, from all heads that share it."""
    pid = tl.program_id(0)
    num_kv_heads = num_heads // heads_per_kv_head
    if query_starts_ptr is None:
        batch, kv_head, tile = (
            pid // tiles // num_kv_heads,
            pid // tiles % num_kv_heads,
            pid % tiles,
        )  # with a causal mask the first tile has the most queries
    else:
        batch, tile = find_tile(key_starts_ptr, num_sequences, pid % tiles, TILE_N)
        kv_head = pid // tiles
        if batch >= num_sequences:
            return
    first = tile * TILE_N
    q_begin, query_len, k_begin, key_len, lower, upper = locate(
        query_starts_ptr, key_starts_ptr, batch, query_len, key_len, lower, upper
    )
    k_rows = rows_of(k_ptr, k_batch_stride, k_head_stride, k_stride, batch, kv_head, k_begin, key_len)
    v_rows = rows_of(v_ptr, v_batch_stride, v_head_stride, v_stride, batch, kv_head, k_begin, key_len)
    dk_rows = rows_of(dk_ptr, dk_batch_stride, dk_head_stride, dk_stride, batch, kv_head, k_begin, key_len)
    dv_rows = rows_of(dv_ptr, dv_batch_stride, dv_head_stride, dv_stride, batch, kv_head, k_begin, key_len)
    at = tl.cast(batch, tl.int64), tl.cast(kv_head, tl.int64)
    if key_padding_ptr is not None:
        key_padding_ptr += at[0] * key_padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, TILE_M, TILE_N, MASK, seed_ptr is not None, softcap is not None, PRECISION
    )

    k = load_tile(k_rows, first, TILE_N, config, False)
    v = load_tile(v_rows, first, TILE_N, config, False)
    dk = tl.zeros((TILE_N, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE_N, BLOCK_D), tl.float32)
    last = tl.minimum(first + TILE_N, key_len) - 1
    begin, inner, outer, end = tiles_of_queries(first, last, lower, upper, query_len, TILE_M)
    for group in range(heads_per_kv_head):
        head = tl.cast(kv_head * heads_per_kv_head + group, tl.int64)
        batch_head = batch * num_heads + kv_head * heads_per_kv_head + group
        q_rows = rows_of(q_ptr, q_batch_stride, q_head_stride, q_stride, batch, head, q_begin, query_len)
        dout_rows = rows_of(dout_ptr, dout_batch_stride, dout_head_stride, dout_stride, batch, head, q_begin, query_len)
        row = at[0] * lse_batch_stride + head * lse_head_stride + q_begin
        mask_at = None if MASK == 0 else mask_ptr + at[0] * mask_batch_stride + head * mask_head_stride
        inputs = (
            key_len,
            Scaling(scale, softcap),
            q_rows,
            dout_rows,
            lse_ptr + row,
            delta_ptr + row,
            Masking(lower, upper, mask_at, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride),
            Dropout(seed, batch_head, threshold, keep_scale),
        )
        if MASK != 0 or key_padding_ptr is not None:
            dk, dv = key_gradient_tiles(dk, dv, k, v, first, begin, end, *inputs, config, EXACT, True)
        else:
            dk, dv = key_gradient_tiles(dk, dv, k, v, first, begin, inner, *inputs, config, EXACT, True)
            dk, dv = key_gradient_tiles(dk, dv, k, v, first, inner, outer, *inputs, config, EXACT, False)
            if HAS_LOWER:
                dk, dv = key_gradient_tiles(dk, dv, k, v, first, outer, end, *inputs, config, EXACT, True)
    found = tl.maximum(any_not_finite(dk), any_not_finite(dv))
    if found > 0:
        zero = opaque_zero(found)
        k = load_tile(Rows(k_rows.ptr, k_stride + zero, key_len), first + zero, TILE_N, config, False)
        v = load_tile(Rows(v_rows.ptr, v_stride + zero, key_len), first + zero, TILE_N, config, False)
        dk = tl.zeros((TILE_N, BLOCK_D), tl.float32)
        dv = tl.zeros((TILE_N, BLOCK_D), tl.float32)
        for group in range(heads_per_kv_head):
            head = tl.cast(kv_head * heads_per_kv_head + group, tl.int64)
            batch_head = batch * num_heads + kv_head * heads_per_kv_head + group
            q_rows = rows_of(q_ptr, q_batch_stride, q_head_stride, q_stride, batch, head, q_begin, query_len)
            dout_rows = rows_of(
                dout_ptr, dout_batch_stride, dout_head_stride, dout_stride, batch, head, q_begin, query_len
            )
            row = at[0] * lse_batch_stride + head * lse_head_stride + q_begin + zero
            mask_at = None if MASK == 0 else mask_ptr + at[0] * mask_batch_stride + head * mask_head_stride
            dk, dv = recompute_key_gradients(
                dk,
                dv,
                k,
                v,
                first + zero,
                begin * TILE_M,
                tl.minimum(end * TILE_M, query_len),
                query_len + zero,
                key_len + zero,
                Scaling(scale, softcap),
                Rows(q_rows.ptr, q_stride + zero, query_len),
                Rows(dout_rows.ptr, dout_stride + zero, query_len),
                lse_ptr + row,
                delta_ptr + row,
                Masking(lower, upper, mask_at, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride),
                Dropout(seed, batch_head, threshold, keep_scale),
                config,
            )
    store_tile(dk_rows, first, dk * scale, TILE_N, config)
    store_tile(dv_rows, first, dv, TILE_N, config)
