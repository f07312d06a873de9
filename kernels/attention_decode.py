"""Attention for few queries and many keys, as in decoding with a KV cache. It is memory-bound: k and v are read once,
with 4 FLOPs per element.

Split-K: one tile holds all queries of all heads that share a key head. The keys are cut into splits, by sizes alone, so
that one sequence fills the GPU. Each program writes the unnormalised output of its split with its row_max and row_sum,
and a second kernel combines them in a fixed order.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention import block_of, mask_kind, strides
from fastlm.kernels.attention_tiles import (
    LOG2E,
    Config,
    Dropout,
    Masking,
    Rows,
    Scaling,
    any_not_finite,
    cap_scores,
    keys_of,
    load_tile,
    mask_scores,
    multiply_rounded,
    multiply_visible,
)
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2

ROWS = 16  # queries of all heads that share a key head: the minimum of matrix units
MIN_SPLIT_SIZE = 256  # keys
MAX_PROGRAMS = 1024  # fill any GPU
MAX_SPLITS = 128


@triton.jit
def accumulate_split(
    q, i, begin, end, query_len, scaling, k_rows, v_rows, masking, dropout, config: tl.constexpr, REPAIR: tl.constexpr
):
    """(Σ weights · v, row_max, row_sum) of keys begin … end. REPAIR: see multiply_visible."""
    first_key, end_key = keys_of(i, masking.lower, masking.upper, k_rows.length)
    acc = tl.zeros((config.TILE_M, config.BLOCK_D), tl.float32)
    row_max = tl.full((config.TILE_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((config.TILE_M,), tl.float32)
    scale = 1.0 if config.CAPPED else scaling.scale
    for key in range(begin, end, config.TILE_N):
        j = key + tl.arange(0, config.TILE_N)[None, :]
        k = load_tile(k_rows, key, config.TILE_N, config, False)
        scores = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
        if config.CAPPED:
            scores, _ = cap_scores(scores, scaling)
        elif config.MASK != 2:
            scores = multiply_rounded(scores, scale)
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
            True,
            True,
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2((scores - safe_max[:, None]) * LOG2E)
        rescale = tl.exp2((row_max - safe_max) * LOG2E)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc *= rescale[:, None]
        if config.DROPOUT:
            keep = kept(
                dropout.seed, i, key, dropout.batch_head, dropout.threshold, config.TILE_M, config.TILE_N, False
            )
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_rows, key, config.TILE_N, config, False)
        if REPAIR:
            acc = multiply_visible(weights, v, visible, acc, config.PRECISION, False)
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=config.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["query_len", "key_len", "split_size", "num_splits", "lower", "upper", "threshold"])
def attention_decode_kernel(
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
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    mask_ptr,
    mask_batch_stride,
    mask_head_stride,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_batch_stride,
    key_padding_stride,
    seed_ptr,
    num_kv_heads,
    heads_per_kv_head,
    query_len,
    key_len,
    split_size,
    num_splits,
    lower,
    upper,
    scale,
    softcap,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial_out: (batch, num_heads, query_len, num_splits, head_dim), in float32.

    partial_max and partial_sum: (batch, num_heads, query_len, num_splits).
    """
    pid = tl.program_id(0)
    split, kv_head, batch = pid % num_splits, pid // num_splits % num_kv_heads, pid // num_splits // num_kv_heads
    row = tl.arange(0, ROWS)
    i, head = row % query_len, kv_head * heads_per_kv_head + row // query_len
    valid = row < heads_per_kv_head * query_len
    channel = tl.arange(0, BLOCK_D)
    at = tl.cast(batch, tl.int64), tl.cast(kv_head, tl.int64)
    k_ptr += at[0] * k_batch_stride + at[1] * k_head_stride
    v_ptr += at[0] * v_batch_stride + at[1] * v_head_stride
    if MASK != 0:
        mask_ptr += at[0] * mask_batch_stride
    if key_padding_ptr is not None:
        key_padding_ptr += at[0] * key_padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    q_at = (
        q_ptr
        + at[0] * q_batch_stride
        + (head.to(tl.int64) * q_head_stride + i.to(tl.int64) * q_stride)[:, None]
        + channel[None, :]
    )
    q = tl.load(q_at, mask=valid[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)

    begin = tl.maximum(split * split_size, tl.maximum(lower, 0) // TILE_N * TILE_N)
    end = tl.minimum(tl.minimum((split + 1) * split_size, key_len), query_len + upper)
    batch_head = batch * num_kv_heads * heads_per_kv_head + head
    config: tl.constexpr = Config(
        HEAD_DIM, BLOCK_D, ROWS, TILE_N, MASK, seed_ptr is not None, softcap is not None, PRECISION
    )
    query_lens = tl.where(valid, query_len, 0)[:, None]
    mask_at = None if MASK == 0 else mask_ptr + (head.to(tl.int64) * mask_head_stride)[:, None]
    inputs = (
        Scaling(scale, softcap),
        Rows(k_ptr, k_stride, key_len),
        Rows(v_ptr, v_stride, key_len),
        Masking(lower, upper, mask_at, mask_query_stride, mask_key_stride, key_padding_ptr, key_padding_stride),
        Dropout(seed, batch_head, threshold, keep_scale),
    )
    acc, row_max, row_sum = accumulate_split(q, i, begin, end, query_lens, *inputs, config, False)
    if any_not_finite(acc) > 0:
        acc, row_max, row_sum = accumulate_split(q, i, begin, end, query_lens, *inputs, config, True)
    acc *= keep_scale
    query = (at[0] * num_kv_heads * heads_per_kv_head + head) * query_len + i
    place = query * num_splits + split
    tl.store(
        partial_out_ptr + place[:, None] * HEAD_DIM + channel[None, :],
        acc,
        mask=valid[:, None] & (channel < HEAD_DIM)[None, :],
    )
    tl.store(partial_max_ptr + place, row_max, mask=valid)
    tl.store(partial_sum_ptr + place, row_sum, mask=valid)


@triton.jit(do_not_specialize=["query_len", "num_splits"])
def attention_decode_combine_kernel(
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    out_ptr,
    out_batch_stride,
    out_head_stride,
    out_stride,
    lse_ptr,
    num_heads,
    query_len,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Combines the splits of one query of one head to out and lse."""
    pid = tl.program_id(0).to(tl.int64)
    i, head, batch = pid % query_len, pid // query_len % num_heads, pid // query_len // num_heads
    split = tl.arange(0, NUM_SPLITS)
    channel = tl.arange(0, BLOCK_D)
    row_sum = tl.load(partial_sum_ptr + pid * num_splits + split, mask=split < num_splits, other=0.0)
    row_max = tl.load(partial_max_ptr + pid * num_splits + split, mask=split < num_splits, other=float("-inf"))
    row_max = tl.where(row_sum == 0, float("-inf"), row_max)
    max_of_splits = tl.max(row_max, 0)
    safe_max = tl.where(max_of_splits == float("-inf"), 0.0, max_of_splits)
    weight = tl.where(row_sum == 0, 0.0, tl.exp2((row_max - safe_max) * LOG2E))
    sum_of_splits = tl.sum(weight * row_sum, 0)
    inside = (split < num_splits)[:, None] & (channel < HEAD_DIM)[None, :]
    partial_out = tl.load(
        partial_out_ptr + (pid * num_splits + split)[:, None] * HEAD_DIM + channel[None, :], mask=inside, other=0.0
    )
    # A split without visible keys holds zeros, so a NaN comes from a visible key.
    out = tl.sum(partial_out * weight[:, None], 0) / tl.where(sum_of_splits == 0, 1.0, sum_of_splits)
    tl.store(
        out_ptr + batch * out_batch_stride + head * out_head_stride + i * out_stride + channel,
        out.to(out_ptr.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )
    tl.store(
        lse_ptr + pid,
        tl.where(
            sum_of_splits == 0, float("-inf"), safe_max + tl.log(tl.where(sum_of_splits == 0, 1.0, sum_of_splits))
        ),
    )


def splits_of(batch, num_kv_heads, key_len):
    """(keys of a split, number of splits), from the sizes alone."""
    wanted = max(1, min(MAX_PROGRAMS // max(1, batch * num_kv_heads), MAX_SPLITS, cdiv(key_len, MIN_SPLIT_SIZE)))
    split_size = cdiv(cdiv(key_len, wanted), MIN_SPLIT_SIZE) * MIN_SPLIT_SIZE
    return split_size, cdiv(key_len, split_size)


def serves(num_heads, num_kv_heads, query_len, key_len):
    """Whether there are few queries, and enough keys for more than one split."""
    return num_heads // num_kv_heads * query_len <= ROWS and key_len > MIN_SPLIT_SIZE


def attention_decode(
    q,
    k,
    v,
    out,
    lse,
    mask,
    key_padding,
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
    new,
):
    """As attention_forward. new(shape): a float32 tensor for the partial results."""
    batch, num_heads, num_kv_heads, query_len, key_len, head_dim = sizes
    block_d = block_of(head_dim)
    _, tile_n, warps, stages = attention_tile(architecture, "decode", q.dtype.itemsize, block_d)
    split_size, num_splits = splits_of(batch, num_kv_heads, key_len)
    queries = batch * num_heads * query_len
    partial_out, row_max, row_sum = (
        new((queries, num_splits, head_dim)),
        new((queries, num_splits)),
        new((queries, num_splits)),
    )
    arguments = (
        q,
        *strides(q, 3),
        k,
        *strides(k, 3),
        v,
        *strides(v, 3),
        partial_out,
        row_max,
        row_sum,
        mask,
        *strides(mask, 4),
        key_padding,
        *strides(key_padding, 2),
        seed,
        num_kv_heads,
        num_heads // num_kv_heads,
        query_len,
        key_len,
        split_size,
        num_splits,
        *band,
        scale,
        softcap or None,
        threshold,
        keep_scale,
    )
    constants = head_dim, block_d, ROWS, tile_n, mask_kind(mask), precision
    launch(attention_decode_kernel, batch * num_kv_heads * num_splits, arguments, constants, warps, stages, device)
    arguments = partial_out, row_max, row_sum, out, *strides(out, 3), lse, num_heads, query_len, num_splits
    launch(
        attention_decode_combine_kernel,
        queries,
        arguments,
        (head_dim, block_d, next_power_of_2(num_splits)),
        4,
        1,
        device,
    )
