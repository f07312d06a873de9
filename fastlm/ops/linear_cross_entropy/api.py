"""The public function: checks and documentation."""

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_with_originals
from fastlm.core.errors import (
    check_choice,
    check_float32,
    check_floating,
    check_integer,
    check_like,
    check_number,
    check_rows,
    check_softcap,
    check_tensor,
    check_vector,
    mismatch,
)
from fastlm.ops.linear.api import check_weight
from fastlm.ops.linear_cross_entropy.autograd import NO_GRADIENTS, operator
from fastlm.ops.linear_cross_entropy.spec import REDUCTIONS, Forward
from fastlm.ops.operator import check_memory


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), target) without the logits: rows × vocabulary never exist at once.

    Where gradients are wanted they are computed in the forward pass, chunk by chunk of rows, while the logits of the
    chunk exist.

    Args:
        x: (..., width), floating point, any strides. Under autocast x, weight and bias are cast as for
            `torch.nn.functional.linear`.
        weight: (vocab, width): the output projection, often the token embedding itself; dtype and device of x.
        target: (...), int64: class indices in [0, vocab), or ignore_index. Class probabilities are not supported.
        bias: (vocab,) or None.
        ignore_index: a row with this target has loss 0 and no gradient, and "mean" does not count it.
        reduction: "mean" (over the rows that are not ignored; NaN if there are none), "sum" or "none".
        label_smoothing: in [0, 1]: this share of the target's probability is spread over the whole vocabulary.
        token_weight: like target, floating point: the factor of each row's loss. "mean" divides by the sum of the
            weights of the rows that are not ignored (NaN if it is 0), as `torch.nn.functional.cross_entropy` does with
            weights of classes. Where it requires a gradient, the backward recomputes the logits.
        logit_scale: positive: the logits are multiplied by it (Cohere, Granite).
        softcap: positive, or None: the scaled logits z become softcap · tanh(z / softcap) (Gemma 2).
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        The loss in float32 (float64 for float64), whatever the dtype of x: a scalar, or like target with
        reduction="none".

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. A target out of range is named
            with its value and position (on a GPU it is a device assert).
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("target", target)
    if bias is not None:
        check_tensor("bias", bias)
    originals: tuple = ()
    if autocast_enabled(x):
        check_memory(("x", "weight", "bias"), x, weight, bias)
        x, originals, weight, bias = cast_with_originals(x, weight, bias)
    check_rows(x)
    check_operands(x, weight, target, bias)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_integer("ignore_index", ignore_index)
    label_smoothing = check_number("label_smoothing", label_smoothing, "a share in [0, 1]")
    if not 0 <= label_smoothing <= 1:
        raise mismatch("label_smoothing", "a share in [0, 1]", label_smoothing)
    if token_weight is not None:
        token_weight = check_token_weight(token_weight, x, target)
    if type(logit_scale) is not float or logit_scale != 1:
        logit_scale = check_float32("logit_scale", logit_scale)
    softcap = check_softcap(softcap)
    settings = ignore_index, label_smoothing, logit_scale, softcap
    call = Forward(x, weight, bias, target, None, *settings, False, NO_GRADIENTS)
    return operator.loss(call, token_weight, reduction, backend, originals)


def check_operands(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    vocab = check_weight("weight", weight, x.shape[-1], "linear", "the last dimension of x")
    check_like("weight", weight, x)
    if target.dtype.is_floating_point:
        raise mismatch("target", "class indices in int64 (class probabilities are not supported)", target.dtype)
    if target.dtype != torch.int64 or target.device != x.device:
        raise mismatch("target", f"torch.int64 on {x.device}", f"{target.dtype} on {target.device}")
    if target.shape != x.shape[:-1]:
        raise mismatch("target", f"shape {tuple(x.shape[:-1])}, x's without its last dimension", tuple(target.shape))
    if bias is not None:
        check_vector("bias", bias, vocab, "the vocabulary of weight")
        check_like("bias", bias, x)


def check_token_weight(token_weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The weights as the losses are computed: in float32, or float64 for float64 inputs."""
    check_tensor("token_weight", token_weight)
    check_floating("token_weight", token_weight)
    if token_weight.device != x.device:
        raise mismatch("token_weight", f"a tensor on {x.device}, as x", f"one on {token_weight.device}")
    if token_weight.shape != target.shape:
        raise mismatch("token_weight", f"shape {tuple(target.shape)}, that of target", tuple(token_weight.shape))
    check_memory(("token_weight",), token_weight)
    return token_weight.to(torch.promote_types(x.dtype, torch.float32))
