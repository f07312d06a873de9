"""The middle of the feed-forward block: act(x W1 + b1) and its gradient, fused into the product that feeds them. The other products are the vendor's.

Forward: hidden = x W1 + b1 and activated = gelu(hidden) leave one tile of the product at a time, so neither is read again: of the memory traffic of a
separate GELU (hidden written, read, activated written) the read is gone, and at recompute levels that keep no hidden so is its write. Backward:
(dy W2ᵀ) · gelu'(hidden), where the product alone is never written; activated is made again on the way where it was not kept. 2 · rows ·
width · hidden_width FLOPs each. Where the vendor's product is so much faster that a separate pointwise pass costs less than
the fusion saves, that is the path: configs.MLP says where.

Programs are as many as the GPU has multiprocessors and walk over the tiles in groups of rows, so that the weights of a group stay in the cache. What a tile
holds does not depend on who computes it: the bits are the same on every GPU of an architecture.
"""

import triton
import triton.language as tl

from fastlm.kernels.configs import MLP
from fastlm.kernels.launch import launch
from fastlm.kernels.sizes import cdiv

POINTS = 1024  # elements of a pointwise program


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """(gelu(x), gelu'(x)) of float32."""
    if TANH:
        # ½ (1 + tanh(t)) = 1 / (1 + exp(−2t)): no difference of near numbers, and no tanh, which not every GPU has
        t = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        half = 1 / (1 + tl.exp(-t))
        slope = half + x * half * (1 - half) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        half = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return x * half, slope


@triton.jit
def tile_of_product(tile, tiles_m, tiles_n):
    """(row, column) of a tile: GROUP tiles of rows at a time, which share the weights in the cache, column by column."""
    GROUP: tl.constexpr = 8
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit
def product(
    a_ptr,
    a_stride,
    w_ptr,
    w_k_stride,
    w_n_stride,
    row,
    column,
    rows,
    k,
    n,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a @ w in float32. Rows and columns beyond the end are read from the start again: what they give is not stored."""
    m = row * TILE_M + tl.arange(0, TILE_M)
    j = column * TILE_N + tl.arange(0, TILE_N)
    step = tl.arange(0, TILE_K)
    a_at = a_ptr + (m % rows).to(tl.int64)[:, None] * a_stride + step[None, :]
    w_at = w_ptr + step.to(tl.int64)[:, None] * w_k_stride + (j % n).to(tl.int64)[None, :] * w_n_stride
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for begin in range(0, k, TILE_K):
        inside = step < k - begin
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        a_at += TILE_K
        w_at += tl.cast(TILE_K, tl.int64) * w_k_stride
    return total


@triton.jit(do_not_specialize=["rows"])
def gelu_mlp_forward_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_k_stride,
    w_n_stride,
    bias_ptr,
    hidden_ptr,
    activated_ptr,
    rows,
    k,
    n,
    TANH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """activated = gelu(x W + bias), and hidden, what the GELU reads, where it is wanted: (rows, n), contiguous."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = tile_of_product(tile, tiles_m, tiles_n)
        hidden = product(
            x_ptr, x_stride, w_ptr, w_k_stride, w_n_stride, row, column, rows, k, n, TILE_M, TILE_N, TILE_K, PRECISION
        )
        m = row * TILE_M + tl.arange(0, TILE_M)
        j = column * TILE_N + tl.arange(0, TILE_N)
        if bias_ptr is not None:
            hidden += tl.load(bias_ptr + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * n + j[None, :]
        inside = (m < rows)[:, None] & (j < n)[None, :]
        if hidden_ptr is not None:
            tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
        activated, _ = gelu(hidden, TANH)
        tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_mlp_backward_kernel(
    dy_ptr,
    dy_stride,
    w_ptr,
    w_k_stride,
    w_n_stride,
    hidden_ptr,
    dhidden_ptr,
    activated_ptr,
    rows,
    k,
    n,
    TANH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dhidden = (dy W) · gelu'(hidden), where W is W2 read the other way round; activated = gelu(hidden) too where it is wanted."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = tile_of_product(tile, tiles_m, tiles_n)
        dactivated = product(
            dy_ptr, dy_stride, w_ptr, w_k_stride, w_n_stride, row, column, rows, k, n, TILE_M, TILE_N, TILE_K, PRECISION
        )
        m = row * TILE_M + tl.arange(0, TILE_M)
        j = column * TILE_N + tl.arange(0, TILE_N)
        at = m.to(tl.int64)[:, None] * n + j[None, :]
        inside = (m < rows)[:, None] & (j < n)[None, :]
        activated, slope = gelu(tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32), TANH)
        tl.store(dhidden_ptr + at, (dactivated * slope).to(dhidden_ptr.dtype.element_ty), mask=inside)
        if activated_ptr is not None:
            tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=inside)


@triton.jit
def columns(first, n, POINTS: tl.constexpr, WIDE: tl.constexpr):
    """In which columns of rows of n the elements from `first` on lie. One division of 64 bits for all: a GPU has none, and takes a hundred instructions.

    WIDE: n is POINTS at least, so that they reach into the next row at most.
    """
    column = (first % n).to(tl.int32) + tl.arange(0, POINTS)
    if WIDE:
        return tl.where(column < n, column, column - n)
    else:
        return column % n


@triton.jit(do_not_specialize=["elements"])
def gelu_mlp_activate_kernel(
    hidden_ptr, bias_ptr, activated_ptr, elements, n, TANH: tl.constexpr, POINTS: tl.constexpr, WIDE: tl.constexpr
):
    """After the vendor's product: hidden += bias in place, activated = gelu(hidden). activated may be hidden, where nothing keeps it."""
    first = tl.program_id(0).to(tl.int64) * POINTS
    at = first + tl.arange(0, POINTS)
    hidden = tl.load(hidden_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + columns(first, n, POINTS, WIDE), mask=at < elements, other=0.0).to(tl.float32)
        tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=at < elements)
    activated, _ = gelu(hidden, TANH)
    tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=at < elements)


