"""The gradients of attention: one kernel by tiles of queries, one by tiles of keys, and a third for the gradient of an
additive mask. There are no atomics: every sum has one owner and a fixed order.

The query kernel computes dq of a tile, iterates over the keys, and first computes delta = Σ out · dout − dlse, which
the other kernels read. The key kernel computes dk and dv of a tile and iterates over the queries of all heads that
share it, with transposed scores, so that both products that follow take them from registers. Weights are recomputed
from the log-sum-exp of the forward pass. 14 · query_len · key_len · head_dim FLOPs per head, half of it with a causal
mask: seven products instead of five, because both kernels compute the scores and dout vᵀ. That is the cost of gradients
without atomics.

EXACT: with the gradient of a mask, all gradients are as accurate as PyTorch's, whose operator for it multiplies 16-bit
numbers in float32. dscores sum to 0 over a row, so the rounding error of `out` in delta would dominate, followed by
those of the weights and dscores. delta is therefore Σ weights · dweights of float32 weights, from an additional loop
over the keys, and the factors are multiplied in two parts: five more products.
"""

import triton
import triton.language as tl

from fastlm.kernels.attention import block_of, mask_kind, strides
from fastlm.kernels.attention_tiles import (
    LOG2E,
    any_not_finite,
    check_sequence,
    check_starts,
    find_tile,
    load_tile,
    load_token,
    mask_scores,
    opaque_zero,
    sequence_of,
    store_tile,
    tiles_of_keys,
    tiles_of_queries,
    to_vectors,
)
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept, kept_each
from fastlm.kernels.sizes import cdiv


