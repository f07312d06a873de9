"""linear_cross_entropy in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.reference import gradients, linear
from fastlm.ops.linear_cross_entropy.spec import Forward


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


@no_autocast
def row_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """−log p(target) of every row, 0 where the target is ignored; float32, or float64 for float64 inputs."""
    logits = linear(*widen(x, weight, bias), "linear")
    log_p = torch.log_softmax(logits, -1)
    ignored = target == ignore_index
    picked = log_p.gather(-1, torch.where(ignored, 0, target)[..., None])[..., 0]
    return torch.where(ignored, 0, -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(-1))


@no_autocast
def forward(call: Forward):
    x, weight, bias, target, row_scale, ignore_index, label_smoothing, _, needed = call
    vocab = weight.shape[0]
    check_targets(target, vocab, ignore_index)
    loss = row_losses(x, weight, bias, target, ignore_index, label_smoothing).contiguous()
    if not any(needed):
        return loss, None, None, None
    wide, w, b = widen(x, weight, bias)
    dlogits = torch.softmax(linear(wide, w, b, "linear"), -1) - label_smoothing / vocab
    ignored = (target == ignore_index)[..., None]
    one_hot = dlogits.new_full((*target.shape, 1), label_smoothing - 1)
    dlogits.scatter_add_(-1, torch.where(ignored, 0, target[..., None]), one_hot)
    dlogits = torch.where(ignored, 0, dlogits * row_scale[..., None])
    return loss, *narrow(x.dtype, *gradients(dlogits, wide, w, "linear", needed))


implementation = Implementation(reference.backend, forward)