@triton.jit(do_not_specialize=["elements"])
def gelu_mlp_slope_kernel(
    dactivated_ptr, hidden_ptr, activated_ptr, elements, TANH: tl.constexpr, POINTS: tl.constexpr
):
    """After the vendor's product: dactivated · gelu'(hidden) in place; activated = gelu(hidden) too where it is wanted."""
    at = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    activated, slope = gelu(tl.load(hidden_ptr + at, mask=at < elements, other=0.0).to(tl.float32), TANH)
    dactivated = tl.load(dactivated_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(dactivated_ptr + at, (dactivated * slope).to(dactivated_ptr.dtype.element_ty), mask=at < elements)
    if activated_ptr is not None:
        tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=at < elements)


def fused_tile(architecture, itemsize):
    """(tile_m, tile_n, tile_k, warps, stages), or None where the vendor's product and a pointwise pass are the faster."""
    return MLP.get((architecture, itemsize))


def programs(tiles, processors):
    return tiles if processors is None else min(tiles, processors)


def gelu_mlp_forward(x, w, w_strides, bias, hidden, activated, n, tanh, precision, tile, device, processors):
    """x: (rows, k) with unit last stride; w_strides: along its input and its output."""
    (rows, k), (tile_m, tile_n, tile_k, warps, stages) = x.shape, tile
    tiles = cdiv(rows, tile_m) * cdiv(n, tile_n)
    arguments = x, x.stride(0), w, *w_strides, bias, hidden, activated, rows, k, n
    launch(
        gelu_mlp_forward_kernel,
        programs(tiles, processors),
        arguments,
        (tanh, tile_m, tile_n, tile_k, precision),
        warps,
        stages,
        device,
    )


def gelu_mlp_backward(dy, w, w_strides, hidden, dhidden, activated, n, tanh, precision, tile, device, processors):
    """dy: (rows, k) with unit last stride; w_strides: along dy's width and along hidden's."""
    (rows, k), (tile_m, tile_n, tile_k, warps, stages) = dy.shape, tile
    tiles = cdiv(rows, tile_m) * cdiv(n, tile_n)
    arguments = dy, dy.stride(0), w, *w_strides, hidden, dhidden, activated, rows, k, n
    launch(
        gelu_mlp_backward_kernel,
        programs(tiles, processors),
        arguments,
        (tanh, tile_m, tile_n, tile_k, precision),
        warps,
        stages,
        device,
    )


def gelu_mlp_activate(hidden, bias, activated, tanh, device):
    elements, n = hidden.numel(), hidden.shape[-1]
    launch(
        gelu_mlp_activate_kernel,
        cdiv(elements, POINTS),
        (hidden, bias, activated, elements, n),
        (tanh, POINTS, n >= POINTS),
        4,
        1,
        device,
    )


def gelu_mlp_slope(dactivated, hidden, activated, tanh, device):
    elements = hidden.numel()
    launch(
        gelu_mlp_slope_kernel,
        cdiv(elements, POINTS),
        (dactivated, hidden, activated, elements),
        (tanh, POINTS),
        4,
        1,
        device,
    )
