"""s = residual + dropout(x), y = LayerNorm(s) · weight + bias.

Memory-bound: forward reads x and residual and writes s and y, once each; backward reads dy, ds and s and writes dx, and
dresidual where it differs from dx. About 10 FLOPs per element.

A program holds whole rows in registers, several if they are narrow, so the two-pass statistics need no second read. In
backward a fixed number of programs process several tiles of rows each and keep their partial sums of dweight and dbias
in registers, which a second kernel reduces (residual_norm.py). The number of programs follows from the sizes alone.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.residual_norm import tile
from fastlm.kernels.sizes import cdiv


@triton.jit(do_not_specialize=["rows", "threshold"])
def layernorm_residual_forward_kernel(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    bias_ptr,
    y_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    rows,
    width,
    eps,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    s = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        s = tl.where(kept(tl.load(seed_ptr), row, 0, 0, threshold, ROWS, BLOCK, False), s * keep_scale, 0.0)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    if summed_ptr is not None:
        stored = s.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row[:, None] * width + column[None, :], stored, mask=inside)
        s = stored.to(tl.float32)  # the statistics are those of the stored sum
    mean = tl.sum(s, 1) / width
    # Corrects the rounding error of the mean, which is large beside the deviations of large, nearly equal elements.
    mean += tl.sum(tl.where(inside, s - mean[:, None], 0.0), 1) / width
    centered = tl.where(inside, s - mean[:, None], 0.0)
    squares = tl.sum(centered * centered, 1)
    # Where the sum of squares overflows, a factor of 0 would hide it: the result would be the bias.
    rstd = tl.where(squares < float("inf"), 1 / tl.sqrt_rn(squares / width + eps), float("nan"))
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = centered * rstd[:, None] * tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles_per_program", "threshold"])
def layernorm_residual_backward_kernel(
    dy_ptr,
    dy_stride,
    dsummed_ptr,
    dsummed_stride,
    summed_ptr,
    summed_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    seed_ptr,
    rows,
    width,
    tiles_per_program,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program processes tiles_per_program tiles of ROWS rows and writes a row of each of the partial sums."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * ROWS
    for step in range(tiles_per_program):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        ds = tl.zeros((ROWS, BLOCK), tl.float32)
        if dsummed_ptr is not None:
            ds += tl.load(dsummed_ptr + row[:, None] * dsummed_stride + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            s = tl.load(summed_ptr + row[:, None] * summed_stride + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            xhat = tl.where(inside, (s - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            mean_gx = tl.sum(g * xhat, 1) / width
            ds += rstd[:, None] * (g - (tl.sum(g, 1) / width)[:, None] - xhat * mean_gx[:, None])
            if dweight_ptr is not None:
                dweight += dy * xhat
            if dbias_ptr is not None:
                dbias += dy
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
    partial = tl.program_id(0).to(tl.int64) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < width)


def layernorm_residual_forward(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    bias,
    y,
    summed,
    mean,
    rstd,
    seed,
    rows,
    width,
    eps,
    threshold,
    keep_scale,
    device,
):
    """x and residual: contiguous rows, so many elements apart; the results are contiguous."""
    tile_rows, block, warps = tile(width, seed is not None)
    arguments = (
        x,
        x_stride,
        residual,
        residual_stride,
        weight,
        bias,
        y,
        summed,
        mean,
        rstd,
        seed,
        rows,
        width,
        eps,
        threshold,
        keep_scale,
    )
    launch(layernorm_residual_forward_kernel, cdiv(rows, tile_rows), arguments, (tile_rows, block), warps, 1, device)


def layernorm_residual_backward(
    dy,
    dy_stride,
    dsummed,
    dsummed_stride,
    summed,
    summed_stride,
    weight,
    mean,
    rstd,
    dx,
    dresidual,
    dweight_partials,
    dbias_partials,
    seed,
    rows,
    width,
    programs,
    tiles_per_program,
    threshold,
    keep_scale,
    device,
):
    """programs, tiles_per_program: of residual_norm.partition()."""
    tile_rows, block, warps = tile(width, seed is not None)
    arguments = (
        dy,
        dy_stride,
        dsummed,
        dsummed_stride,
        summed,
        summed_stride,
        weight,
        mean,
        rstd,
        dx,
        dresidual,
        dweight_partials,
        dbias_partials,
        seed,
        rows,
        width,
        tiles_per_program,
        threshold,
        keep_scale,
    )
    launch(layernorm_residual_backward_kernel, programs, arguments, (tile_rows, block), warps, 1, device)
