"""Attention's gradients of the keys and values, by tiles of keys. See attention_backward.py.

Scores are transposed, (TILE_N, TILE_M), keys by queries, so that both products that follow take them from registers.
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
    find_tile,
    flags_of,
    load_tile,
    locate,
    mask_scores,
    multiply,
    multiply_visible,
    queries_of,
    rows_of,
    store_tile,
    tiles_of_queries,
    weights_of,
)
from fastlm.kernels.philox import kept


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
    START: tl.constexpr,
    STOP: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """(dk, dv) after tiles begin … end of the queries. REPAIR: masked queries that are not finite are left out."""
    EDGE: tl.constexpr = START or STOP
    j = first + tl.arange(0, config.TILE_N)
    if EDGE:
        first_query, end_query = queries_of(j, masking.lower, masking.upper, q_rows.length)
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
                scores,
                i[None, :],
                first_query[:, None],
                end_query[:, None],
                i[None, :],
                j[:, None],
                (i[None, :] < q_rows.length) & (j[:, None] < key_len),
                key_len,
                scale,
                masking,
                config.MASK,
                START,
                STOP,
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
        if REPAIR:
            dv = multiply_visible(kept_weights, dout, visible, dv, config.PRECISION, EXACT)
            dk = multiply_visible(dscores, q, visible, dk, config.PRECISION, EXACT)
        else:
            dv = multiply(kept_weights, dout, dv, config.PRECISION, EXACT)
            dk = multiply(dscores, q, dk, config.PRECISION, EXACT)
    return dk, dv


@triton.jit
def key_tile_of(slot, key_starts_ptr, num_sequences, num_kv_heads, tiles, TILE_N: tl.constexpr):
    """(sequence, key head, tile of keys) of a program; the sequence is num_sequences where there is nothing to do.

    The first tile of a head is launched first: with a causal mask it has the most queries.
    """
    kv_head = slot // tiles
    if key_starts_ptr is None:
        batch, kv_head, tile = kv_head // num_kv_heads, kv_head % num_kv_heads, slot % tiles
    else:
        batch, tile = find_tile(key_starts_ptr, num_sequences, slot % tiles, TILE_N)
    return batch, kv_head, tile


@triton.jit
def key_gradient_tile(
    batch,
    kv_head,
    first,
    q,
    k,
    v,
    dout,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    lse_strides,
    masking,
    mask_strides,
    starts,
    dropout,
    scaling,
    num_heads,
    heads_per_kv_head,
    query_len,
    key_len,
    config: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    EXACT: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """Fills dk and dv of the keys of one head from `first` on; 1 if a gradient is not finite, otherwise 0."""
    q_begin, query_len, k_begin, key_len, lower, upper = locate(
        starts[0], starts[1], batch, query_len, key_len, masking.lower, masking.upper
    )
    k_tile = load_tile(rows_of(k, batch, kv_head, k_begin, key_len), first, config.TILE_N, config, False)
    v_tile = load_tile(rows_of(v, batch, kv_head, k_begin, key_len), first, config.TILE_N, config, False)
    dk_acc = tl.zeros((config.TILE_N, config.BLOCK_D), tl.float32)
    dv_acc = tl.zeros((config.TILE_N, config.BLOCK_D), tl.float32)
    last = tl.minimum(first + config.TILE_N, key_len) - 1
    begin, inner, outer, end = tiles_of_queries(first, last, lower, upper, query_len, config.TILE_M)
    padding_ptr = masking.padding_ptr
    if padding_ptr is not None:
        padding_ptr += tl.cast(batch, tl.int64) * mask_strides[2]
    for group in range(heads_per_kv_head):
        head = kv_head * heads_per_kv_head + group
        mask_ptr = masking.ptr
        if config.MASK != 0:
            mask_ptr += tl.cast(batch, tl.int64) * mask_strides[0] + tl.cast(head, tl.int64) * mask_strides[1]
        row = tl.cast(batch, tl.int64) * lse_strides[0] + tl.cast(head, tl.int64) * lse_strides[1] + q_begin
        tiles = k_tile, v_tile, first
        inputs = (
            key_len,
            scaling,
            rows_of(q, batch, head, q_begin, query_len),
            rows_of(dout, batch, head, q_begin, query_len),
            lse_ptr + row,
            delta_ptr + row,
            Masking(
                lower, upper, mask_ptr, masking.query_stride, masking.key_stride, padding_ptr, masking.padding_stride
            ),
            Dropout(dropout.seed, batch * num_heads + head, dropout.threshold, dropout.keep_scale),
        )
        if REPAIR or config.MASK != 0 or masking.padding_ptr is not None:
            dk_acc, dv_acc = key_gradient_tiles(
                dk_acc, dv_acc, *tiles, begin, end, *inputs, config, EXACT, True, HAS_LOWER or REPAIR, REPAIR
            )
        else:
            dk_acc, dv_acc = key_gradient_tiles(
                dk_acc, dv_acc, *tiles, begin, inner, *inputs, config, EXACT, True, HAS_LOWER, False
            )
            dk_acc, dv_acc = key_gradient_tiles(
                dk_acc, dv_acc, *tiles, inner, outer, *inputs, config, EXACT, False, False, False
            )
            if HAS_LOWER:
                dk_acc, dv_acc = key_gradient_tiles(
                    dk_acc, dv_acc, *tiles, outer, end, *inputs, config, EXACT, False, True, False
                )
    store_tile(rows_of(dk, batch, kv_head, k_begin, key_len), first, dk_acc * scaling.scale, config.TILE_N, config)
    store_tile(rows_of(dv, batch, kv_head, k_begin, key_len), first, dv_acc, config.TILE_N, config)
    # Beyond the keys a weight may overflow.
    inside = (first + tl.arange(0, config.TILE_N) < key_len)[:, None]
    return tl.maximum(any_not_finite(tl.where(inside, dk_acc, 0.0)), any_not_finite(tl.where(inside, dv_acc, 0.0)))


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
    flags_ptr,
    programs,
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
    """dk and dv of one tile of keys, from all heads that share it.

    flags: one number for each program of the first launch. REPAIR: see attention_tiles.py.
    """
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, TILE_M, TILE_N, MASK, seed_ptr is not None, softcap is not None, PRECISION
    )
    num_kv_heads = num_heads // heads_per_kv_head
    tensors = (
        Heads(q_ptr, q_batch_stride, q_head_stride, q_stride),
        Heads(k_ptr, k_batch_stride, k_head_stride, k_stride),
        Heads(v_ptr, v_batch_stride, v_head_stride, v_stride),
        Heads(dout_ptr, dout_batch_stride, dout_head_stride, dout_stride),
        Heads(dk_ptr, dk_batch_stride, dk_head_stride, dk_stride),
        Heads(dv_ptr, dv_batch_stride, dv_head_stride, dv_stride),
        lse_ptr,
        delta_ptr,
        (lse_batch_stride, lse_head_stride),
        Masking(lower, upper, mask_ptr, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride),
        (mask_batch_stride, mask_head_stride, key_padding_batch_stride),
        (query_starts_ptr, key_starts_ptr),
        Dropout(seed, 0, threshold, keep_scale),
        Scaling(scale, softcap),
        num_heads,
        heads_per_kv_head,
        query_len,
        key_len,
    )
    if REPAIR:
        first, any_flagged = flags_of(flags_ptr, programs)
        if any_flagged:
            for slot in range(first, tl.minimum(first + FLAGS, programs)):
                if tl.load(flags_ptr + slot) > 0:
                    batch, kv_head, tile = key_tile_of(slot, key_starts_ptr, num_sequences, num_kv_heads, tiles, TILE_N)
                    key_gradient_tile(batch, kv_head, tile * TILE_N, *tensors, config, HAS_LOWER, EXACT, True)
    else:
        slot = tl.program_id(0)
        batch, kv_head, tile = key_tile_of(slot, key_starts_ptr, num_sequences, num_kv_heads, tiles, TILE_N)
        if query_starts_ptr is not None:
            if batch >= num_sequences:
                tl.store(flags_ptr + slot, 0.0)
                return
        found = key_gradient_tile(batch, kv_head, tile * TILE_N, *tensors, config, HAS_LOWER, EXACT, False)
        tl.store(flags_ptr + slot, found.to(tl.float32))
