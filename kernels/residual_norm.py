"""What the kernels of normalizations share: their tiles, and the sum of partial sums of parameter gradients.

The partial sums are added in a fixed order, without atomics.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.sizes import cdiv, next_power_of_2

ELEMENTS_PER_PROGRAM = 4096  # of a tile, where rows are narrow
MAX_PARTIALS = 1024  # partial sums of a parameter gradient
PROGRAMS_PER_PROCESSOR = 4  # of backward: a whole number of waves on every GPU, since 4, 2 or 1 of them run at a time
REDUCE_BLOCK = 32  # columns of a program of the second kernel
REDUCE_ROWS = 128  # partial sums that it adds at a time: so many loads are under way, by 8 warps


@triton.jit(do_not_specialize=["partials"])
def residual_norm_reduce_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, partials, width, REDUCE_BLOCK: tl.constexpr, REDUCE_ROWS: tl.constexpr
):
    """Reduces the partial sums of REDUCE_BLOCK columns: of dweight in the first half of the programs, then of dbias."""
    tiles = tl.cdiv(width, REDUCE_BLOCK)
    pid = tl.program_id(0)
    which = pid // tiles  # without dweight the partial sums of dbias come first
    column = pid % tiles * REDUCE_BLOCK + tl.arange(0, REDUCE_BLOCK)
    acc = tl.zeros((REDUCE_ROWS, REDUCE_BLOCK), tl.float32)
    for first in range(0, partials, REDUCE_ROWS):
        partial = first + tl.arange(0, REDUCE_ROWS)
        at = (which * partials + partial).to(tl.int64)[:, None] * width + column[None, :]
        acc += tl.load(partials_ptr + at, mask=(partial < partials)[:, None] & (column < width)[None, :], other=0.0)
    result = tl.sum(acc, 0)
    if dweight_ptr is not None:
        if which == 0:
            tl.store(dweight_ptr + column, result.to(dweight_ptr.dtype.element_ty), mask=column < width)
    if dbias_ptr is not None:
        if which == (0 if dweight_ptr is None else 1):
            tl.store(dbias_ptr + column, result.to(dbias_ptr.dtype.element_ty), mask=column < width)


def tile(width, dropout):
    """(rows, columns, warps) of the tile of a program."""
    block = max(next_power_of_2(width), 64 if dropout else 1)
    rows = min(max(ELEMENTS_PER_PROGRAM // block, 1), 16)
    return rows, block, min(max(rows * block // 1024, 1), 16)


def partition(rows, width, dropout, num_processors):
    """(programs, tiles per program) of backward, from the sizes and the GPU alone; num_processors: None without one.

    Programs have equal numbers of tiles, the last one excepted.
    """
    most = MAX_PARTIALS if num_processors is None else min(PROGRAMS_PER_PROCESSOR * num_processors, MAX_PARTIALS)
    tiles = cdiv(rows, tile(width, dropout)[0])
    tiles_per_program = cdiv(tiles, most)
    return cdiv(tiles, tiles_per_program), tiles_per_program


def reduce_partials(partials, dweight, dbias, programs, width, device):
    """partials: (gradients that are wanted, programs, width); dweight or dbias may be None."""
    gradients = (dweight is not None) + (dbias is not None)
    launch(
        residual_norm_reduce_kernel,
        gradients * cdiv(width, REDUCE_BLOCK),
        (partials, dweight, dbias, programs, width),
        (REDUCE_BLOCK, REDUCE_ROWS),
        8,
        1,
        device,
    )
