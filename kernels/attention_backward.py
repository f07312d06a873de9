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

from fastlm.kernels.attention import block_of, launch_and_repair, mask_kind, strides, with_copies
from fastlm.kernels.attention_backward_key import attention_backward_key_kernel
from fastlm.kernels.attention_backward_mask import attention_backward_mask_kernel
from fastlm.kernels.attention_backward_query import attention_backward_query_kernel
from fastlm.kernels.configs import attention_tile
from fastlm.kernels.launch import launch
from fastlm.kernels.sizes import cdiv


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
    softcap,
    threshold,
    keep_scale,
    precision,
    exact,
    architecture,
    device,
    new,
):
    """As attention_forward; dlse has the layout of lse. dk is None if neither dk nor dv is wanted.

    dmask is contiguous in float32, or None; its mask has a column for each key. exact: if q has 16 bits and the
    gradient of the mask is wanted.
    """
    batch, num_heads, num_kv_heads, query_len, key_len, head_dim = sizes
    heads_per_kv_head, block_d, left = (
        num_heads // num_kv_heads,
        block_of(head_dim),
        query_starts is not None or band[0] > 1 - query_len,
    )
    kind, packed = mask_kind(mask), query_starts is not None
    masked_at_all = bool(softcap) or left or any(x is not None for x in (mask, key_padding, seed))
    masks = mask, *strides(mask, 4), key_padding, *strides(key_padding, 2)
    each = batch if query_starts is None else 1
    inputs = q, *strides(q, 3), k, *strides(k, 3), v, *strides(v, 3)
    numbers = *band, scale, softcap or None, threshold, keep_scale
    delta = new(tuple(lse.shape))

    own_tile = attention_tile(architecture, "query", q.dtype.itemsize, block_d, masked_at_all, exact)
    tile, copies = with_copies("query", architecture, block_d, masked_at_all or exact or packed, k, v)
    tile_m, tile_n, warps, stages = tile or own_tile
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
    programs = tiles * each * num_heads
    arguments += new((programs,)), programs, *copies
    settings = programs, arguments, (head_dim, block_d, tile_m), tile_n, (kind, left, precision, exact), warps, stages
    launch_and_repair(attention_backward_query_kernel, *settings, device, query_starts is not None)

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
        programs = tiles * each * num_kv_heads
        arguments += new((programs,)), programs
        constants = kind, left, precision, exact
        settings = programs, arguments, (head_dim, block_d, tile_n), tile_m, constants, warps, stages
        launch_and_repair(attention_backward_key_kernel, *settings, device, key_pass=True)

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
