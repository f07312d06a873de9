"""linear_cross_entropy in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.reference import gradients, linear
from fastlm.ops.linear_cross_entropy.spec import Forward, Settings


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Check the values on a CPU. On a GPU, where this would synchronise, indexing with them is a device assert."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if wrong.any():
        raise target_out_of_range(target, tuple(wrong.nonzero()[0].tolist()), vocab, ignore_index)


def target_out_of_range(target: Tensor, position: tuple[int, ...], vocab: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"target: expected values in [0, {vocab}), the vocabulary, or ignore_index {ignore_index}, "
        f"got {target[position]} at {list(position)}"
    )


def transformed(logits: Tensor, settings: Settings) -> Tensor:
    """The logits scaled and capped."""
    if settings.logit_scale != 1:
        logits = logits * settings.logit_scale
    return settings.softcap * torch.tanh(logits / settings.softcap) if settings.softcap else logits


@no_autocast
def row_losses(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, settings: Settings) -> Tensor:
    """−log p(target) of every row, 0 where the target is ignored; float32, or float64 for float64 inputs."""
    label_smoothing = settings.label_smoothing
    logits = transformed(linear(*widen(x, weight, bias), "linear"), settings)
    log_p = torch.log_softmax(logits, -1)
    ignored = target == settings.ignore_index
    picked = log_p.gather(-1, torch.where(ignored, 0, target)[..., None])[..., 0]
    losses = -(1 - label_smoothing) * picked
    if label_smoothing:  # the mean is −∞ where a logit is
        losses = losses - label_smoothing * log_p.mean(-1)
    return torch.where(ignored, 0, losses)


@no_autocast
def forward(call: Forward):
    x, weight, bias, target, row_scale, needed = *call[:5], call.needed
    vocab, ignore_index, label_smoothing = weight.shape[0], call.ignore_index, call.label_smoothing
    check_targets(target, vocab, ignore_index)
    loss = row_losses(x, weight, bias, target, call.settings()).contiguous()
    if not any(needed):
        return loss, None, None, None
    wide, w, b = widen(x, weight, bias)
    logits = transformed(linear(wide, w, b, "linear"), call.settings())
    dlogits = torch.softmax(logits, -1) - label_smoothing / vocab
    ignored = (target == ignore_index)[..., None]
    one_hot = dlogits.new_full((*target.shape, 1), label_smoothing - 1)
    dlogits.scatter_add_(-1, torch.where(ignored, 0, target[..., None]), one_hot)
    dlogits = torch.where(ignored, 0, dlogits * row_scale[..., None] * call.logit_scale)
    if call.softcap:
        dlogits = dlogits * (1 - (logits / call.softcap) ** 2)
    return loss, *narrow(x.dtype, *gradients(dlogits, wide, w, "linear", needed))


implementation = Implementation(reference.backend, forward)
