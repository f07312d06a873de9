"""Attention's gradient of an additive mask, by tiles of the mask. See attention_backward.py."""

import triton
import triton.language as tl

from fastlm.kernels.attention_tiles import (
    Config,
    Masking,
    Rows,
    Scaling,
    cap_scores,
    keys_of,
    load_tile,
    mask_scores,
    weights_of,
)
from fastlm.kernels.philox import kept


@triton.jit(
    do_not_specialize=[
        "query_len",
        "key_len",
        "tiles_m",
        "tiles_n",
        "lower",
        "upper",
        "threshold",
        "mask_batch",
        "mask_heads",
        "batch_size",
    ]
)
def attention_backward_mask_kernel(
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
    mask_ptr,
    mask_batch_stride,
    mask_head_stride,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_batch_stride,
    key_padding_stride,
    seed_ptr,
    dmask_ptr,
    batch_size,
    num_heads,
    heads_per_kv_head,
    query_len,
    key_len,
    mask_batch,
    mask_heads,
    tiles_m,
    tiles_n,
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
    ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the gradient of an additive mask.

    dscores are summed over the dimensions that the mask was broadcast over, in the order of batch, head and query.
    ONE_ROW: the mask has one row for all queries. A mask with one column needs no kernel, because its gradient is that
    of the log-sum-exp. dmask is contiguous, in float32.
    """
    pid = tl.program_id(0)
    own_m = 1 if ONE_ROW else tiles_m  # tiles of the mask
    key, tile_m = pid % tiles_n * TILE_N, pid // tiles_n % own_m
    mask_head, mask_index = pid // tiles_n // own_m % mask_heads, pid // tiles_n // own_m // mask_heads
    j = key + tl.arange(0, TILE_N)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dmask = tl.zeros((TILE_M, TILE_N), tl.float32)
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, TILE_M, TILE_N, 2, seed_ptr is not None, softcap is not None, PRECISION
    )
    remaining_scale = 1.0 if config.CAPPED else scale
    for batch in range(mask_index, batch_size, mask_batch):
        for head in range(mask_head, num_heads, mask_heads):
            at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // heads_per_kv_head, tl.int64)
            row = (at[0] * num_heads + at[1]) * query_len
            q_rows = Rows(q_ptr + at[0] * q_batch_stride + at[1] * q_head_stride, q_stride, query_len)
            dout_rows = Rows(dout_ptr + at[0] * dout_batch_stride + at[1] * dout_head_stride, dout_stride, query_len)
            k_rows = Rows(k_ptr + at[0] * k_batch_stride + at[2] * k_head_stride, k_stride, key_len)
            v_rows = Rows(v_ptr + at[0] * v_batch_stride + at[2] * v_head_stride, v_stride, key_len)
            mask_at = mask_ptr + at[0] * mask_batch_stride + at[1] * mask_head_stride
            key_padding_at = None if key_padding_ptr is None else key_padding_ptr + at[0] * key_padding_batch_stride
            masking = Masking(
                lower, upper, mask_at, mask_query_stride, mask_key_stride, key_padding_at, key_padding_stride
            )
            for m in range(0 if ONE_ROW else tile_m, tiles_m if ONE_ROW else tile_m + 1):
                first = m * TILE_M
                i = first + tl.arange(0, TILE_M)
                q = load_tile(q_rows, first, TILE_M, config, False)
                dout = load_tile(dout_rows, first, TILE_M, config, False)
                lse = tl.load(lse_ptr + row + i, mask=i < query_len, other=float("inf"))
                delta = tl.load(delta_ptr + row + i, mask=i < query_len, other=0.0)
                k = load_tile(k_rows, key, TILE_N, config, False)
                v = load_tile(v_rows, key, TILE_N, config, False)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if config.CAPPED:
                    scores, _ = cap_scores(scores, Scaling(scale, softcap))
                first_key, end_key = keys_of(i, lower, upper, key_len)
                scores, visible = mask_scores(
                    scores,
                    j[None, :],
                    first_key[:, None],
                    end_key[:, None],
                    i[:, None],
                    j[None, :],
                    (i[:, None] < query_len) & (j[None, :] < key_len),
                    key_len,
                    remaining_scale,
                    masking,
                    config.MASK,
                    True,
                    True,
                )
                dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                if config.DROPOUT:
                    keep = kept(seed, i, key, batch * num_heads + head, threshold, TILE_M, TILE_N, False)
                    dweights = tl.where(keep, dweights * keep_scale, 0.0)
                weights = weights_of(scores, lse[:, None], remaining_scale, config.MASK)
                dmask += tl.where(visible, weights * (dweights - delta[:, None]), 0.0)
    dmask_ptr += (mask_index * mask_heads + mask_head).to(tl.int64) * (1 if ONE_ROW else query_len) * key_len
    if ONE_ROW:
        tl.store(dmask_ptr + j, tl.sum(dmask, 0), mask=j < key_len)
    else:
        i = tile_m * TILE_M + tl.arange(0, TILE_M)
        at_mask = dmask_ptr + i.to(tl.int64)[:, None] * key_len + j[None, :]
        tl.store(at_mask, dmask, mask=(i < query_len)[:, None] & (j < key_len)[None, :])
