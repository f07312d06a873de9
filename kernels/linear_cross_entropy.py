"""From a chunk of logits to their losses and, in place, to the gradient of Σ row_scale · loss. The products on both sides are the vendor's.

One program takes one row: a first pass finds its largest logit and the sum of exponentials (in float32, online), a second writes
softmax − target. Bound by memory: a row is read twice and written once, the second time from the cache, as a row of 50257 logits in 16 bits is 100 KB. About
10 FLOPs per logit. Nothing of a row is kept but its loss.

Where the gradient of a bias is wanted too the second pass goes by columns: a program owns BLOCK columns of ROWS rows and adds up what it writes before it is
rounded to 16 bits. No atomics: the sums of the parts are added in order.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.sizes import cdiv, next_power_of_2

BLOCK = 4096  # logits of a row that are in registers at a time
ROWS = 64  # of a part, in the pass by columns
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["ignore_index"])
def linear_cross_entropy_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    row_scale_ptr,
    loss_ptr,
    top_ptr,
    norm_ptr,
    vocab,
    ignore_index,
    label_smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits: (rows, vocab), rows logits_stride apart. row_scale_ptr None: no gradient, the logits stay. top, norm: what the pass by columns needs, or None.

    A target out of range is a device assert.
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
        # Ahead of the reductions, where threads wait for one another: later one of them may have overwritten it, in the second pass, before another reads it.
        logit = tl.load(logits_ptr + target).to(tl.float32)
        tops = tl.full((BLOCK,), float("-inf"), tl.float32)  # lane by lane: one reduction at the end
        norms = tl.zeros((BLOCK,), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocab, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            new = tl.maximum(tops, z)
            base = tl.where(new == float("-inf"), 0.0, new)
            norms = norms * tl.exp2((tops - base) * LOG2E) + tl.exp2((z - base) * LOG2E)
            tops = new
            if SMOOTH:
                sums += tl.where(column < vocab, z, 0.0)
        top = tl.max(tops, 0)
        # relative to the largest: the loss of a target that is nearly certain is lost in the difference of two large numbers otherwise
        norm = tl.sum(tl.where(tops == float("-inf"), 0.0, norms * tl.exp2((tops - top) * LOG2E)), 0)
        loss = (top - logit) * (1 - label_smoothing) + tl.log(norm)
        if SMOOTH:
            loss += label_smoothing * (top - tl.sum(sums, 0) / vocab)
        tl.store(loss_ptr + row, loss)
        if top_ptr is not None:
            tl.store(top_ptr + row, top)
            tl.store(norm_ptr + row, norm)
        if row_scale_ptr is not None:
            scale = tl.load(row_scale_ptr + row)
            share = scale / norm
            uniform = scale * label_smoothing / vocab
            at_target = scale * (1 - label_smoothing)
            for begin in range(0, vocab, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                z = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
                gradient = tl.exp2((z - top) * LOG2E) * share - uniform
                gradient -= tl.where(column == target, at_target, 0.0)
                tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def linear_cross_entropy_columns_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    row_scale_ptr,
    top_ptr,
    norm_ptr,
    share_ptr,
    rows,
    vocab,
    ignore_index,
    label_smoothing,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in place of the logits, and its sum over ROWS rows in a row of share: (parts, vocab)."""
    blocks = tl.cdiv(vocab, BLOCK)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * ROWS, tl.minimum((part + 1) * ROWS, rows)):
        at = logits_ptr + tl.cast(row, tl.int64) * logits_stride + column
        target = tl.load(target_ptr + tl.cast(row, tl.int64) * target_stride)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if target != ignore_index:
            scale = tl.load(row_scale_ptr + row)
            z = tl.load(at, mask=column < vocab, other=float("-inf")).to(tl.float32)
            gradient = (
                tl.exp2((z - tl.load(top_ptr + row)) * LOG2E) * (scale / tl.load(norm_ptr + row))
                - scale * label_smoothing / vocab
            )
            gradient -= tl.where(column == target, scale * (1 - label_smoothing), 0.0)
        total += gradient
        tl.store(at, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)
    tl.store(share_ptr + tl.cast(part, tl.int64) * vocab + column, total, mask=column < vocab)


def parts(rows):
    return cdiv(rows, ROWS)


def linear_cross_entropy(logits, target, row_scale, loss, statistics, share, ignore_index, label_smoothing, device):
    """logits: (rows, vocab) with unit last stride: they become their gradient, unless row_scale is None. target: (rows,), any stride.

    share: (parts(rows), vocab) in float32 for the sums of that gradient over the rows, with statistics (2, rows or more) to work in; or None, both.
    """
    rows, vocab = logits.shape
    block = min(next_power_of_2(vocab), BLOCK)
    top, norm = (None, None) if share is None else statistics.unbind()
    arguments = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        row_scale if share is None else None,
        loss,
        top,
        norm,
        vocab,
        ignore_index,
        label_smoothing,
    )
    launch(
        linear_cross_entropy_kernel,
        rows,
        arguments,
        (label_smoothing != 0, block),
        max(1, min(8, block // 256)),
        1,
        device,
        debug=True,
    )
    if share is not None:
        block = min(block, 512)
        arguments = (
            logits,
            logits.stride(0),
            target,
            target.stride(0),
            row_scale,
            top,
            norm,
            share,
            rows,
            vocab,
            ignore_index,
            label_smoothing,
        )
        launch(
            linear_cross_entropy_columns_kernel,
            parts(rows) * cdiv(vocab, block),
            arguments,
            (ROWS, block),
            4,
            1,
            device,
        )
