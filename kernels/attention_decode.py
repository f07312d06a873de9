"""Attention for a few queries against many keys, as in decoding with a cache: bound by reading k and v once, 4 FLOPs for each element of them.

One tile holds all queries of all heads that share a key head. The keys are cut into stretches, by sizes alone, so that one sequence still fills the
GPU; each program leaves the sum of its stretch, unscaled, with its maximum and norm, and a second kernel puts them together in order.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention import block_of, mask_kind, strides
from fastlm.kernels.attention_tiles import LOG2E, any_not_finite, key_by_key, load_tile, masked, signed
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2

ROWS = 16  # queries of all heads that share a key head: the least that matrix units multiply by
MIN_SPLIT_SIZE = 256  # keys of one stretch
MAX_PROGRAMS = 1024  # that fill any GPU
MAX_SPLITS = 128


@triton.jit
def stretch_of_keys(
    q,
    i,
    head,
    real,
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
    mask_head_stride,
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
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(Σ weights · v, maximum, Σ weights) of keys begin … end."""
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    for key in range(begin, end, TILE_N):
        j = key + tl.arange(0, TILE_N)
        k = load_tile(k_ptr, k_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        mask_at = None if MASK == 0 else mask_ptr + (head.to(tl.int64) * mask_head_stride)[:, None]
        scores, _ = masked(
            scores,
            i[:, None],
            j[None, :],
            tl.where(real, query_len, 0)[:, None],
            key_len,
            lower,
            upper,
            size,
            mask_at,
            mask_query_stride,
            mask_key_stride,
            padding_ptr,
            padding_stride,
            MASK,
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        if MASK == 2:
            weights = tl.exp2((scores - base[:, None]) * LOG2E)
        else:
            weights = tl.exp2(scores * unit - (base * unit)[:, None])
        decay = tl.exp2((top - base) * unit)
        norm = norm * decay + tl.sum(weights, 1)
        total *= decay[:, None]
        if DROPOUT:
            weights = tl.where(kept(seed, i, key, third, threshold, ROWS, TILE_N, False), weights, 0.0)
        v = load_tile(v_ptr, v_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
        total = tl.dot(weights.to(v.dtype), v, total, input_precision=PRECISION)
        top = new_top
    return total, top, norm


@triton.jit(do_not_specialize=["query_len", "key_len", "stretch", "stretches", "lower", "upper", "threshold"])
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
    part_ptr,
    top_ptr,
    norm_ptr,
    mask_ptr,
    mask_batch_stride,
    mask_head_stride,
    mask_query_stride,
    mask_key_stride,
    padding_ptr,
    padding_batch_stride,
    padding_stride,
    seed_ptr,
    key_heads,
    groups,
    query_len,
    key_len,
    stretch,
    stretches,
    lower,
    upper,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """part: (batch, heads, query_len, stretches, head_dim), top and norm: (batch, heads, query_len, stretches), in float32."""
    pid = tl.program_id(0)
    piece, key_head, batch = pid % stretches, pid // stretches % key_heads, pid // stretches // key_heads
    row = tl.arange(0, ROWS)
    i, head = row % query_len, key_head * groups + row // query_len
    real = row < groups * query_len
    channel = tl.arange(0, BLOCK_D)
    at = tl.cast(batch, tl.int64), tl.cast(key_head, tl.int64)
    k_ptr += at[0] * k_batch_stride + at[1] * k_head_stride
    v_ptr += at[0] * v_batch_stride + at[1] * v_head_stride
    if MASK != 0:
        mask_ptr += at[0] * mask_batch_stride
    if padding_ptr is not None:
        padding_ptr += at[0] * padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    q_at = (
        q_ptr
        + at[0] * q_batch_stride
        + (head.to(tl.int64) * q_head_stride + i.to(tl.int64) * q_stride)[:, None]
        + channel[None, :]
    )
    q = tl.load(q_at, mask=real[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    q = signed(q, scale)
    size = tl.abs(scale)
    unit = LOG2E if MASK == 2 else tl.maximum(size * LOG2E, 1e-37)

    begin = tl.maximum(piece * stretch, tl.maximum(lower, 0) // TILE_N * TILE_N)
    end = tl.minimum(tl.minimum((piece + 1) * stretch, key_len), query_len + upper)
    third = batch * key_heads * groups + head
    total, top, norm = stretch_of_keys(
        q,
        i,
        head,
        real,
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
        mask_head_stride,
        mask_query_stride,
        mask_key_stride,
        padding_ptr,
        padding_stride,
        seed,
        third,
        threshold,
        HEAD_DIM,
        BLOCK_D,
        ROWS,
        TILE_N,
        MASK,
        seed_ptr is not None,
        PRECISION,
    )
    if any_not_finite(total) > 0:
        mask_at = None if MASK == 0 else mask_ptr + (head.to(tl.int64) * mask_head_stride)[:, None]
        total, top, norm = key_by_key(
            q,
            i,
            begin,
            end,
            tl.where(real, query_len, 0)[:, None],
            key_len,
            lower,
            upper,
            size,
            unit,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_at,
            mask_query_stride,
            mask_key_stride,
            padding_ptr,
            padding_stride,
            seed,
            third,
            threshold,
            HEAD_DIM,
            BLOCK_D,
            ROWS,
            MASK,
            seed_ptr is not None,
        )
    total *= keep_scale
    query = (at[0] * key_heads * groups + head) * query_len + i
    place = query * stretches + piece
    tl.store(
        part_ptr + place[:, None] * HEAD_DIM + channel[None, :],
        total,
        mask=real[:, None] & (channel < HEAD_DIM)[None, :],
    )
    tl.store(
        top_ptr + place, top if MASK == 2 else top * size, mask=real
    )  # −inf · 0 would be NaN, which the second kernel does not look at
    tl.store(norm_ptr + place, norm, mask=real)


@triton.jit(do_not_specialize=["query_len", "stretches"])
def attention_decode_join_kernel(
    part_ptr,
    top_ptr,
    norm_ptr,
    out_ptr,
    out_batch_stride,
    out_head_stride,
    out_stride,
    lse_ptr,
    heads,
    query_len,
    stretches,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """out and lse of one query of one head."""
    pid = tl.program_id(0).to(tl.int64)
    i, head, batch = pid % query_len, pid // query_len % heads, pid // query_len // heads
    piece = tl.arange(0, STRETCHES)
    channel = tl.arange(0, BLOCK_D)
    norm = tl.load(norm_ptr + pid * stretches + piece, mask=piece < stretches, other=0.0)
    top = tl.load(top_ptr + pid * stretches + piece, mask=piece < stretches, other=float("-inf"))
    top = tl.where(norm == 0, float("-inf"), top)
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.where(norm == 0, 0.0, tl.exp2((top - base) * LOG2E))
    whole = tl.sum(share * norm, 0)
    inside = (piece < stretches)[:, None] & (channel < HEAD_DIM)[None, :]
    part = tl.load(part_ptr + (pid * stretches + piece)[:, None] * HEAD_DIM + channel[None, :], mask=inside, other=0.0)
    # A NaN of a stretch is one that was seen; where nothing was seen the part is 0.
    out = tl.sum(part * share[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(
        out_ptr + batch * out_batch_stride + head * out_head_stride + i * out_stride + channel,
        out.to(out_ptr.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )
    tl.store(lse_ptr + pid, tl.where(whole == 0, float("-inf"), base + tl.log(tl.where(whole == 0, 1.0, whole))))


def splits_of(batch, key_heads, key_len):
    """(keys of one stretch, how many), by sizes alone."""
    wanted = max(1, min(MAX_PROGRAMS // max(1, batch * key_heads), MAX_SPLITS, cdiv(key_len, MIN_SPLIT_SIZE)))
    stretch = cdiv(cdiv(key_len, wanted), MIN_SPLIT_SIZE) * MIN_SPLIT_SIZE
    return stretch, cdiv(key_len, stretch)


def serves(heads, key_heads, query_len, key_len):
    """Few queries, and keys enough for more than one stretch."""
    return heads // key_heads * query_len <= ROWS and key_len > MIN_SPLIT_SIZE


def attention_decode(
    q,
    k,
    v,
    out,
    lse,
    mask,
    padding,
    seed,
    sizes,
    band,
    scale,
    threshold,
    keep_scale,
    precision,
    architecture,
    device,
    new,
):
    """As attention_forward. new(shape): memory in float32 for what the stretches leave."""
    batch, heads, key_heads, query_len, key_len, head_dim = sizes
    block = block_of(head_dim)
    _, tile_n, warps, stages = attention_tile(architecture, "decode", q.dtype.itemsize, block)
    stretch, stretches = splits_of(batch, key_heads, key_len)
    queries = batch * heads * query_len
    part, top, norm = new((queries, stretches, head_dim)), new((queries, stretches)), new((queries, stretches))
    arguments = (
        q,
        *strides(q, 3),
        k,
        *strides(k, 3),
        v,
        *strides(v, 3),
        part,
        top,
        norm,
        mask,
        *strides(mask, 4),
        padding,
        *strides(padding, 2),
        seed,
        key_heads,
        heads // key_heads,
        query_len,
        key_len,
        stretch,
        stretches,
        *band,
        scale,
        threshold,
        keep_scale,
    )
    constants = head_dim, block, ROWS, tile_n, mask_kind(mask), precision
    launch(attention_decode_kernel, batch * key_heads * stretches, arguments, constants, warps, stages, device)
    arguments = part, top, norm, out, *strides(out, 3), lse, heads, query_len, stretches
    launch(
        attention_decode_join_kernel, queries, arguments, (head_dim, block, next_power_of_2(stretches)), 4, 1, device
    )
