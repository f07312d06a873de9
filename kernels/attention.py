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
    FLAGS,
    LOG2E,
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
    multiply_rounded,
    multiply_visible,
    query_tile_of,
    rows_of,
    store_tile,
    tiles_of_keys,
)
from fastlm.kernels.configs import attention_tile, copies_tile
from fastlm.kernels.copies import TensorDescriptor, of_heads
from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def accumulate_tiles(
    acc,
    row_max,
    row_sum,
    q,
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
    START: tl.constexpr,
    STOP: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """(Σ weights · v, running maximum, Σ weights) after tiles begin … end of the keys. The mask of query i is read if
    i < query_len, which may be a column. REPAIR: masked values that are not finite are left out.
    """
    EDGE: tl.constexpr = START or STOP
    scale = 1.0 if config.CAPPED else scaling.scale
    if EDGE:
        first_key, end_key = keys_of(i, masking.lower, masking.upper, k_rows.length)
    for tile in range(begin, end):
        key = tile * config.TILE_N
        k = copy_or_load_tile(copies[0], batch, kv_head, k_rows, key, config.TILE_N, config, not EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
        if config.CAPPED:
            scores, _ = cap_scores(scores, scaling)
        elif config.MASK != 2:
            scores = multiply_rounded(scores, scale)
        if EDGE:
            j = key + tl.arange(0, config.TILE_N)[None, :]
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
        v = copy_or_load_tile(copies[1], batch, kv_head, v_rows, key, config.TILE_N, config, not EDGE)
        if REPAIR:
            acc = multiply_visible(weights, v, visible, acc, config.PRECISION, False)
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=config.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_tile(
    batch,
    head,
    first,
    q,
    k,
    v,
    out,
    lse_ptr,
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
    REPAIR: tl.constexpr,
):
    """Fills out and lse of the queries of one head from `first` on; 1 if a result is not finite, otherwise 0."""
    q_begin, query_len, k_begin, key_len, lower, upper = locate(
        starts[0], starts[1], batch, query_len, key_len, masking.lower, masking.upper
    )
    q_rows = rows_of(q, batch, head, q_begin, query_len)
    k_rows = rows_of(k, batch, kv_head, k_begin, key_len)
    v_rows = rows_of(v, batch, kv_head, k_begin, key_len)
    out_rows = rows_of(out, batch, head, q_begin, query_len)
    lse_ptr += tl.cast(batch, tl.int64) * lse_strides[0] + tl.cast(head, tl.int64) * lse_strides[1] + q_begin
    mask_ptr, padding_ptr = masking.ptr, masking.padding_ptr
    if config.MASK != 0:
        mask_ptr += tl.cast(batch, tl.int64) * mask_strides[0] + tl.cast(head, tl.int64) * mask_strides[1]
    if padding_ptr is not None:
        padding_ptr += tl.cast(batch, tl.int64) * mask_strides[2]
    masking = Masking(
        lower, upper, mask_ptr, masking.query_stride, masking.key_stride, padding_ptr, masking.padding_stride
    )
    dropout = Dropout(dropout.seed, batch * num_heads + head, dropout.threshold, dropout.keep_scale)

    q_tile = load_tile(q_rows, first, config.TILE_M, config, False)
    acc = tl.zeros((config.TILE_M, config.BLOCK_D), tl.float32)
    row_max = tl.full((config.TILE_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((config.TILE_M,), tl.float32)
    last = tl.minimum(first + config.TILE_M, query_len) - 1
    begin, inner, outer, end = tiles_of_keys(first, last, lower, upper, key_len, config.TILE_N)
    i = first + tl.arange(0, config.TILE_M)
    inputs = query_len, scaling, k_rows, v_rows, masking, dropout, copies, batch, kv_head
    if REPAIR or config.MASK != 0 or masking.padding_ptr is not None:
        acc, row_max, row_sum = accumulate_tiles(
            acc, row_max, row_sum, q_tile, i, begin, end, *inputs, config, HAS_LOWER, True, REPAIR
        )
    else:
        if HAS_LOWER:
            acc, row_max, row_sum = accumulate_tiles(
                acc, row_max, row_sum, q_tile, i, begin, inner, *inputs, config, True, True, False
            )
        acc, row_max, row_sum = accumulate_tiles(
            acc,
            row_max,
            row_sum,
            q_tile,
            i,
            inner if HAS_LOWER else begin,
            outer,
            *inputs,
            config,
            False,
            False,
            False,
        )
        acc, row_max, row_sum = accumulate_tiles(
            acc, row_max, row_sum, q_tile, i, outer, end, *inputs, config, False, True, False
        )
    fully_masked = row_sum == 0
    results = acc * (dropout.keep_scale / tl.where(fully_masked, 1.0, row_sum))[:, None]
    store_tile(out_rows, first, results, config.TILE_M, config)
    lse = tl.where(fully_masked, float("-inf"), row_max + tl.log(tl.where(fully_masked, 1.0, row_sum)))
    tl.store(lse_ptr + i, lse, mask=i < query_len)
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
    REPAIR: tl.constexpr,
):
    """MASK: 0 none, 1 bool, 2 additive. HAS_LOWER: the band has a lower edge. PRECISION: of float32 products.

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
        lse_ptr,
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
                    kv_head = head // heads_per_kv_head
                    forward_tile(
                        batch, head, tile * TILE_M, *tensors, kv_head, query_len, key_len, config, HAS_LOWER, True
                    )
    else:
        slot = tl.program_id(0)
        batch, head, tile = query_tile_of(slot, *starts, num_sequences, num_heads, tiles, TILE_M)
        if query_starts_ptr is not None:
            check_tile(slot, batch, *starts, num_sequences, query_len, key_len, tiles)
            if batch >= num_sequences:
                tl.store(flags_ptr + slot, 0.0)
                return
        kv_head = head // heads_per_kv_head
        found = forward_tile(
            batch, head, tile * TILE_M, *tensors, kv_head, query_len, key_len, config, HAS_LOWER, False
        )
        tl.store(flags_ptr + slot, found.to(tl.float32))


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
    new,
):
    """q, out: (batch, num_heads, query_len, head_dim) with unit last stride; if packed (1, num_heads, tokens,
    head_dim).

    sizes: (batch, num_heads, num_kv_heads, query_len, key_len, head_dim); if packed, batch is the number of sequences
    and the lengths are the total numbers of tokens. band: (lower, upper), of 32 bits. lse: (batch or 1, num_heads,
    tokens). softcap: 0 for none. new(shape): an uninitialised float32 tensor.
    """
    batch, num_heads, num_kv_heads, query_len, key_len, head_dim = sizes
    block_d = block_of(head_dim)
    masked = mask is not None or key_padding is not None or seed is not None or query_starts is not None
    own_tile = attention_tile(architecture, "forward", q.dtype.itemsize, block_d, masked)
    tile, copies = with_copies("forward", architecture, block_d, masked, k, v)
    tile_m, tile_n, warps, stages = tile or own_tile
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
    constants = mask_kind(mask), query_starts is not None or band[0] > 1 - query_len, precision
    programs = tiles * num_heads * (batch if query_starts is None else 1)
    flags = new((programs,))
    arguments = *arguments, flags, programs, *copies
    settings = programs, arguments, (head_dim, block_d, tile_m), tile_n, constants, warps, stages
    launch_and_repair(attention_forward_kernel, *settings, device, query_starts is not None)


def with_copies(which, architecture, block_d, masked, k, v):
    """(tile, descriptors of k and v) if bulk copies load the tiles of the loop, otherwise (None, Nones)."""
    tile = None if masked else copies_tile(architecture, which, k.dtype.itemsize, block_d)
    if tile is not None:
        copies = [of_heads(x, strides(x, 3), tile[1], block_d) for x in (k, v)]
        if None not in copies:
            return tile, copies
    return None, (None, None)


def launch_and_repair(
    kernel, programs, arguments, sizes, tile, constants, warps, stages, device, debug=False, key_pass=False
):
    """Both launches of a kernel, see attention_tiles.py. tile: of the loop, in TILE_N, or in TILE_M if key_pass."""
    order = (lambda n: (*sizes[:2], n, sizes[2])) if key_pass else (lambda n: (*sizes, n))
    launch(kernel, programs, arguments, (*order(tile), *constants, False), warps, stages, device, debug=debug)
    few = cdiv(programs, FLAGS.value)
    arguments = tuple([None if isinstance(argument, TensorDescriptor) else argument for argument in arguments])
    launch(kernel, few, arguments, (*order(min(tile, 32)), *constants, True), warps, 1, device)