@triton.jit
def weights_of(scores, lse, scale, MASK: tl.constexpr):
    """exp(score − log-sum-exp). lse broadcasts and is +∞ beyond the queries. The caller sets masked weights to 0."""
    if MASK == 2:
        return tl.exp2((scores - lse) * LOG2E)
    return tl.exp2(scores * (scale * LOG2E) - lse * LOG2E)


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """acc + x y, with x rounded to the dtype of y. EXACT: the rounding error of x is multiplied too."""
    rounded = x.to(y.dtype)
    acc = tl.dot(rounded, y, acc, input_precision=PRECISION)
    if EXACT:
        acc = tl.dot((x - rounded.to(tl.float32)).to(y.dtype), y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def query_tile(
    q,
    dout,
    lse,
    i,
    key,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(keys, weights, dweights, visibility) of queries i and the tile of keys from `key` on.

    Weights are 0 where not visible; dweights are not.
    """
    k = load_tile(k_ptr, k_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, not EDGE)
    v = load_tile(v_ptr, v_stride, key, key_len, HEAD_DIM, TILE_N, BLOCK_D, not EDGE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    visible = True
    if EDGE:
        j = key + tl.arange(0, TILE_N)
        scores, visible = mask_scores(
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
            key_padding_ptr,
            key_padding_stride,
            MASK,
        )
    weights = weights_of(scores, lse[:, None], scale, MASK)
    if EDGE:
        weights = tl.where(visible, weights, 0.0)
    if DROPOUT:
        dweights = tl.where(
            kept(seed, i, key, batch_head, threshold, TILE_M, TILE_N, False), dweights * keep_scale, 0.0
        )
    return k, weights, dweights, visible


@triton.jit
def exact_delta(
    q,
    dout,
    lse,
    first,
    begin,
    end,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ weights · dweights, which is Σ out · dout without the rounding of out and of its weights to 16 bits."""
    delta = tl.zeros((TILE_M,), tl.float32)
    i = first + tl.arange(0, TILE_M)
    for tile in range(begin, end):
        _, weights, dweights, visible = query_tile(
            q,
            dout,
            lse,
            i,
            tile * TILE_N,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            DROPOUT,
            PRECISION,
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
    first,
    begin,
    end,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    i = first + tl.arange(0, TILE_M)
    for tile in range(begin, end):
        k, weights, dweights, visible = query_tile(
            q,
            dout,
            lse,
            i,
            tile * TILE_N,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            DROPOUT,
            PRECISION,
            EDGE,
        )
        dscores = weights * (dweights - delta[:, None])
        if EDGE:
            dscores = tl.where(visible, dscores, 0.0)
        dq = multiply(dscores, k, dq, PRECISION, EXACT)
    return dq


@triton.jit
def recompute_query_gradients(
    q,
    dout,
    lse,
    delta,
    i,
    begin,
    end,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """For gradients that are not finite, see attention_tiles.py."""
    dq = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    for key in range(begin, end):
        k = load_token(k_ptr, k_stride, key, HEAD_DIM, BLOCK_D)
        v = load_token(v_ptr, v_stride, key, HEAD_DIM, BLOCK_D)
        j = key + tl.arange(0, 1)
        scores, visible = mask_scores(
            tl.sum(q.to(tl.float32) * k[None, :], 1)[:, None],
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
            key_padding_ptr,
            key_padding_stride,
            MASK,
        )
        scores, visible = to_vectors(scores, visible)
        dweights = tl.sum(dout.to(tl.float32) * v[None, :], 1)
        if DROPOUT:
            dweights = tl.where(kept_each(seed, i, key, batch_head, threshold), dweights * keep_scale, 0.0)
        dscores = weights_of(scores, lse, scale, MASK) * (dweights - delta)
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
    pid = tl.program_id(0)
    if query_starts_ptr is None:
        batch, head, tile = pid // tiles // num_heads, pid // tiles % num_heads, tiles - 1 - pid % tiles
    else:
        slot = pid % tiles
        if slot == 0:
            check_starts(query_starts_ptr, num_sequences, query_len)
            check_starts(key_starts_ptr, num_sequences, key_len)
            return
        batch, tile = find_tile(query_starts_ptr, num_sequences, slot - 1, TILE_M)
        head = pid // tiles
        if batch >= num_sequences:
            return
        check_sequence(query_starts_ptr, batch, query_len)
        check_sequence(key_starts_ptr, batch, key_len)
    first = tile * TILE_M
    q_begin, query_len = sequence_of(query_starts_ptr, batch, query_len)
    k_begin, key_len = sequence_of(key_starts_ptr, batch, key_len)
    if query_starts_ptr is not None:
        lower += key_len - query_len
        upper += key_len - query_len
    batch_head = batch * num_heads + head
    at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // heads_per_kv_head, tl.int64)
    q_ptr += at[0] * q_batch_stride + at[1] * q_head_stride + q_begin * q_stride
    k_ptr += at[0] * k_batch_stride + at[2] * k_head_stride + k_begin * k_stride
    v_ptr += at[0] * v_batch_stride + at[2] * v_head_stride + k_begin * v_stride
    out_ptr += at[0] * out_batch_stride + at[1] * out_head_stride + q_begin * out_stride
    dout_ptr += at[0] * dout_batch_stride + at[1] * dout_head_stride + q_begin * dout_stride
    dq_ptr += at[0] * dq_batch_stride + at[1] * dq_head_stride + q_begin * dq_stride
    row = at[0] * lse_batch_stride + at[1] * lse_head_stride + q_begin
    if MASK != 0:
        mask_ptr += at[0] * mask_batch_stride + at[1] * mask_head_stride
    if key_padding_ptr is not None:
        key_padding_ptr += at[0] * key_padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    dout = load_tile(dout_ptr, dout_stride, first, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
    q = load_tile(q_ptr, q_stride, first, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
    i = first + tl.arange(0, TILE_M)
    lse = tl.load(lse_ptr + row + i, mask=i < query_len, other=float("inf"))
    last = tl.minimum(first + TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, TILE_N)
    if EXACT:
        delta = exact_delta(
            q,
            dout,
            lse,
            first,
            begin,
            end,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
        )
    else:
        out = load_tile(out_ptr, out_stride, first, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + i, mask=i < query_len, other=0.0)
    tl.store(delta_ptr + row + i, delta, mask=i < query_len)
    dq = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    if MASK != 0 or key_padding_ptr is not None:
        dq = query_gradient_tiles(
            dq,
            q,
            dout,
            lse,
            delta,
            first,
            begin,
            end,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            EXACT,
            True,
        )
    else:
        if HAS_LOWER:
            dq = query_gradient_tiles(
                dq,
                q,
                dout,
                lse,
                delta,
                first,
                begin,
                inner,
                query_len,
                key_len,
                lower,
                upper,
                scale,
                k_ptr,
                k_stride,
                v_ptr,
                v_stride,
                mask_ptr,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                seed,
                batch_head,
                threshold,
                keep_scale,
                HEAD_DIM,
                BLOCK_D,
                TILE_M,
                TILE_N,
                MASK,
                seed_ptr is not None,
                PRECISION,
                EXACT,
                True,
            )
        dq = query_gradient_tiles(
            dq,
            q,
            dout,
            lse,
            delta,
            first,
            inner if HAS_LOWER else begin,
            outer,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            EXACT,
            False,
        )
        dq = query_gradient_tiles(
            dq,
            q,
            dout,
            lse,
            delta,
            first,
            outer,
            end,
            query_len,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride,
            v_ptr,
            v_stride,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            TILE_N,
            MASK,
            seed_ptr is not None,
            PRECISION,
            EXACT,
            True,
        )
    found = any_not_finite(dq)
    if found > 0:
        zero = opaque_zero(found)
        q = load_tile(q_ptr, q_stride + zero, first + zero, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        dout = load_tile(dout_ptr, dout_stride + zero, first + zero, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        dq = recompute_query_gradients(
            q,
            dout,
            lse,
            delta,
            first + zero + tl.arange(0, TILE_M),
            begin * TILE_N + zero,
            tl.minimum(end * TILE_N, key_len),
            query_len + zero,
            key_len,
            lower,
            upper,
            scale,
            k_ptr,
            k_stride + zero,
            v_ptr,
            v_stride + zero,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            seed,
            batch_head,
            threshold,
            keep_scale,
            HEAD_DIM,
            BLOCK_D,
            TILE_M,
            MASK,
            seed_ptr is not None,
        )
    store_tile(dq_ptr, dq_stride, first, query_len, dq * scale, HEAD_DIM, TILE_M, BLOCK_D)


@triton.jit
def key_gradient_tiles(
    dk,
    dv,
    k,
    v,
    first,
    begin,
    end,
    query_len,
    key_len,
    lower,
    upper,
    scale,
    q_ptr,
    q_stride,
    dout_ptr,
    dout_stride,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores are transposed: (TILE_N, TILE_M), keys by queries."""
    j = first + tl.arange(0, TILE_N)
    for tile in range(begin, end):
        query = tile * TILE_M
        i = query + tl.arange(0, TILE_M)
        q = load_tile(q_ptr, q_stride, query, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        dout = load_tile(dout_ptr, dout_stride, query, query_len, HEAD_DIM, TILE_M, BLOCK_D, False)
        lse = tl.load(
            lse_ptr + i, mask=i < query_len, other=float("inf")
        )  # so that queries beyond the end have weights of 0
        delta = tl.load(delta_ptr + i, mask=i < query_len, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        visible = True
        if EDGE:
            scores, visible = mask_scores(
                scores,
                i[None, :],
                j[:, None],
                query_len,
                key_len,
                lower,
                upper,
                scale,
                mask_ptr,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                MASK,
            )
        weights = weights_of(scores, lse[None, :], scale, MASK)
        if EDGE:
            weights = tl.where(visible, weights, 0.0)
        kept_weights = weights
        if DROPOUT:
            keep = kept(seed, i, first, batch_head, threshold, TILE_M, TILE_N, True)
            kept_weights = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[None, :])
        if EDGE:
            dscores = tl.where(visible, dscores, 0.0)
        dv = multiply(kept_weights, dout, dv, PRECISION, EXACT)
        dk = multiply(dscores, q, dk, PRECISION, EXACT)
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
    lower,
    upper,
    scale,
    q_ptr,
    q_stride,
    dout_ptr,
    dout_stride,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    mask_query_stride,
    mask_key_stride,
    key_padding_ptr,
    key_padding_stride,
    seed,
    batch_head,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """For gradients that are not finite, see attention_tiles.py."""
    j = first + tl.arange(0, TILE_N)
    for query in range(begin, end):
        q = load_token(q_ptr, q_stride, query, HEAD_DIM, BLOCK_D)
        dout = load_token(dout_ptr, dout_stride, query, HEAD_DIM, BLOCK_D)
        i = query + tl.arange(0, 1)
        scores, visible = mask_scores(
            tl.sum(k.to(tl.float32) * q[None, :], 1)[:, None],
            i[None, :],
            j[:, None],
            query_len,
            key_len,
            lower,
            upper,
            scale,
            mask_ptr,
            mask_query_stride,
            mask_key_stride,
            key_padding_ptr,
            key_padding_stride,
            MASK,
        )
        scores, visible = to_vectors(scores, visible)
        weights = weights_of(scores, tl.load(lse_ptr + query), scale, MASK)
        dweights = tl.sum(v.to(tl.float32) * dout[None, :], 1)
        kept_weights = weights
        if DROPOUT:
            keep = kept_each(seed, query, j, batch_head, threshold)
            kept_weights = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - tl.load(delta_ptr + query))
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
    q_begin, query_len = sequence_of(query_starts_ptr, batch, query_len)
    k_begin, key_len = sequence_of(key_starts_ptr, batch, key_len)
    if query_starts_ptr is not None:
        lower += key_len - query_len
        upper += key_len - query_len
    at = tl.cast(batch, tl.int64), tl.cast(kv_head, tl.int64)
    k_ptr += at[0] * k_batch_stride + at[1] * k_head_stride + k_begin * k_stride
    v_ptr += at[0] * v_batch_stride + at[1] * v_head_stride + k_begin * v_stride
    dk_ptr += at[0] * dk_batch_stride + at[1] * dk_head_stride + k_begin * dk_stride
    dv_ptr += at[0] * dv_batch_stride + at[1] * dv_head_stride + k_begin * dv_stride
    if key_padding_ptr is not None:
        key_padding_ptr += at[0] * key_padding_batch_stride
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    k = load_tile(k_ptr, k_stride, first, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
    v = load_tile(v_ptr, v_stride, first, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
    dk = tl.zeros((TILE_N, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE_N, BLOCK_D), tl.float32)
    last = tl.minimum(first + TILE_N, key_len) - 1
    begin, inner, outer, end = tiles_of_queries(first, last, lower, upper, query_len, TILE_M)
    for group in range(heads_per_kv_head):
        head = tl.cast(kv_head * heads_per_kv_head + group, tl.int64)
        batch_head = batch * num_heads + kv_head * heads_per_kv_head + group
        q_at = q_ptr + at[0] * q_batch_stride + head * q_head_stride + q_begin * q_stride
        dout_at = dout_ptr + at[0] * dout_batch_stride + head * dout_head_stride + q_begin * dout_stride
        row = at[0] * lse_batch_stride + head * lse_head_stride + q_begin
        mask_at = None if MASK == 0 else mask_ptr + at[0] * mask_batch_stride + head * mask_head_stride
        if MASK != 0 or key_padding_ptr is not None:
            dk, dv = key_gradient_tiles(
                dk,
                dv,
                k,
                v,
                first,
                begin,
                end,
                query_len,
                key_len,
                lower,
                upper,
                scale,
                q_at,
                q_stride,
                dout_at,
                dout_stride,
                lse_ptr + row,
                delta_ptr + row,
                mask_at,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                seed,
                batch_head,
                threshold,
                keep_scale,
                HEAD_DIM,
                BLOCK_D,
                TILE_M,
                TILE_N,
                MASK,
                seed_ptr is not None,
                PRECISION,
                EXACT,
                True,
            )
        else:
            dk, dv = key_gradient_tiles(
                dk,
                dv,
                k,
                v,
                first,
                begin,
                inner,
                query_len,
                key_len,
                lower,
                upper,
                scale,
                q_at,
                q_stride,
                dout_at,
                dout_stride,
                lse_ptr + row,
                delta_ptr + row,
                mask_at,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                seed,
                batch_head,
                threshold,
                keep_scale,
                HEAD_DIM,
                BLOCK_D,
                TILE_M,
                TILE_N,
                MASK,
                seed_ptr is not None,
                PRECISION,
                EXACT,
                True,
            )
            dk, dv = key_gradient_tiles(
                dk,
                dv,
                k,
                v,
                first,
                inner,
                outer,
                query_len,
                key_len,
                lower,
                upper,
                scale,
                q_at,
                q_stride,
                dout_at,
                dout_stride,
                lse_ptr + row,
                delta_ptr + row,
                mask_at,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                seed,
                batch_head,
                threshold,
                keep_scale,
                HEAD_DIM,
                BLOCK_D,
                TILE_M,
                TILE_N,
                MASK,
                seed_ptr is not None,
                PRECISION,
                EXACT,
                False,
            )
            if HAS_LOWER:
                dk, dv = key_gradient_tiles(
                    dk,
                    dv,
                    k,
                    v,
                    first,
                    outer,
                    end,
                    query_len,
                    key_len,
                    lower,
                    upper,
                    scale,
                    q_at,
                    q_stride,
                    dout_at,
                    dout_stride,
                    lse_ptr + row,
                    delta_ptr + row,
                    mask_at,
                    mask_query_stride,
                    mask_key_stride,
                    key_padding_ptr,
                    key_padding_stride,
                    seed,
                    batch_head,
                    threshold,
                    keep_scale,
                    HEAD_DIM,
                    BLOCK_D,
                    TILE_M,
                    TILE_N,
                    MASK,
                    seed_ptr is not None,
                    PRECISION,
                    EXACT,
                    True,
                )
    found = tl.maximum(any_not_finite(dk), any_not_finite(dv))
    if found > 0:
        zero = opaque_zero(found)
        k = load_tile(k_ptr, k_stride + zero, first + zero, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
        v = load_tile(v_ptr, v_stride + zero, first + zero, key_len, HEAD_DIM, TILE_N, BLOCK_D, False)
        dk = tl.zeros((TILE_N, BLOCK_D), tl.float32)
        dv = tl.zeros((TILE_N, BLOCK_D), tl.float32)
        for group in range(heads_per_kv_head):
            head = tl.cast(kv_head * heads_per_kv_head + group, tl.int64)
            batch_head = batch * num_heads + kv_head * heads_per_kv_head + group
            q_at = q_ptr + at[0] * q_batch_stride + head * q_head_stride + q_begin * q_stride
            dout_at = dout_ptr + at[0] * dout_batch_stride + head * dout_head_stride + q_begin * dout_stride
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
                lower,
                upper,
                scale,
                q_at,
                q_stride + zero,
                dout_at,
                dout_stride + zero,
                lse_ptr + row,
                delta_ptr + row,
                mask_at,
                mask_query_stride,
                mask_key_stride,
                key_padding_ptr,
                key_padding_stride,
                seed,
                batch_head,
                threshold,
                keep_scale,
                HEAD_DIM,
                BLOCK_D,
                TILE_N,
                MASK,
                seed_ptr is not None,
            )
    store_tile(dk_ptr, dk_stride, first, key_len, dk * scale, HEAD_DIM, TILE_N, BLOCK_D)
    store_tile(dv_ptr, dv_stride, first, key_len, dv, HEAD_DIM, TILE_N, BLOCK_D)


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
    for batch in range(mask_index, batch_size, mask_batch):
        for head in range(mask_head, num_heads, mask_heads):
            at = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // heads_per_kv_head, tl.int64)
            row = (at[0] * num_heads + at[1]) * query_len
            key_padding_at = None if key_padding_ptr is None else key_padding_ptr + at[0] * key_padding_batch_stride
            for m in range(0 if ONE_ROW else tile_m, tiles_m if ONE_ROW else tile_m + 1):
                first = m * TILE_M
                i = first + tl.arange(0, TILE_M)
                q = load_tile(
                    q_ptr + at[0] * q_batch_stride + at[1] * q_head_stride,
                    q_stride,
                    first,
                    query_len,
                    HEAD_DIM,
                    TILE_M,
                    BLOCK_D,
                    False,
                )
                dout = load_tile(
                    dout_ptr + at[0] * dout_batch_stride + at[1] * dout_head_stride,
                    dout_stride,
                    first,
                    query_len,
                    HEAD_DIM,
                    TILE_M,
                    BLOCK_D,
                    False,
                )
                lse = tl.load(lse_ptr + row + i, mask=i < query_len, other=float("inf"))
                delta = tl.load(delta_ptr + row + i, mask=i < query_len, other=0.0)
                k = load_tile(
                    k_ptr + at[0] * k_batch_stride + at[2] * k_head_stride,
                    k_stride,
                    key,
                    key_len,
                    HEAD_DIM,
                    TILE_N,
                    BLOCK_D,
                    False,
                )
                v = load_tile(
                    v_ptr + at[0] * v_batch_stride + at[2] * v_head_stride,
                    v_stride,
                    key,
                    key_len,
                    HEAD_DIM,
                    TILE_N,
                    BLOCK_D,
                    False,
                )
                scores, visible = mask_scores(
                    tl.dot(q, tl.trans(k), input_precision=PRECISION),
                    i[:, None],
                    j[None, :],
                    query_len,
                    key_len,
                    lower,
                    upper,
                    scale,
                    mask_ptr + at[0] * mask_batch_stride + at[1] * mask_head_stride,
                    mask_query_stride,
                    mask_key_stride,
                    key_padding_at,
                    key_padding_stride,
                    2,
                )
                dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                if seed_ptr is not None:
                    keep = kept(seed, i, key, batch * num_heads + head, threshold, TILE_M, TILE_N, False)
                    dweights = tl.where(keep, dweights * keep_scale, 0.0)
                dmask += tl.where(
                    visible, weights_of(scores, lse[:, None], scale, 2) * (dweights - delta[:, None]), 0.0
                )
    dmask_ptr += (mask_index * mask_heads + mask_head).to(tl.int64) * (1 if ONE_ROW else query_len) * key_len
    if ONE_ROW:
        tl.store(dmask_ptr + j, tl.sum(dmask, 0), mask=j < key_len)
    else:
        i = tile_m * TILE_M + tl.arange(0, TILE_M)
        at_mask = dmask_ptr + i.to(tl.int64)[:, None] * key_len + j[None, :]
        tl.store(at_mask, dmask, mask=(i < query_len)[:, None] & (j < key_len)[None, :])


def attention_backward(
    dout,
    dlse,
    q,
    k,
    v,
    mask,
    key_padding,
    query_starts,
    key_starts,
    seed,
    out,
    lse,
    dq,
    dk,
    dv,
    dmask,
    sizes,
    band,
    scale,
    threshold,
    keep_scale,
    precision,
    exact,
    architecture,
    device,
    delta,
):
    """As attention_forward; dlse and delta have the layout of lse. dk is None if neither dk nor dv is wanted.

    dmask is contiguous in float32, or None; its mask has a column for each key. exact: if q has 16 bits and the
    gradient of the mask is wanted.
    """
    batch, num_heads, num_kv_heads, query_len, key_len, head_dim = sizes
    heads_per_kv_head, block_d, left = (
        num_heads // num_kv_heads,
        block_of(head_dim),
        query_starts is not None or band[0] > 1 - query_len,
    )
    kind, masked_at_all = (
        mask_kind(mask),
        mask is not None or key_padding is not None or seed is not None or query_starts is not None,
    )
    masks = mask, *strides(mask, 4), key_padding, *strides(key_padding, 2)
    each = batch if query_starts is None else 1
    inputs = q, *strides(q, 3), k, *strides(k, 3), v, *strides(v, 3)
    numbers = *band, scale, threshold, keep_scale

    tile_m, tile_n, warps, stages = attention_tile(
        architecture, "query", q.dtype.itemsize, block_d, masked_at_all, exact
    )
    tiles = cdiv(query_len, tile_m) if query_starts is None else query_len // tile_m + batch + 1
    arguments = (
        *inputs,
        out,
        *strides(out, 3),
        dout,
        *strides(dout, 3),
        lse,
        dlse,
        delta,
        *strides(lse, 2),
        *masks,
        query_starts,
        key_starts,
        seed,
        dq,
        *strides(dq, 3),
        batch,
        num_heads,
        heads_per_kv_head,
        query_len,
        key_len,
        tiles,
        *numbers,
    )
    constants = head_dim, block_d, tile_m, tile_n, kind, left, precision, exact
    launch(
        attention_backward_query_kernel,
        tiles * each * num_heads,
        arguments,
        constants,
        warps,
        stages,
        device,
        debug=query_starts is not None,
    )

    if dk is not None:
        tile_m, tile_n, warps, stages = attention_tile(
            architecture, "key", q.dtype.itemsize, block_d, masked_at_all, exact
        )
        tiles = cdiv(key_len, tile_n) if key_starts is None else key_len // tile_n + batch
        arguments = (
            *inputs,
            dout,
            *strides(dout, 3),
            lse,
            delta,
            *strides(lse, 2),
            *masks,
            query_starts,
            key_starts,
            seed,
            dk,
            *strides(dk, 3),
            dv,
            *strides(dv, 3),
            batch,
            num_heads,
            heads_per_kv_head,
            query_len,
            key_len,
            tiles,
            *numbers,
        )
        constants = head_dim, block_d, tile_m, tile_n, kind, left, precision, exact
        launch(attention_backward_key_kernel, tiles * each * num_kv_heads, arguments, constants, warps, stages, device)

    if dmask is not None:
        tile_m, tile_n, warps, stages = attention_tile(architecture, "mask", q.dtype.itemsize, block_d)
        tiles_m, tiles_n = cdiv(query_len, tile_m), cdiv(key_len, tile_n)
        one_row = mask.shape[2] == 1
        programs = mask.shape[0] * mask.shape[1] * (1 if one_row else tiles_m) * tiles_n
        arguments = (
            *inputs,
            dout,
            *strides(dout, 3),
            lse,
            delta,
            *masks,
            seed,
            dmask,
            batch,
            num_heads,
            heads_per_kv_head,
            query_len,
            key_len,
            mask.shape[0],
            mask.shape[1],
            tiles_m,
            tiles_n,
            *numbers,
        )
        constants = head_dim, block_d, tile_m, tile_n, one_row, precision
        launch(attention_backward_mask_kernel, programs, arguments, constants, warps, stages, device)
