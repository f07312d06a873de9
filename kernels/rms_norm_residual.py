"""s = residual + dropout(x), y = s / √(mean(s²) + eps) · weight.

Memory-bound: forward reads x and residual and writes s and y, once each; backward reads dy, ds and s and writes dx, and
dresidual where it differs from dx. About 8 FLOPs per element.

A program holds whole rows in registers, several if they are narrow. In backward a fixed number of programs process
several tiles of rows each and keep their partial sums of dweight in registers, which a second kernel reduces
(residual_norm.py). The number of programs follows from the sizes alone. Rows may have three strides, so that queries
and keys are normalized where they are: see core/layout.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.residual_norm import tile
from fastlm.kernels.sizes import cdiv


@triton.jit
def offsets(row, middle, inner, outer_stride, middle_stride, inner_stride):
    """Where rows begin. The indices have 32 bits: no GPU divides 64."""
    rest = row // inner
    return (
        (rest // middle).to(tl.int64) * outer_stride
        + (rest % middle).to(tl.int64) * middle_stride
        + (row % inner).to(tl.int64) * inner_stride
    )[:, None]


@triton.jit(do_not_specialize=["rows", "threshold"])
def rms_norm_residual_forward_kernel(
    x_ptr,
    x_outer,
    x_middle,
    x_inner,
    residual_ptr,
    residual_outer,
    residual_middle,
    residual_inner,
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    seed_ptr,
    rows,
    width,
    middle,
    inner,
    eps,
    threshold,
    keep_scale,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row32 = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = row32.to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = offsets(row32, middle, inner, x_outer, x_middle, x_inner)
    s = tl.load(x_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        s = tl.where(kept(tl.load(seed_ptr), row, 0, 0, threshold, ROWS, BLOCK, False), s * keep_scale, 0.0)
    if residual_ptr is not None:
        at = offsets(row32, middle, inner, residual_outer, residual_middle, residual_inner)
        s += tl.load(residual_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if summed_ptr is not None:
        stored = s.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row[:, None] * width + column[None, :], stored, mask=inside)
        s = stored.to(tl.float32)  # the statistics are those of the stored sum
    squares = tl.sum(s * s, 1)
    # Where the sum of squares overflows, a factor of 0 would hide it: the result would be 0.
    rstd = tl.where(squares < float("inf"), 1 / tl.sqrt_rn(squares / width + eps), float("nan"))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = s * rstd[:, None]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if UNIT_OFFSET:
        y = y * (1.0 + weight)
    else:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles_per_program", "threshold"])
def rms_norm_residual_backward_kernel(
    dy_ptr,
    dy_outer,
    dy_middle,
    dy_inner,
    dsummed_ptr,
    dsummed_outer,
    dsummed_middle,
    dsummed_inner,
    summed_ptr,
    summed_outer,
    summed_middle,
    summed_inner,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    seed_ptr,
    rows,
    width,
    middle,
    inner,
    tiles_per_program,
    threshold,
    keep_scale,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program processes tiles_per_program tiles of ROWS rows and writes a row of the partial sums."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight = 1.0 + weight
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0) * tiles_per_program * ROWS
    for step in range(tiles_per_program):
        row32 = first + step * ROWS + tl.arange(0, ROWS)
        row = row32.to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        ds = tl.zeros((ROWS, BLOCK), tl.float32)
        if dsummed_ptr is not None:
            at = offsets(row32, middle, inner, dsummed_outer, dsummed_middle, dsummed_inner)
            ds += tl.load(dsummed_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            at = offsets(row32, middle, inner, dy_outer, dy_middle, dy_inner)
            dy = tl.load(dy_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
            at = offsets(row32, middle, inner, summed_outer, summed_middle, summed_inner)
            s = tl.load(summed_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            normalized = s * rstd[:, None]
            g = dy * weight[None, :]
            correlation = tl.sum(g * normalized, 1) / width
            ds += rstd[:, None] * (g - normalized * correlation[:, None])
            if dweight_ptr is not None:
                dweight += dy * normalized
        if dresidual_ptr is not None:
            tl.store(
                dresidual_ptr + row[:, None] * width + column[None, :],
                ds.to(dresidual_ptr.dtype.element_ty),
                mask=inside,
            )
        if dx_ptr is not None:
            if seed_ptr is not None:
                ds = tl.where(kept(tl.load(seed_ptr), row, 0, 0, threshold, ROWS, BLOCK, False), ds * keep_scale, 0.0)
            tl.store(dx_ptr + row[:, None] * width + column[None, :], ds.to(dx_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * width + column
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < width)


def rms_norm_residual_forward(
    x, residual, weight, y, summed, rstd, seed, rows, width, sizes, eps, threshold, keep_scale, unit_offset, device
):
    """x and residual: (tensor, three strides of its rows); sizes: (middle, inner); the results are contiguous."""
    tile_rows, block, warps = tile(width, seed is not None)
    arguments = (
        *x,
        *residual,
        weight,
        y,
        summed,
        rstd,
        seed,
        rows,
        width,
        *sizes,
        eps,
        threshold,
        keep_scale,
    )
    constants = unit_offset, tile_rows, block
    launch(rms_norm_residual_forward_kernel, cdiv(rows, tile_rows), arguments, constants, warps, 1, device)


def rms_norm_residual_backward(
    dy,
    dsummed,
    summed,
    weight,
    rstd,
    dx,
    dresidual,
    dweight_partials,
    seed,
    rows,
    width,
    sizes,
    programs,
    tiles_per_program,
    threshold,
    keep_scale,
    unit_offset,
    device,
):
    """dy, dsummed and summed: (tensor, three strides); programs, tiles_per_program: of residual_norm.partition()."""
    tile_rows, block, warps = tile(width, seed is not None)
    arguments = (
        *dy,
        *dsummed,
        *summed,
        weight,
        rstd,
        dx,
        dresidual,
        dweight_partials,
        seed,
        rows,
        width,
        *sizes,
        tiles_per_program,
        threshold,
        keep_scale,
    )
    constants = unit_offset, tile_rows, block
    launch(rms_norm_residual_backward_kernel, programs, arguments, constants, warps, 1, device)
