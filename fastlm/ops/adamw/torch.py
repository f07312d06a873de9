"""AdamW by PyTorch's own implementation, which also updates what no kernel of ours supports."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.adamw import adamw as functional_adamw

from fastlm.backends import torch as native
from fastlm.core.tracing import PLAIN_TYPES
from fastlm.ops.adamw.spec import AdamWImplementation, Update


def forward(call: Update):
    targets, masters = call.masters or call.parameters, call.masters
    moments = [*call.exp_avgs, *call.exp_avg_sqs, *call.max_exp_avg_sqs]
    fused = fusable([*targets, *moments], call.steps) and are_plain(call.gradients)
    found_inf = call.found_inf
    if found_inf is not None and not fused:  # only the fused kernels take it
        if not (found_inf == 0).item():
            if call.zero_gradients:
                torch._foreach_zero_(call.gradients)
            return ()
        found_inf = None
    if masters:  # a parameter changed by others replaces its master
        for p, master in zip(call.parameters, masters, strict=True):
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
    scaled = [gradient.to(target.dtype) for gradient, target in zip(call.gradients, targets, strict=True)]
    if fused:  # the other kernels compute in the dtype of the parameters, where float16 has no such small eps
        scaled = [gradient.contiguous() for gradient in scaled]
    if not (isinstance(call.factor, float) and call.factor == 1.0):
        scaled = list(torch._foreach_mul(scaled, call.factor))
    functional_adamw(
        targets,
        scaled,
        call.exp_avgs,
        call.exp_avg_sqs,
        call.max_exp_avg_sqs,
        call.steps,
        fused=fused or None,
        found_inf=found_inf,
        has_complex=any(p.is_complex() for p in targets),
        amsgrad=bool(call.max_exp_avg_sqs),
        beta1=call.beta1,
        beta2=call.beta2,
        lr=call.lr,
        weight_decay=call.weight_decay,
        eps=call.eps,
        maximize=False,
    )
    torch.autograd.graph.increment_version([*targets, *moments])  # PyTorch's fused kernels do not
    if masters:
        torch._foreach_copy_(call.parameters, masters)
    if call.zero_gradients:
        torch._foreach_zero_(call.gradients)
    return ()


def fusable(tensors: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether PyTorch's fused kernels can be used: they walk flat memory, and on a CPU they do not check strides."""
    first = tensors[0]
    if first.device.type not in ("cpu", "cuda", "xpu") or not first.is_floating_point():
        return False
    if steps[0].device != first.device:
        return False
    return are_plain(tensors) and all(x.is_contiguous() for x in tensors)


def are_plain(tensors: Sequence[Tensor]) -> bool:
    return all(type(x) in PLAIN_TYPES or isinstance(x, FakeTensor) for x in tensors)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    wide = torch.float64 if tensors[0].dtype in (torch.float64, torch.complex128) else torch.float32
    squares = [torch.linalg.vector_norm(x, dtype=x.dtype if x.is_complex() else wide).square() for x in tensors]
    # A DTensor's sum is over all processes.
    return torch.stack([s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]).sum()


implementation = AdamWImplementation(native.backend, forward, sum_of_squares=sum_of_squares, takes_found_inf=True)
