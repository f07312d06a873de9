"""s = residual + dropout(x), y = LayerNorm(s) · weight + bias. Bound by memory: forward reads x and residual and writes s and y, once each; backward reads
dy, ds and s and writes dx (and dresidual where it differs from dx). About 10 FLOPs per element.

A program holds whole rows in registers, several of them where rows are narrow, so that statistics are two-pass without a second read. In backward a fixed
number of programs each walk over many rows and keep their share of dweight and dbias in registers; a second kernel adds the shares in
order. No atomics: the same bits on every run, and the number of programs follows from the sizes alone.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.philox import kept
from fastlm.kernels.sizes import cdiv, next_power_of_2

WIDEST = 16384  # a row is held in registers
ELEMENTS = 4096  # that one program aims to hold
SHARES = 512  # of dweight and dbias: about two waves on a large GPU
FOLD = 32  # shares added at a time by the second stage, for FOLD columns


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
        s = stored.to(tl.float32)  # LN reads the sum as it is stored
    mean = tl.sum(s, 1) / width
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = centred * rstd[:, None] * tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "threshold"])
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
    steps,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes `steps` tiles of ROWS rows, one after the other; its share of dweight and dbias is one row of each."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in range(steps):
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
            correlation = tl.sum(g * xhat, 1) / width
            ds += rstd[:, None] * (g - (tl.sum(g, 1) / width)[:, None] - xhat * correlation[:, None])
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
    share = tl.program_id(0).to(tl.int64) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + share, tl.sum(dweight, 0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + share, tl.sum(dbias, 0), mask=column < width)


@triton.jit(do_not_specialize=["shares"])
def layernorm_residual_fold_kernel(share_ptr, dweight_ptr, dbias_ptr, shares, width, FOLD: tl.constexpr):
    """The second stage: the shares of FOLD columns added up, of dweight by the first half of the programs, of dbias by the second."""
    tiles = tl.cdiv(width, FOLD)
    pid = tl.program_id(0)
    which = pid // tiles  # where only one of the two is wanted its shares come first
    column = pid % tiles * FOLD + tl.arange(0, FOLD)
    total = tl.zeros((FOLD, FOLD), tl.float32)
    for first in range(0, shares, FOLD):
        share = first + tl.arange(0, FOLD)
        at = (which * shares + share).to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(share_ptr + at, mask=(share < shares)[:, None] & (column < width)[None, :], other=0.0)
    result = tl.sum(total, 0)
    if dweight_ptr is not None:
        if which == 0:
            tl.store(dweight_ptr + column, result.to(dweight_ptr.dtype.element_ty), mask=column < width)
    if dbias_ptr is not None:
        if which == (0 if dweight_ptr is None else 1):
            tl.store(dbias_ptr + column, result.to(dbias_ptr.dtype.element_ty), mask=column < width)


def tile(width, dropout):
    """(rows, block, warps) of one program's tile."""
    block = max(next_power_of_2(width), 64 if dropout else 1)
    rows = min(max(ELEMENTS // block, 1), 16)
    return rows, block, min(max(rows * block // 1024, 1), 16)


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
    """x, residual: rows with unit last stride, so far apart; the results are contiguous."""
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


def cut(rows, width, dropout):
    """(programs, steps): how the rows are dealt out in backward, by sizes alone."""
    tiles = cdiv(rows, tile(width, dropout)[0])
    steps = cdiv(tiles, SHARES)
    return cdiv(tiles, steps), steps


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
    shares_of_dweight,
    shares_of_dbias,
    seed,
    rows,
    width,
    programs,
    steps,
    threshold,
    keep_scale,
    device,
):
    """programs, steps: of cut()."""
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
        shares_of_dweight,
        shares_of_dbias,
        seed,
        rows,
        width,
        steps,
        threshold,
        keep_scale,
    )
    launch(layernorm_residual_backward_kernel, programs, arguments, (tile_rows, block), warps, 1, device)


def layernorm_residual_fold(shares, dweight, dbias, programs, width, device):
    wanted = (dweight is not None) + (dbias is not None)
    launch(
        layernorm_residual_fold_kernel,
        wanted * cdiv(width, FOLD),
        (shares, dweight, dbias, programs, width),
        (FOLD,),
        4,
        1,
        device,
    )
