"""Dropout: Philox-4x32-10 with the counters of every other backend (fastlm/backends/philox.py is the definition), so that the masks are the same bit for bit.

One counter gives the four words of columns c, c + 16, c + 32 and c + 48 of a block of 64. A tile computes each counter once and spreads its words.
"""

import triton
import triton.language as tl


@triton.jit
def spread(words, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ACROSS: tl.constexpr):
    """Four words each (ROWS, BLOCKS · 16), or (BLOCKS · 16, ROWS) if ACROSS, in the order of the columns: (ROWS, BLOCKS · 64), or its transpose."""
    # join adds a last dimension: [..., i, j] is word 2i + j
    four = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    if ACROSS:
        spread = tl.reshape(tl.permute(tl.reshape(four, (BLOCKS, 16, ROWS, 4)), (0, 3, 1, 2)), (BLOCKS * 64, ROWS))
    else:
        spread = tl.reshape(tl.permute(tl.reshape(four, (ROWS, BLOCKS, 16, 4)), (0, 1, 3, 2)), (ROWS, BLOCKS * 64))
    return spread


@triton.jit
def kept(seed, rows, first_column, third, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr):
    """Which elements of a tile dropout keeps: (ROWS, COLUMNS), or (COLUMNS, ROWS) if ACROSS.

    rows: (ROWS,) numbers of the rows; first_column: a multiple of COLUMNS, which is 16, 32 or a multiple of 64; third: a number, or one for each row.
    """
    # Explicit uint32 counters: with wider ones tl.philox is another generator.
    lanes: tl.constexpr = 16 if COLUMNS < 64 else COLUMNS // 4
    at = tl.arange(0, lanes)
    if COLUMNS < 64:
        column = (first_column // 64 * 16 + at).to(tl.uint32)
    else:
        column = (first_column // 4 + at).to(tl.uint32)  # 16 counters for 64 columns
    row, other = rows.to(tl.uint32), (third + tl.zeros_like(rows)).to(tl.uint32)
    if ACROSS:
        c0 = tl.broadcast_to(column[:, None], (lanes, ROWS))
        c1, c2 = tl.broadcast_to(row[None, :], (lanes, ROWS)), tl.broadcast_to(other[None, :], (lanes, ROWS))
    else:
        c0 = tl.broadcast_to(column[None, :], (ROWS, lanes))
        c1, c2 = tl.broadcast_to(row[:, None], (ROWS, lanes)), tl.broadcast_to(other[:, None], (ROWS, lanes))
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    if COLUMNS >= 64:
        words = spread((w0, w1, w2, w3), ROWS, COLUMNS // 64, ACROSS)
    elif COLUMNS == 32:
        late = first_column % 64 >= 32
        pair = tl.join(tl.where(late, w2, w0), tl.where(late, w3, w1))
        words = tl.reshape(tl.permute(pair, (2, 0, 1) if ACROSS else (0, 2, 1)), (32, ROWS) if ACROSS else (ROWS, 32))
    else:
        which = first_column % 64 // 16
        words = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return words >= threshold.to(tl.uint32)


@triton.jit
def kept_each(seed, rows, columns, third, threshold):
    """kept, element by element, at four times the work. rows: a vector, and columns a number, or the other way round."""
    zero = rows * 0 + columns * 0
    counter, row, other = (
        (columns // 64 * 16 + columns % 16 + zero).to(tl.uint32),
        (rows + zero).to(tl.uint32),
        (third + zero).to(tl.uint32),
    )
    w0, w1, w2, w3 = tl.philox(seed, counter, row, other, zero.to(tl.uint32))
    which = columns % 64 // 16
    return tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3))) >= threshold.to(tl.uint32)
