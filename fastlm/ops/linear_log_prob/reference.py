"""linear_log_prob in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.reference import gradients, linear
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_log_prob.spec import Backward, Forward, Settings


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def of_logits(logits: Tensor, target: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(log_prob, entropy) by the capped logits."""
    log_p = torch.log_softmax(logits / settings.temperature, -1)
    ignored = target == settings.ignore_index
    log_prob = log_p.gather(-1, torch.where(ignored, 0, target)[..., None])[..., 0]
    # 0 · −∞ counts as 0.
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return torch.where(ignored, 0, log_prob), torch.where(ignored, 0, entropy)


@no_autocast
def linear_log_prob(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """In float32, or float64 for float64 inputs."""
    logits = linear(*widen(x, weight, bias), "linear")
    return of_logits(capped(logits, settings.softcap), target, settings)


@no_autocast
def forward(call: Forward):
    check_targets(call.target, call.weight.shape[0], call.ignore_index)
    logits = capped(linear(*widen(call.x, call.weight, call.bias), "linear"), call.softcap)
    row_max = logits.amax(-1)
    row_sum = ((logits - row_max[..., None]) / call.temperature).exp().sum(-1)
    results = *of_logits(logits, call.target, call.settings()), row_max, row_sum
    return tuple(result.contiguous() for result in results)


@no_autocast
def backward(call: Backward):
    x, w, b = widen(call.x, call.weight, call.bias)
    logits = capped(linear(x, w, b, "linear"), call.softcap)
    ignored = (call.target == call.ignore_index)[..., None]
    log_p = torch.log_softmax(logits / call.temperature, -1)
    p, dlogits = log_p.exp(), torch.zeros_like(logits)
    if call.dlog_prob is not None:
        dlogits = dlogits - p * call.dlog_prob[..., None]
        dlogits.scatter_add_(-1, torch.where(ignored, 0, call.target[..., None]), call.dlog_prob[..., None])
    if call.dentropy is not None:
        below = torch.where(log_p == -torch.inf, 0, log_p)
        dlogits = dlogits - p * (below + call.entropy[..., None]) * call.dentropy[..., None]
    if call.softcap:
        dlogits = dlogits * (1 - (logits / call.softcap) ** 2)
    dlogits = torch.where(ignored, 0, dlogits / call.temperature)
    return narrow(call.x.dtype, *gradients(dlogits, x, w, "linear", call.needed))


implementation = Implementation(reference.backend, forward, backward)
