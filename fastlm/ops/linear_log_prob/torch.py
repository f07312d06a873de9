"""linear_log_prob by PyTorch's operators, by chunks of rows whose logits are replaced in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.torch import flat_rows
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_cross_entropy.torch import add_product
from fastlm.ops.linear_log_prob.reference import capped
from fastlm.ops.linear_log_prob.spec import Backward, Forward

LOGITS_BYTES = 64 << 20  # of one chunk, with all that is derived from it
COPIES = 4


def chunks_of_logits(call: Forward | Backward) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their capped logits in float32 or float64)."""
    x, weight, wide = flat_rows(call.x), call.weight, torch.promote_types(call.x.dtype, torch.float32)
    size = max(1, LOGITS_BYTES // (COPIES * weight.shape[0] * wide.itemsize))
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, min(begin + size, x.shape[0]))
        logits = torch.nn.functional.linear(x[rows], weight, call.bias).to(wide)
        yield rows, capped(logits, call.softcap)


@no_autocast
def forward(call: Forward):
    check_targets(call.target, call.weight.shape[0], call.ignore_index)
    target = call.target.reshape(-1)
    wide = torch.promote_types(call.x.dtype, torch.float32)
    log_prob, entropy, row_max, row_sum = (call.x.new_empty(target.shape, dtype=wide) for _ in range(4))
    ignored = target == call.ignore_index
    picked = torch.where(ignored, 0, target)[:, None]
    for rows, logits in chunks_of_logits(call):
        row_max[rows] = logits.amax(1)
        below = logits.sub_(row_max[rows, None]).div_(call.temperature)
        log_prob[rows] = below.gather(1, picked[rows])[:, 0]
        weights = below.exp()
        row_sum[rows] = weights.sum(1)
        # A weight of 0 times −∞ counts as 0.
        entropy[rows] = -below.mul_(weights).masked_fill_(weights == 0, 0).sum(1) / row_sum[rows]
    log_sum = row_sum.log()
    log_prob.sub_(log_sum).masked_fill_(ignored, 0)
    entropy.add_(log_sum).masked_fill_(ignored, 0)
    return tuple(result.view(call.target.shape) for result in (log_prob, entropy, row_max, row_sum))


@no_autocast
def backward(call: Backward):
    x, weight, target = flat_rows(call.x), call.weight, call.target.reshape(-1)
    needs_dx, needs_dweight, needs_dbias = call.needed
    entropy, row_max, row_sum = (each.reshape(-1, 1) for each in (call.entropy, call.row_max, call.row_sum))
    ignored = (target == call.ignore_index)[:, None]
    picked = torch.where(ignored, 0, target[:, None])
    upstream = (None if d is None else d.reshape(-1, 1) for d in (call.dlog_prob, call.dentropy))
    of_log_prob, of_entropy = (None if d is None else torch.where(ignored, 0, d / call.temperature) for d in upstream)
    log_sum = row_sum.log()
    dx = x.new_empty(x.shape) if needs_dx else None
    dweight = None if x.shape[0] else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_zeros(weight.shape[0], dtype=row_sum.dtype) if needs_dbias else None
    for rows, logits in chunks_of_logits(call):
        slope = 1 - (logits / call.softcap).square_() if call.softcap else None
        below = logits.sub_(row_max[rows]).div_(call.temperature)
        p = below.exp().div_(row_sum[rows])
        if of_entropy is None:
            dlogits = below.zero_()
        else:
            dlogits = below.add_(entropy[rows] - log_sum[rows]).mul_(of_entropy[rows])
            dlogits = dlogits.mul_(p).neg_().masked_fill_(p == 0, 0)
        if of_log_prob is not None:
            # p − 1 at the target is exact, where p·log_prob would round the entropy's part away.
            p.scatter_add_(1, picked[rows], p.new_full((), -1.0).expand(p.shape[0], 1))
            dlogits.addcmul_(p, of_log_prob[rows], value=-1)
        dlogits.masked_fill_(ignored[rows], 0)
        if slope is not None:
            dlogits.mul_(slope)
        if dbias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(x.dtype)
        if dx is not None:
            torch.mm(dlogits, weight, out=dx[rows])
        if needs_dweight:
            dweight = add_product(dweight, dlogits.t(), x[rows], rows.stop == x.shape[0])
    return (
        dx if dx is None else dx.view(call.x.shape),
        dweight if needs_dweight else None,
        dbias if dbias is None else dbias.to(x.dtype),
    )


implementation = Implementation(native.backend, forward, backward)
