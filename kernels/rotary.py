"""Rotary positions: channels (j, j + half) of queries or keys rotated by the tables of their token.

Memory-bound: reads and writes each channel once, and for each row the tables, which other heads find in the L2 cache.
About 3 FLOPs per element. The inverse (the gradient) is the transposed matrix. The indices of rows have 32 bits: no GPU
divides 64.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.sizes import cdiv, next_power_of_2

ELEMENTS_PER_PROGRAM = 2048


@triton.jit(do_not_specialize=["rows"])
def rotary_kernel(
    x_ptr,
    x_batch,
    x_head,
    x_token,
    cos_ptr,
    cos_batch,
    cos_token,
    sin_ptr,
    sin_batch,
    sin_token,
    out_ptr,
    rows,
    heads,
    tokens,
    half,
    head_dim,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, batch_head = (row % tokens).to(tl.int64), row // tokens
    head, batch = (batch_head % heads).to(tl.int64), (batch_head // heads).to(tl.int64)
    x = x_ptr + (batch * x_batch + head * x_head + token * x_token)[:, None]
    cos = cos_ptr + (batch * cos_batch + token * cos_token)[:, None]
    sin = sin_ptr + (batch * sin_batch + token * sin_token)[:, None]
    out = out_ptr + row.to(tl.int64)[:, None] * head_dim
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < half)
    first = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half + column, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + column, mask=inside, other=0.0)
    sin_second = tl.load(sin + half + column, mask=inside, other=0.0)
    if INVERSE:
        sin_first, sin_second = -sin_second, -sin_first
    rotated = first * tl.load(cos + column, mask=inside, other=0.0) - second * sin_first
    tl.store(out + column, rotated.to(out_ptr.dtype.element_ty), mask=inside)
    rotated = second * tl.load(cos + half + column, mask=inside, other=0.0) + first * sin_second
    tl.store(out + half + column, rotated.to(out_ptr.dtype.element_ty), mask=inside)
    if REST > 0:  # channels that are not rotated
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = (row < rows)[:, None] & (column < head_dim)
        tl.store(out + column, tl.load(x + column, mask=inside), mask=inside)


def rotary(x, strides, cos, cos_strides, sin, sin_strides, out, inverse, device):
    """x: (batch, heads, tokens, head_dim); strides of batch, head and token; the result is contiguous."""
    batch, heads, tokens, head_dim = x.shape
    half = cos.shape[-1] // 2
    rows, block, rest = batch * heads * tokens, next_power_of_2(half), head_dim - 2 * half
    tile_rows = max(ELEMENTS_PER_PROGRAM // next_power_of_2(head_dim), 1)
    arguments = (
        x,
        *strides,
        cos,
        *cos_strides,
        sin,
        *sin_strides,
        out,
        rows,
        heads,
        tokens,
        half,
        head_dim,
    )
    constants = inverse, tile_rows, block, next_power_of_2(rest) if rest else 0
    launch(rotary_kernel, cdiv(rows, tile_rows), arguments, constants, 4, 1, device)
