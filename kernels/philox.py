"""Dropout: Philox-4x32-10 with the same counters as all other backends, so the masks are bit-identical.

fastlm/core/philox.py defines them. One counter gives the words of columns c, c + 16, c + 32 and c + 48 of a block of
64. A tile computes each counter once.
"""

import triton
import triton.language as tl


@triton.jit
def spread(words, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Four words, each (ROWS, BLOCKS · 16), as (ROWS, BLOCKS · 64) in the order of columns; or all transposed."""
    # join adds a last dimension: [..., i, j] is word 2i + j.
    words_of_columns = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    if TRANSPOSED:
        spread = tl.reshape(
            tl.permute(tl.reshape(words_of_columns, (BLOCKS, 16, ROWS, 4)), (0, 3, 1, 2)), (BLOCKS * 64, ROWS)
        )
    else:
        spread = tl.reshape(
            tl.permute(tl.reshape(words_of_columns, (ROWS, BLOCKS, 16, 4)), (0, 1, 3, 2)), (ROWS, BLOCKS * 64)
        )
    return spread


@triton.jit
def kept(
    seed, rows, first_column, batch_head, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The elements of a tile that dropout keeps: (ROWS, COLUMNS), or (COLUMNS, ROWS) if TRANSPOSED.

    rows: (ROWS,) row numbers. first_column: a multiple of COLUMNS, which is 16, 32 or a multiple of 64. batch_head: a
    scalar, or (ROWS,).
    """
    # With 64-bit counters tl.philox is another generator.
    lanes: tl.constexpr = 16 if COLUMNS < 64 else COLUMNS // 4
    at = tl.arange(0, lanes)
    if COLUMNS < 64:
        column = (first_column // 64 * 16 + at).to(tl.uint32)
    else:
        column = (first_column // 4 + at).to(tl.uint32)  # 16 counters for 64 columns
    row, batch_heads = rows.to(tl.uint32), (batch_head + tl.zeros_like(rows)).to(tl.uint32)
    if TRANSPOSED:
        c0 = tl.broadcast_to(column[:, None], (lanes, ROWS))
        c1, c2 = tl.broadcast_to(row[None, :], (lanes, ROWS)), tl.broadcast_to(batch_heads[None, :], (lanes, ROWS))
    else:
        c0 = tl.broadcast_to(column[None, :], (ROWS, lanes))
        c1, c2 = tl.broadcast_to(row[:, None], (ROWS, lanes)), tl.broadcast_to(batch_heads[:, None], (ROWS, lanes))
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    if COLUMNS >= 64:
        words = spread((w0, w1, w2, w3), ROWS, COLUMNS // 64, TRANSPOSED)
    elif COLUMNS == 32:
        second_half = first_column % 64 >= 32
        pair = tl.join(tl.where(second_half, w2, w0), tl.where(second_half, w3, w1))
        words = tl.reshape(
            tl.permute(pair, (2, 0, 1) if TRANSPOSED else (0, 2, 1)), (32, ROWS) if TRANSPOSED else (ROWS, 32)
        )
    else:
        word = first_column % 64 // 16
        words = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return words >= threshold.to(tl.uint32)


@triton.jit
def kept_each(seed, rows, columns, batch_head, threshold):
    """kept, with one counter per element, at four times the cost. rows or columns is a vector, the other a scalar."""
    zero = rows * 0 + columns * 0
    counter, row, batch_heads = (
        (columns // 64 * 16 + columns % 16 + zero).to(tl.uint32),
        (rows + zero).to(tl.uint32),
        (batch_head + zero).to(tl.uint32),
    )
    w0, w1, w2, w3 = tl.philox(seed, counter, row, batch_heads, zero.to(tl.uint32))
    word = columns % 64 // 16
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))) >= threshold.to(tl.uint32)
