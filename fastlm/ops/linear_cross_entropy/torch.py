"""linear_cross_entropy by PyTorch's operators.

Products are taken by chunks of rows. Within a chunk, blocks that stay in the cache are swept: the logits of a block
become its softmax and then its gradient, in the same memory, in float32.
"""

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.torch import flat_rows
from fastlm.ops.linear_cross_entropy.reference import check_targets, transformed
from fastlm.ops.linear_cross_entropy.spec import Forward, Settings

aten = torch.ops.aten
LOGITS_BYTES = 64 << 20  # of one chunk, in all the dtypes it is held in


@no_autocast
def forward(call: Forward):
    x, weight, bias, target, row_scale, needed = *call[:5], call.needed
    needs_dx, needs_dweight, needs_dbias = needed
    vocab = weight.shape[0]
    check_targets(target, vocab, call.ignore_index)
    flat, targets = flat_rows(x), target.reshape(-1)
    row_scale = row_scale if row_scale is None else row_scale.reshape(-1)
    rows = flat.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(rows, dtype=wide)
    dx = x.new_empty(flat.shape) if needs_dx else None
    dweight = None if rows else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_zeros(vocab, dtype=wide) if needs_dbias else None
    chunk = min(rows, max(1, LOGITS_BYTES * 15 // 16 // (vocab * x.element_size())))
    block = min(chunk, max(1, LOGITS_BYTES // 16 // (vocab * wide.itemsize)))
    chunk_logits = x.new_empty(chunk, vocab)
    wide_logits = None if x.dtype == wide else x.new_empty(block, vocab, dtype=wide)
    for begin in range(0, rows, max(1, chunk)):
        x_chunk = flat[begin : begin + chunk]
        product = chunk_logits[: x_chunk.shape[0]]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=product)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=product)
        for first in range(0, x_chunk.shape[0], block):
            stored = product[first : first + block]
            at = slice(begin + first, begin + min(first + block, chunk))
            logits = stored if wide_logits is None else wide_logits[: stored.shape[0]].copy_(stored)
            scale = row_scale[at] if any(needed) else None
            loss[at] = losses_then_gradients(logits, targets[at], scale, call.settings())
            if dbias is not None:
                dbias += logits.sum(0)
            if wide_logits is not None and scale is not None:
                stored.copy_(logits)
        if dx is not None:
            torch.mm(product, weight, out=dx[begin : begin + chunk])
        if needs_dweight:
            dweight = add_product(dweight, product.t(), x_chunk, begin + chunk >= rows)
    return (
        loss.view(target.shape),
        dx if dx is None else dx.view(x.shape),
        dweight if needs_dweight else None,
        dbias if dbias is None else dbias.to(x.dtype),
    )


def losses_then_gradients(logits: Tensor, targets: Tensor, scale: Tensor | None, settings: Settings) -> Tensor:
    """The losses of some rows. Their logits become d(scale · loss)/d(logits), or without a scale the softmax."""
    ignore_index, label_smoothing, logit_scale, softcap = settings
    if logit_scale != 1:
        logits.mul_(logit_scale)
    slope = None
    if softcap:
        logits.div_(softcap).tanh_()
        slope = None if scale is None else 1 - logits * logits
        logits.mul_(softcap)
    ignored = targets == ignore_index
    wanted = torch.where(ignored, 0, targets)[:, None]
    # The sum of exponentials is 1 / the largest probability: no second sweep over them. All is relative to the largest
    # logit: the loss of a nearly certain target would be lost in the difference of two large numbers.
    row_max = logits.amax(1)
    losses = row_max - logits.gather(1, wanted)[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (row_max - logits.mean(1))
    aten._softmax.out(logits, 1, False, out=logits)
    losses = losses - logits.amax(1).log()
    if scale is not None:
        scale = scale.masked_fill(ignored, 0)[:, None] * logit_scale
        if label_smoothing:
            logits.sub_(label_smoothing / logits.shape[1])
        logits.mul_(scale).scatter_add_(1, wanted, scale * (label_smoothing - 1))
        if slope is not None:
            logits.mul_(slope)
    return losses.masked_fill_(ignored, 0)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, last: bool) -> Tensor:
    """total + a @ b. 16-bit products of several chunks are accumulated in float32 and rounded after the last."""
    if total is None:
        return torch.mm(a, b)
    if a.dtype in (torch.float32, torch.float64):
        return total.addmm_(a, b)
    product = torch.mm(a, b)
    return torch.add(total, product, out=product) if last else total.float().add_(product)


def composite(call: Forward, reduction: str):
    """All logits at once: of a matrix of rows, where they are no more than the other path holds of them."""
    x, weight, bias, target = call[:4]
    if x.dim() != 2 or x.dtype.itemsize < 4 or not 0 < x.shape[0] * weight.nbytes <= LOGITS_BYTES * x.shape[1]:
        return NotImplemented
    logits = transformed(torch.nn.functional.linear(x, weight, bias), call.settings())
    try:
        return torch.nn.functional.cross_entropy(
            logits, target, None, None, call.ignore_index, None, reduction, call.label_smoothing
        )
    except IndexError:
        check_targets(target, weight.shape[0], call.ignore_index)
        raise


implementation = Implementation(native.backend, forward, composite=composite)
