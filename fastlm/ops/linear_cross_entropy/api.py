"""The public function: checks and documentation."""

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_with_originals
from fastlm.core.errors import (
    check_choice,
    check_integer,
    check_like,
    check_number,
    check_rows,
    check_tensor,
    check_vector,
    mismatch,
)
from fastlm.ops.linear.api import check_weight
from fastlm.ops.linear_cross_entropy.autograd import operator
from fastlm.ops.linear_cross_entropy.spec import REDUCTIONS
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
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_integer("ignore_index", ignore_index)
    label_smoothing = check_number("label_smoothing", label_smoothing, "a share in [0, 1]")
    if not 0 <= label_smoothing <= 1:
        raise mismatch("label_smoothing", "a share in [0, 1]", label_smoothing)
    return operator.loss(x, weight, bias, target, ignore_index, reduction, label_smoothing, backend, originals)
