"""The losses of a chunk of logits and, in place, the gradient of Σ row_scale · loss. The products are the vendor's.

One program processes one row: a first pass computes row_max and row_sum online, in float32, a second writes softmax −
target. Memory-bound: a row is read twice and written once, the second time from the cache, because a row of 50257
logits in 16 bits is 100 KB. About 10 FLOPs per logit. Logits are scaled and capped where they are read.

If the gradient of a bias is wanted too, the second pass goes by columns: a program has BLOCK columns of
ROWS_PER_PARTIAL rows and adds what it writes before it is rounded to 16 bits. The partial sums are added in a fixed
order, without atomics.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.logits import LOG2E, ROWS_PER_PARTIAL, load_logits, num_partials, slope, transformed
from fastlm.kernels.sizes import cdiv, next_power_of_2

BLOCK = 4096  # logits in registers at a time


@triton.jit(do_not_specialize=["ignore_index"])
def linear_cross_entropy_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    row_scale_ptr,
    loss_ptr,
    row_max_ptr,
    row_sum_ptr,
    vocab,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits: (rows, vocab). Without row_scale_ptr they stay unchanged.

    row_max and row_sum are for the pass by columns, or None. A target out of range fails a device assert.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(target_ptr + row * target_stride)
    ignored = target == ignore_index
    tl.device_assert(
        ignored | ((target >= 0) & (target < vocab)), "target: expected values in [0, vocabulary) or ignore_index"
    )
    if ignored:
        tl.store(loss_ptr + row, 0.0)
        if row_scale_ptr is not None:
            for begin in range(0, vocab, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                tl.store(logits_ptr + column, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=column < vocab)
    else:
        # Loaded before the reductions, which synchronise the threads: the second pass overwrites it.
        logit = transformed(tl.load(logits_ptr + target), logit_scale, softcap, SOFTCAP)
        lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)  # per lane, reduced at the end
        lane_sum = tl.zeros((BLOCK,), tl.float32)
        shifted_sum = tl.zeros((BLOCK,), tl.float32)  # of z − lane_max: z itself may be large and nearly equal
        for begin in range(0, vocab, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = load_logits(logits_ptr, column, vocab, logit_scale, softcap, SOFTCAP)
            new_max = tl.maximum(lane_max, z)
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            lane_sum = lane_sum * tl.exp2((lane_max - safe_max) * LOG2E) + tl.exp2((z - safe_max) * LOG2E)
            if SMOOTH:
                count = begin // BLOCK
                shifted_sum += count * tl.where(lane_max == float("-inf"), 0.0, lane_max - safe_max)
                shifted_sum += tl.where(column < vocab, z - safe_max, 0.0)
            lane_max = new_max
        row_max = tl.max(lane_max, 0)
        # Relative to row_max: otherwise the loss of an almost certain target is a difference of two large numbers.
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        # A lane without logits has a sum of 0, one whose only logit is NaN a sum of NaN and the same maximum, −inf.
        row_sum = tl.sum(lane_sum * tl.exp2((lane_max - shift) * LOG2E), 0)
        loss = (row_max - logit) * (1 - label_smoothing) + tl.log(row_sum)
        if SMOOTH:
            count = tl.cdiv(vocab - tl.arange(0, BLOCK), BLOCK)
            shifted_sum += tl.where(lane_max == float("-inf"), 0.0, count * (lane_max - row_max))
            loss -= label_smoothing * (tl.sum(shifted_sum, 0) / vocab)
        tl.store(loss_ptr + row, loss)
        if row_max_ptr is not None:
            tl.store(row_max_ptr + row, row_max)
            tl.store(row_sum_ptr + row, row_sum)
        if row_scale_ptr is not None:
            scale = tl.load(row_scale_ptr + row) * logit_scale
            factor = scale / row_sum
            uniform = scale * label_smoothing / vocab
            at_target = scale * (1 - label_smoothing)
            for begin in range(0, vocab, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                z = load_logits(logits_ptr, column, vocab, logit_scale, softcap, SOFTCAP)
                gradient = tl.exp2((z - row_max) * LOG2E) * factor - uniform
                gradient -= tl.where(column == target, at_target, 0.0)
                gradient *= slope(z, softcap, SOFTCAP)
                tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def linear_cross_entropy_columns_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    row_scale_ptr,
    row_max_ptr,
    row_sum_ptr,
    partials_ptr,
    rows,
    vocab,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS_PER_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in place of the logits. partials: (num_partials, vocab), its sums over ROWS_PER_PARTIAL rows."""
    blocks = tl.cdiv(vocab, BLOCK)
    partial, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in range(partial * ROWS_PER_PARTIAL, tl.minimum((partial + 1) * ROWS_PER_PARTIAL, rows)):
        logits = logits_ptr + tl.cast(row, tl.int64) * logits_stride
        target = tl.load(target_ptr + tl.cast(row, tl.int64) * target_stride)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if target != ignore_index:
            scale = tl.load(row_scale_ptr + row) * logit_scale
            z = load_logits(logits, column, vocab, logit_scale, softcap, SOFTCAP)
            gradient = (
                tl.exp2((z - tl.load(row_max_ptr + row)) * LOG2E) * (scale / tl.load(row_sum_ptr + row))
                - scale * label_smoothing / vocab
            )
            gradient -= tl.where(column == target, scale * (1 - label_smoothing), 0.0)
            gradient *= slope(z, softcap, SOFTCAP)
        acc += gradient
        tl.store(logits + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)
    tl.store(partials_ptr + tl.cast(partial, tl.int64) * vocab + column, acc, mask=column < vocab)


def linear_cross_entropy(
    logits,
    target,
    row_scale,
    loss,
    statistics,
    partials,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    device,
):
    """logits: (rows, vocab) with unit last stride; they become their gradient, unless row_scale is None.

    target: (rows,), any stride. partials: (num_partials(rows), vocab) in float32 for partial sums of the gradient over
    the rows, with statistics (2, rows or more) as workspace; or both None.
    """
    rows, vocab = logits.shape
    # With label smoothing there is one more partial sum per logit, for which 4096 logits leave no registers.
    block = min(next_power_of_2(vocab), BLOCK // 2 if label_smoothing else BLOCK)
    row_max, row_sum = (None, None) if partials is None else statistics.unbind()
    arguments = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        row_scale if partials is None else None,
        loss,
        row_max,
        row_sum,
        vocab,
        ignore_index,
        label_smoothing,
        logit_scale,
        softcap,
    )
    launch(
        linear_cross_entropy_kernel,
        rows,
        arguments,
        (label_smoothing != 0, softcap != 0, block),
        max(1, min(8, block // 256)),
        1,
        device,
        debug=True,
    )
    if partials is not None:
        block = min(block, 512)
        arguments = (
            logits,
            logits.stride(0),
            target,
            target.stride(0),
            row_scale,
            row_max,
            row_sum,
            partials,
            rows,
            vocab,
            ignore_index,
            label_smoothing,
            logit_scale,
            softcap,
        )
        launch(
            linear_cross_entropy_columns_kernel,
            num_partials(rows) * cdiv(vocab, block),
            arguments,
            (softcap != 0, ROWS_PER_PARTIAL, block),
            4,
            1,
            device,
        )
