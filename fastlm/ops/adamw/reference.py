"""AdamW in plain PyTorch: the definition (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.reference import widen
from fastlm.ops.adamw.spec import AdamWImplementation, Sizes, Update


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    return ["has no amsgrad"] if sizes.amsgrad else []


def forward(call: Update):
    lists = (
        call.parameters,
        call.gradients,
        call.exp_avgs,
        call.exp_avg_sqs,
        call.masters or call.parameters,
        call.steps,
    )
    beta1, beta2 = call.beta1, call.beta2
    for p, gradient, exp_avg, exp_avg_sq, master, step in zip(*lists, strict=True):
        t = step.add_(1).item()
        g, m, v, w, master_w = widen(gradient, exp_avg, exp_avg_sq, p, master)
        g = g * call.factor
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = torch.where(master.to(p.dtype) == p, master_w, w)  # a parameter changed by others replaces its master
        denominator = v.sqrt() / math.sqrt(1 - beta2**t) + call.eps
        w = w * (1 - call.lr * call.weight_decay) - call.lr / (1 - beta1**t) * m / denominator
        for target, value in ((exp_avg, m), (exp_avg_sq, v), (p, w), (master, w)):
            target.copy_(value)
        if call.zero_gradients:
            gradient.zero_()
    return ()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return sum(widen(x)[0].square().sum(dtype=torch.float64) for x in tensors)


implementation = AdamWImplementation(reference.backend, forward, refuses=refuses, sum_of_squares=sum_of_squares)
