"""The GELU of a feed-forward block as the epilogue of the product before it, and its gradient. The other products are
the vendor's.

Forward: hidden = x W1 + b1 and activated = gelu(hidden) are stored from one tile of the product, so neither is read
again. Compared with a separate GELU (hidden written and read, activated written) the read is saved, and at recompute
levels that do not save hidden its write as well. Backward: (dy W2ᵀ) · gelu'(hidden), where the product alone is never
stored; activated is recomputed if it was not saved. 2 · rows · width · hidden_width FLOPs each. Where the vendor's
product is so much faster that a separate pointwise kernel costs less than the fusion saves, that is used; configs.MLP
decides.

The order of the tiles is that of mlp_tiles.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.mlp_tiles import gelu, num_programs, product, tile_coordinates
from fastlm.kernels.sizes import cdiv

BLOCK = 1024  # elements of a program of the pointwise kernels


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
    """activated = gelu(x W + bias), and hidden, the input of the GELU, if wanted: (rows, n), contiguous."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = tile_coordinates(tile, tiles_m, tiles_n)
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
    """dhidden = (dy W) · gelu'(hidden), where W is W2 transposed, and activated = gelu(hidden) if wanted."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = tile_coordinates(tile, tiles_m, tiles_n)
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


@triton.jit(do_not_specialize=["elements"])
def gelu_mlp_activate_kernel(hidden_ptr, activated_ptr, elements, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """After the vendor's product: activated = gelu(hidden), which may be hidden itself."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(hidden_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    activated, _ = gelu(hidden, TANH)
    tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=at < elements)


@triton.jit(do_not_specialize=["elements"])
def gelu_mlp_slope_kernel(dactivated_ptr, hidden_ptr, activated_ptr, elements, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """After the vendor's product: dactivated · gelu'(hidden) in place, and activated = gelu(hidden) if wanted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    activated, slope = gelu(tl.load(hidden_ptr + at, mask=at < elements, other=0.0).to(tl.float32), TANH)
    dactivated = tl.load(dactivated_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(dactivated_ptr + at, (dactivated * slope).to(dactivated_ptr.dtype.element_ty), mask=at < elements)
    if activated_ptr is not None:
        tl.store(activated_ptr + at, activated.to(activated_ptr.dtype.element_ty), mask=at < elements)


def gelu_mlp_forward(x, w, w_strides, bias, hidden, activated, n, tanh, precision, tile, device, num_processors):
    """x: (rows, k) with unit last stride. w_strides: along the input and the output."""
    (rows, k), (tile_m, tile_n, tile_k, warps, stages) = x.shape, tile
    tiles = cdiv(rows, tile_m) * cdiv(n, tile_n)
    arguments = x, x.stride(0), w, *w_strides, bias, hidden, activated, rows, k, n
    launch(
        gelu_mlp_forward_kernel,
        num_programs(tiles, num_processors),
        arguments,
        (tanh, tile_m, tile_n, tile_k, precision),
        warps,
        stages,
        device,
    )


def gelu_mlp_backward(dy, w, w_strides, hidden, dhidden, activated, n, tanh, precision, tile, device, num_processors):
    """dy: (rows, k) with unit last stride. w_strides: along the width of dy and of hidden."""
    (rows, k), (tile_m, tile_n, tile_k, warps, stages) = dy.shape, tile
    tiles = cdiv(rows, tile_m) * cdiv(n, tile_n)
    arguments = dy, dy.stride(0), w, *w_strides, hidden, dhidden, activated, rows, k, n
    launch(
        gelu_mlp_backward_kernel,
        num_programs(tiles, num_processors),
        arguments,
        (tanh, tile_m, tile_n, tile_k, precision),
        warps,
        stages,
        device,
    )


def gelu_mlp_activate(hidden, activated, tanh, device):
    elements = hidden.numel()
    arguments, constants = (hidden, activated, elements), (tanh, BLOCK)
    launch(gelu_mlp_activate_kernel, cdiv(elements, BLOCK), arguments, constants, 4, 1, device)


def gelu_mlp_slope(dactivated, hidden, activated, tanh, device):
    elements = hidden.numel()
    launch(
        gelu_mlp_slope_kernel,
        cdiv(elements, BLOCK),
        (dactivated, hidden, activated, elements),
        (tanh, BLOCK),
        4,
        1,
        device,
    )
