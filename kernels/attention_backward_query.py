"""Attention's gradient of the queries, by tiles of queries, and delta = Σ out · dout − dlse, which the other gradients
read. See attention_backward.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention_tiles import (
    FLAGS,
    Config,
    Dropout,
    Heads,
    Masking,
    Scaling,
    any_not_finite,
    cap_scores,
    check_tile,
    copy_or_load_tile,
    flags_of,
    keys_of,
    load_tile,
    locate,
    mask_scores,
    multiply,
    multiply_visible,
    query_tile_of,
    rows_of,
    store_tile,
    tiles_of_keys,
    weights_of,
)
from fastlm.kernels.philox import kept


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
    copies,
    batch,
    kv_head,
    config: tl.constexpr,
    START: tl.constexpr,
    STOP: tl.constexpr,
):
    """(keys, weights, dweights, slope, visibility) of queries i and the tile of keys from `key` on.

    Weights are 0 where not visible; dweights are not. slope: the derivative of the cap.
    """
    EDGE: tl.constexpr = START or STOP
    scale = 1.0 if config.CAPPED else scaling.scale
    k = copy_or_load_tile(copies[0], batch, kv_head, k_rows, key, config.TILE_N, config, not EDGE)
    v = copy_or_load_tile(copies[1], batch, kv_head, v_rows, key, config.TILE_N, config, not EDGE)
    scores = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=config.PRECISION)
    slope = 1.0
    if config.CAPPED:
        scores, slope = cap_scores(scores, scaling)
    visible = True
    if EDGE:
        j = key + tl.arange(0, config.TILE_N)[None, :]
        first_key, end_key = keys_of(i, masking.lower, masking.upper, k_rows.length)
        scores, visible = mask_scores(
            scores,
            j,
            first_key[:, None],
            end_key[:, None],
            i[:, None],
            j,
            (i[:, None] < query_len) & (j < k_rows.length),
            k_rows.length,
            scale,
            masking,
            config.MASK,
            START,
            STOP,
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
    q,
    dout,
    lse,
    i,
    begin,
    end,
    query_len,
    scaling,
    k_rows,
    v_rows,
    masking,
    dropout,
    copies,
    batch,
    kv_head,
    config: tl.constexpr,
    HAS_LOWER: tl.constexpr,
):
    """Σ weights · dweights, which is Σ out · dout without the rounding of out and of its weights to 16 bits."""
    delta = tl.zeros((config.TILE_M,), tl.float32)
    for tile in range(begin, end):
        _, weights, dweights, _, visible = query_tile(
            q,
            dout,
            lse,
            i,
            tile * config.TILE_N,
            query_len,
            scaling,
            k_rows,
            v_rows,
            masking,
            dropout,
            copies,
            batch,
            kv_head,
            config,
            HAS_LOWER,
            True,
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
    i,
    begin,
    end,
    query_len,
    scaling,
    k_rows,
    v_rows,
    masking,
    dropout,
    copies,
    batch,
    kv_head,
    config: tl.constexpr,
    EXACT: tl.constexpr,
    START: tl.constexpr,
    STOP: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """dq after tiles begin … end of the keys. REPAIR: masked keys that are not finite are left out."""
    for tile in range(begin, end):
        k, weights, dweights, slope, visible = query_tile(
            q,
            dout,
            lse,
            i,
            tile * config.TILE_N,
            query_len,
            scaling,
            k_rows,
            v_rows,
            masking,
            dropout,
            copies,
            batch,
            kv_head,
            config,
            START,
            STOP,
        )
        dscores = weights * (dweights - delta[:, None])
        if config.CAPPED:
            dscores *= slope
        if START or STOP:
            dscores = tl.where(visible, dscores, 0.0)
        if REPAIR:
            dq = multiply_visible(dscores, k, visible, dq, config.PRECISION, EXACT)
        else:
            dq = multiply(dscores, k, dq, config.PRECISION, EXACT)
    return dq


@triton.jit
def query_gradient_tile(
    batch,
    head,
    first,
    q,
    k,
    v,
    out,
    dout,
    dq,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse_strides,
    masking,
    mask_strides,
    starts,
    dropout,
    scaling,
    num_heads,
    copies,
    kv_head,
    query_len,
    key_len,
    config: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    EXACT: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """Fills dq and delta of the queries of one head from `first` on; 1 if dq is not finite, otherwise 0."""
    q_begin, query_len, k_begin, key_len, lower, upper = locate(
        starts[0], starts[1], batch, query_len, key_len, masking.lower, masking.upper
    )
    k_rows = rows_of(k, batch, kv_head, k_begin, key_len)
    v_rows = rows_of(v, batch, kv_head, k_begin, key_len)
    row = tl.cast(batch, tl.int64) * lse_strides[0] + tl.cast(head, tl.int64) * lse_strides[1] + q_begin
    mask_ptr, padding_ptr = masking.ptr, masking.padding_ptr
    if config.MASK != 0:
        mask_ptr += tl.cast(batch, tl.int64) * mask_strides[0] + tl.cast(head, tl.int64) * mask_strides[1]
    if padding_ptr is not None:
        padding_ptr += tl.cast(batch, tl.int64) * mask_strides[2]
    masking = Masking(
        lower, upper, mask_ptr, masking.query_stride, masking.key_stride, padding_ptr, masking.padding_stride
    )
    dropout = Dropout(dropout.seed, batch * num_heads + head, dropout.threshold, dropout.keep_scale)
    inputs = query_len, scaling, k_rows, v_rows, masking, dropout, copies, batch, kv_head

    dout_tile = load_tile(rows_of(dout, batch, head, q_begin, query_len), first, config.TILE_M, config, False)
    q_tile = load_tile(rows_of(q, batch, head, q_begin, query_len), first, config.TILE_M, config, False)
    i = first + tl.arange(0, config.TILE_M)
    lse = tl.load(lse_ptr + row + i, mask=i < query_len, other=float("inf"))
    last = tl.minimum(first + config.TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, config.TILE_N)
    if REPAIR:
        delta = tl.load(delta_ptr + row + i, mask=i < query_len, other=0.0)
    else:
        if EXACT:
            delta = exact_delta(q_tile, dout_tile, lse, i, begin, end, *inputs, config, HAS_LOWER)
        else:
            out_tile = load_tile(rows_of(out, batch, head, q_begin, query_len), first, config.TILE_M, config, False)
            delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + row + i, mask=i < query_len, other=0.0)
        tl.store(delta_ptr + row + i, delta, mask=i < query_len)
    acc = tl.zeros((config.TILE_M, config.BLOCK_D), tl.float32)
    tiles = q_tile, dout_tile, lse, delta, i
    if REPAIR or config.MASK != 0 or masking.padding_ptr is not None:
        acc = query_gradient_tiles(acc, *tiles, begin, end, *inputs, config, EXACT, HAS_LOWER, True, REPAIR)
    else:
        if HAS_LOWER:
            acc = query_gradient_tiles(acc, *tiles, begin, inner, *inputs, config, EXACT, True, True, False)
        start = inner if HAS_LOWER else begin
        acc = query_gradient_tiles(acc, *tiles, start, outer, *inputs, config, EXACT, False, False, False)
        acc = query_gradient_tiles(acc, *tiles, outer, end, *inputs, config, EXACT, False, True, False)
    store_tile(rows_of(dq, batch, head, q_begin, query_len), first, acc * scaling.scale, config.TILE_M, config)
    return any_not_finite(acc)


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
        "programs",
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
    flags_ptr,
    programs,
    k_copies,
    v_copies,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """dq and delta of one tile of queries. lse, dlse and delta have the same layout.

    flags: one number for each program of the first launch. REPAIR: see attention_tiles.py. k_copies, v_copies: tensor
    descriptors for the tiles of the loop, or None.
    """
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, TILE_M, TILE_N, MASK, seed_ptr is not None, softcap is not None, PRECISION
    )
    starts = query_starts_ptr, key_starts_ptr
    tensors = (
        Heads(q_ptr, q_batch_stride, q_head_stride, q_stride),
        Heads(k_ptr, k_batch_stride, k_head_stride, k_stride),
        Heads(v_ptr, v_batch_stride, v_head_stride, v_stride),
        Heads(out_ptr, out_batch_stride, out_head_stride, out_stride),
        Heads(dout_ptr, dout_batch_stride, dout_head_stride, dout_stride),
        Heads(dq_ptr, dq_batch_stride, dq_head_stride, dq_stride),
        lse_ptr,
        dlse_ptr,
        delta_ptr,
        (lse_batch_stride, lse_head_stride),
        Masking(lower, upper, mask_ptr, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride),
        (mask_batch_stride, mask_head_stride, key_padding_batch_stride),
        starts,
        Dropout(seed, 0, threshold, keep_scale),
        Scaling(scale, softcap),
        num_heads,
        (k_copies, v_copies),
    )
    if REPAIR:
        first, any_flagged = flags_of(flags_ptr, programs)
        if any_flagged:
            for slot in range(first, tl.minimum(first + FLAGS, programs)):
                if tl.load(flags_ptr + slot) > 0:
                    batch, head, tile = query_tile_of(slot, *starts, num_sequences, num_heads, tiles, TILE_M)
                    at = batch, head, tile * TILE_M
                    kv_head = head // heads_per_kv_head
                    query_gradient_tile(*at, *tensors, kv_head, query_len, key_len, config, HAS_LOWER, EXACT, True)
    else:
        slot = tl.program_id(0)
        batch, head, tile = query_tile_of(slot, *starts, num_sequences, num_heads, tiles, TILE_M)
        if query_starts_ptr is not None:
            check_tile(slot, batch, *starts, num_sequences, query_len, key_len, tiles)
            if batch >= num_sequences:
                tl.store(flags_ptr + slot, 0.0)
                return
        at = batch, head, tile * TILE_M
        kv_head = head // heads_per_kv_head
        found = query_gradient_tile(*at, *tensors, kv_head, query_len, key_len, config, HAS_LOWER, EXACT, False)
        tl.store(flags_ptr + slot, found.to(tl.float32))
