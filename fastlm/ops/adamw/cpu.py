"""AdamW by the C++ kernel (csrc/cpu/adamw.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.cpu import kernels
from fastlm.core.errors import mismatch
from fastlm.core.layout import is_dense, with_strides_of
from fastlm.ops.adamw.spec import AdamWImplementation, Sizes, Update

REFUSALS = {
    "amsgrad": "has no amsgrad",
    "gaps": "updates parameters that are dense in memory",
    "mixed": "takes gradients in their parameter's dtype",
    "subclass": "takes plain tensors",
}
SCALAR = torch.zeros((), device="cpu")


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [reason for name, reason in REFUSALS.items() if getattr(sizes, name)]


def forward(call: Update):
    parameters, masters, steps = call.parameters, call.masters, call.steps
    if not parameters:
        return ()
    gradients = [with_strides_of(gradient, p) for gradient, p in zip(call.gradients, parameters, strict=True)]
    moment_dtype = call.exp_avgs[0].dtype
    check_state("gradient", gradients, parameters, parameters[0].dtype)
    check_state("exp_avg", call.exp_avgs, parameters, moment_dtype)
    check_state("exp_avg_sq", call.exp_avg_sqs, parameters, moment_dtype)
    check_state("master_param", masters, parameters[: len(masters)], torch.float32)
    check_state("step", steps, [SCALAR] * len(parameters), torch.float32)
    addresses = {p.data_ptr() for p in parameters}
    # Two parameters that share memory (views of a tensor, say) are updated one after the other.
    runs = [slice(None)] if len(addresses) == len(parameters) else [slice(i, i + 1) for i in range(len(parameters))]
    for run in runs:
        kernels.adamw(
            parameters=parameters[run],
            gradients=gradients[run],
            exp_avgs=call.exp_avgs[run],
            exp_avg_sqs=call.exp_avg_sqs[run],
            masters=masters[run],
            steps=steps[run],
            lr=call.lr,
            beta1=call.beta1,
            beta2=call.beta2,
            eps=call.eps,
            weight_decay=call.weight_decay,
            factor=float(call.factor),
            zero_gradients=call.zero_gradients,
            threads=cpu.threads(),
        )
    written = [*parameters, *call.exp_avgs, *call.exp_avg_sqs, *masters, *steps]
    if call.zero_gradients:
        written += call.gradients
        for copy, gradient in zip(gradients, call.gradients, strict=True):
            if copy is not gradient:
                gradient.zero_()
    torch.autograd.graph.increment_version(written)  # autograd then notices that a saved tensor was changed
    return ()


def check_state(name: str, tensors: Sequence[Tensor], parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
    """State is the user's to load and change: what does not fit its parameter must not reach the kernel."""
    for x, p in zip(tensors, parameters, strict=True):
        same_order = x.stride() == p.stride() or (x.is_contiguous() and p.is_contiguous())
        if x.dtype != dtype or not x.is_cpu or x.shape != p.shape or not same_order:
            expected = f"{dtype} on cpu, shape {tuple(p.shape)} and strides {p.stride()} as its parameter's"
            got = f"{x.dtype} on {x.device}, shape {tuple(x.shape)} and strides {x.stride()}"
            raise mismatch(name, expected, got)


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    dense = [x if x.is_contiguous() or is_dense(x) else x.contiguous() for x in tensors]
    return kernels.sum_of_squares(tensors=dense, threads=cpu.threads())


implementation = AdamWImplementation(cpu.backend, forward, refuses=refuses, sum_of_squares=sum_of_squares)
