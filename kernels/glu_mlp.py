"""A gated feed-forward block up to its last product, and the gradient of that. The other products are the vendor's.

Forward: gate = x Wg + bg, up = x Wu + bu and activated = act(gate) · up are stored from two tiles of products, computed
side by side: a tile of x is read once for both. Compared with two products and a pointwise pass (gate and up written
and read, activated written) the reads are saved, and at recompute levels that do not save gate and up their writes as
well. 4 · rows · width · hidden_width FLOPs.

Backward: dactivated = dy Wd is never stored. From its tile, dgate = dactivated · up · act'(gate) and dup = dactivated ·
act(gate) are, and activated if it was not saved. 2 · rows · width · hidden_width FLOPs. Where the vendor's product is
so much faster that a separate pointwise kernel costs less than the fusion saves, that is used; configs.MLP decides, for
this operator as for gelu_mlp.

The order of the tiles is that of mlp_tiles.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.mlp_tiles import activate, num_programs, product, tile_coordinates
from fastlm.kernels.sizes import cdiv

BLOCK = 1024  # elements of a program of the pointwise kernels


@triton.jit
def two_products(
    a_ptr,
    a_stride,
    first_ptr,
    first_k_stride,
    first_n_stride,
    second_ptr,
    second_k_stride,
    second_n_stride,
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
    """The same tile of a @ first and of a @ second, as product() computes one."""
    m = row * TILE_M + tl.arange(0, TILE_M)
    j = ((column * TILE_N + tl.arange(0, TILE_N)) % n).to(tl.int64)
    inner_index = tl.arange(0, TILE_K)
    inner_wide = inner_index.to(tl.int64)
    a_at = a_ptr + (m % rows).to(tl.int64)[:, None] * a_stride + inner_index[None, :]
    first_at = first_ptr + inner_wide[:, None] * first_k_stride + j[None, :] * first_n_stride
    second_at = second_ptr + inner_wide[:, None] * second_k_stride + j[None, :] * second_n_stride
    first_acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    second_acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for begin in range(0, k, TILE_K):
        inside = inner_index < k - begin
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        first = tl.load(first_at, mask=inside[:, None], other=0.0)
        second = tl.load(second_at, mask=inside[:, None], other=0.0)
        first_acc = tl.dot(a, first, first_acc, input_precision=PRECISION)
        second_acc = tl.dot(a, second, second_acc, input_precision=PRECISION)
        a_at += TILE_K
        first_at += tl.cast(TILE_K, tl.int64) * first_k_stride
        second_at += tl.cast(TILE_K, tl.int64) * second_k_stride
    return first_acc, second_acc


@triton.jit(do_not_specialize=["rows"])
def glu_mlp_forward_kernel(
    x_ptr,
    x_stride,
    w_gate_ptr,
    w_gate_k_stride,
    w_gate_n_stride,
    w_up_ptr,
    w_up_k_stride,
    w_up_n_stride,
    b_gate_ptr,
    b_up_ptr,
    gate_ptr,
    up_ptr,
    activated_ptr,
    rows,
    k,
    n,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """activated = act(gate) · up, and gate and up if wanted: (rows, n), contiguous."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = tile_coordinates(tile, tiles_m, tiles_n)
        gate, up = two_products(
            x_ptr,
            x_stride,
            w_gate_ptr,
            w_gate_k_stride,
            w_gate_n_stride,
            w_up_ptr,
            w_up_k_stride,
            w_up_n_stride,
            row,
            column,
            rows,
            k,
            n,
            TILE_M,
            TILE_N,
            TILE_K,
            PRECISION,
        )
        m = row * TILE_M + tl.arange(0, TILE_M)
        j = column * TILE_N + tl.arange(0, TILE_N)
        if b_gate_ptr is not None:
            gate += tl.load(b_gate_ptr + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        if b_up_ptr is not None:
            up += tl.load(b_up_ptr + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * n + j[None, :]
        inside = (m < rows)[:, None] & (j < n)[None, :]
        if gate_ptr is not None:
            tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), mask=inside)
            tl.store(up_ptr + at, up.to(up_ptr.dtype.element_ty), mask=inside)
        value, _ = activate(gate, ACTIVATION)
        tl.store(activated_ptr + at, (value * up).to(activated_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def glu_mlp_backward_kernel(
    dy_ptr,
    dy_stride,
    w_ptr,
    w_k_stride,
    w_n_stride,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    activated_ptr,
    rows,
    k,
    n,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dgate, dup and, if wanted, activated, from dy W, where W is w_down transposed."""
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
        value, slope = activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.where(slope == 0, 0.0, dactivated * up * slope)  # also where up is not finite
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        tl.store(dup_ptr + at, (dactivated * value).to(dup_ptr.dtype.element_ty), mask=inside)
        if activated_ptr is not None:
            tl.store(activated_ptr + at, (value * up).to(activated_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["elements"])
def glu_mlp_activate_kernel(gate_ptr, up_ptr, activated_ptr, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """After the vendor's products: activated = act(gate) · up, which may be gate."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = activate(gate, ACTIVATION)
    tl.store(activated_ptr + at, (value * up).to(activated_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["elements"])
def glu_mlp_slope_kernel(
    dactivated_ptr, gate_ptr, up_ptr, dup_ptr, activated_ptr, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """After the vendor's product: dgate in the place of dactivated, dup, and activated if wanted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value, slope = activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dactivated = tl.load(dactivated_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.where(slope == 0, 0.0, dactivated * up * slope)  # also where up is not finite
    tl.store(dactivated_ptr + at, dgate.to(dactivated_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dactivated * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if activated_ptr is not None:
        tl.store(activated_ptr + at, (value * up).to(activated_ptr.dtype.element_ty), mask=inside)


def launch_by_tiles(kernel, a, arguments, n, activation, precision, tile, device, num_processors):
    """Launches a kernel of tiles of a product of a, (rows, k) with unit last stride."""
    (rows, k), (tile_m, tile_n, tile_k, warps, stages) = a.shape, tile
    tiles = cdiv(rows, tile_m) * cdiv(n, tile_n)
    constants = activation, tile_m, tile_n, tile_k, precision
    arguments = a, a.stride(0), *arguments, rows, k, n
    launch(kernel, num_programs(tiles, num_processors), arguments, constants, warps, stages, device)


def glu_mlp_forward(x, w_gate, gate_strides, w_up, up_strides, b_gate, b_up, gate, up, activated, n, **settings):
    """x: (rows, k) with unit last stride. Strides: along the input and the output."""
    arguments = w_gate, *gate_strides, w_up, *up_strides, b_gate, b_up, gate, up, activated
    launch_by_tiles(glu_mlp_forward_kernel, x, arguments, n, **settings)


def glu_mlp_backward(dy, w, w_strides, gate, up, dgate, dup, activated, n, **settings):
    """dy: (rows, k) with unit last stride. w_strides: along the width of dy and of gate."""
    arguments = w, *w_strides, gate, up, dgate, dup, activated
    launch_by_tiles(glu_mlp_backward_kernel, dy, arguments, n, **settings)


def glu_mlp_activate(gate, up, activated, activation, device):
    elements = gate.numel()
    arguments, constants = (gate, up, activated, elements), (activation, BLOCK)
    launch(glu_mlp_activate_kernel, cdiv(elements, BLOCK), arguments, constants, 4, 1, device)


def glu_mlp_slope(dactivated, gate, up, dup, activated, activation, device):
    elements = gate.numel()
    launch(
        glu_mlp_slope_kernel,
        cdiv(elements, BLOCK),
        (dactivated, gate, up, dup, activated, elements),
        (activation, BLOCK),
        4,
        1,
        device,
    )
