"""log p(target) and the entropy of p = softmax(z / T) for a chunk of logits z, and the gradient of both in place.

The products are the vendor's. With d = (z − row_max) / T, s = Σ e^d and u = Σ d·e^d:

    log_prob = d[target] − log s,  entropy = log s − u / s.

The gradient of z is (g·(1[target] − p) − h·p·(log p + entropy)) / T for the upstream gradients g and h, times the slope
of the cap.

Forward: one program processes one row and computes row_max, s and u online, in float32. A row is read once, for about
15 FLOPs and one exponential per logit. Backward: the logits are computed again, and one pass by columns reads and
writes them once: a program has BLOCK columns of ROWS_PER_PARTIAL rows. If the gradient of a bias is wanted, it adds
what it writes before it is rounded to 16 bits. The partial sums are added in a fixed order, without atomics.
"""

import triton
import triton.language as tl

from fastlm.kernels.launch import launch
from fastlm.kernels.logits import LOG2E, ROWS_PER_PARTIAL, load_logits, num_partials, slope, transformed
from fastlm.kernels.sizes import cdiv, next_power_of_2

BLOCK = 2048  # logits of a row in registers at a time, with three statistics of each lane
COLUMNS = 1024  # of a program of the backward


@triton.jit(do_not_specialize=["ignore_index"])
def linear_log_prob_forward_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    log_prob_ptr,
    entropy_ptr,
    row_max_ptr,
    row_sum_ptr,
    vocab,
    ignore_index,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits: (rows, vocab). A target out of range fails a device assert."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(target_ptr + row * target_stride)
    ignored = target == ignore_index
    tl.device_assert(
        ignored | ((target >= 0) & (target < vocab)), "target: expected values in [0, vocabulary) or ignore_index"
    )
    if ignored:
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(row_sum_ptr + row, 1.0)
    else:
        logit = transformed(tl.load(logits_ptr + target), 1.0, softcap, SOFTCAP)
        lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)  # per lane, reduced at the end
        lane_sum = tl.zeros((BLOCK,), tl.float32)
        lane_weighted = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocab, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = load_logits(logits_ptr, column, vocab, 1.0, softcap, SOFTCAP)
            # One exponential serves both cases: the weight of z, or, if z is the new maximum, the decay of the sums.
            larger = z > lane_max
            distance = -tl.abs(z - lane_max) * inverse_temperature
            weight = tl.where(z == float("-inf"), 0.0, tl.exp2(distance * LOG2E))
            moved = lane_weighted + distance * lane_sum
            added = tl.where(weight == 0, 0.0, weight * tl.where(larger, moved, distance))  # 0 · −∞ counts as 0
            lane_weighted = tl.where(larger, 0.0, lane_weighted) + added
            lane_sum = tl.where(larger, lane_sum * weight + 1, lane_sum + weight)
            lane_max = tl.maximum(lane_max, z)
        row_max = tl.max(lane_max, 0)
        distance = (lane_max - row_max) * inverse_temperature
        weight = tl.exp2(distance * LOG2E)
        row_sum = tl.sum(lane_sum * weight, 0)
        weighted = tl.sum(tl.where(weight == 0, 0.0, weight * (lane_weighted + distance * lane_sum)), 0)
        log_sum = tl.log(row_sum)
        tl.store(log_prob_ptr + row, (logit - row_max) * inverse_temperature - log_sum)
        tl.store(entropy_ptr + row, log_sum - weighted / row_sum)
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, row_sum)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def linear_log_prob_backward_kernel(
    logits_ptr,
    logits_stride,
    target_ptr,
    target_stride,
    dlog_prob_ptr,
    dentropy_ptr,
    entropy_ptr,
    row_max_ptr,
    row_sum_ptr,
    partials_ptr,
    rows,
    vocab,
    ignore_index,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS_PER_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in place of the logits. partials: (num_partials, vocab), its sums over ROWS_PER_PARTIAL rows.

    dlog_prob, dentropy and partials may be None.
    """
    blocks = tl.cdiv(vocab, BLOCK)
    partial, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in range(partial * ROWS_PER_PARTIAL, tl.minimum((partial + 1) * ROWS_PER_PARTIAL, rows)):
        logits = logits_ptr + tl.cast(row, tl.int64) * logits_stride
        target = tl.load(target_ptr + tl.cast(row, tl.int64) * target_stride)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if target != ignore_index:
            z = load_logits(logits, column, vocab, 1.0, softcap, SOFTCAP)
            row_sum = tl.load(row_sum_ptr + row)
            distance = (z - tl.load(row_max_ptr + row)) * inverse_temperature
            p = tl.exp2(distance * LOG2E) * (1 / row_sum)
            if dlog_prob_ptr is not None:  # the difference cancels at the target
                gradient = (tl.where(column == target, 1.0, 0.0) - p) * tl.load(dlog_prob_ptr + row)
            if dentropy_ptr is not None:
                below_entropy = tl.load(entropy_ptr + row) - tl.log(row_sum)
                of_entropy = p * (tl.load(dentropy_ptr + row) * (distance + below_entropy))
                gradient -= tl.where(p == 0, 0.0, of_entropy)  # where the distance is −∞ too
            gradient *= inverse_temperature * slope(z, softcap, SOFTCAP)
        acc += gradient
        tl.store(logits + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)
    if partials_ptr is not None:
        tl.store(partials_ptr + tl.cast(partial, tl.int64) * vocab + column, acc, mask=column < vocab)


def linear_log_prob_forward(
    logits, target, log_prob, entropy, row_max, row_sum, ignore_index, temperature, softcap, device
):
    """logits: (rows, vocab) with unit last stride. target: (rows,), any stride. The results are (rows,) in float32."""
    rows, vocab = logits.shape
    block = min(next_power_of_2(vocab), BLOCK)
    arguments = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        log_prob,
        entropy,
        row_max,
        row_sum,
        vocab,
        ignore_index,
        1 / temperature,
        softcap,
    )
    constants = softcap != 0, block
    warps = max(1, min(8, block // 256))
    launch(linear_log_prob_forward_kernel, rows, arguments, constants, warps, 1, device, debug=True)


def linear_log_prob_backward(
    logits,
    target,
    dlog_prob,
    dentropy,
    entropy,
    row_max,
    row_sum,
    partials,
    ignore_index,
    temperature,
    softcap,
    device,
):
    """logits: (rows, vocab) with unit last stride; they become the gradient of the product.

    dlog_prob and dentropy: (rows,) in float32, or None for zeros. partials: (num_partials(rows), vocab) in float32 for
    partial sums of the gradient over the rows, or None.
    """
    rows, vocab = logits.shape
    block = min(next_power_of_2(vocab), COLUMNS)
    arguments = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        dlog_prob,
        dentropy,
        entropy,
        row_max,
        row_sum,
        partials,
        rows,
        vocab,
        ignore_index,
        1 / temperature,
        softcap,
    )
    programs = num_partials(rows) * cdiv(vocab, block)
    constants = softcap != 0, ROWS_PER_PARTIAL, block
    launch(linear_log_prob_backward_kernel, programs, arguments, constants, 4, 1, device)
