"""The public function: checks and documentation."""

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled
from fastlm.core.errors import (
    check_like,
    check_number,
    check_probability,
    check_rows,
    check_tensor,
    check_vector,
    mismatch,
)
from fastlm.ops.layernorm_residual.autograd import operator
from fastlm.ops.layernorm_residual.spec import Forward
from fastlm.ops.operator import check_memory
from fastlm.ops.residual_norm import check_same_or_float32, widen_for_autocast


def layernorm_residual(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x, after dropout, to the residual stream and normalise the sum over its last dimension.

    summed = residual + dropout(x); normalised = LayerNorm(summed) · weight + bias (Ba, Kiros and Hinton, 2016,
    arXiv:1607.06450). A pre-norm block uses both results, a post-norm block the first.

    Args:
        x: (..., width), floating point, any strides.
        residual: like x, in x's dtype or float32 (a float32 residual stream through a 16-bit model), or None.
        weight: (width,), in x's dtype or float32.
        bias: (width,) or None, in weight's dtype.
        eps: added to the variance; > 0.
        dropout_p: probability of zeroing an element of x, in [0, 1); active whenever > 0 (a module passes 0 in eval).
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Under autocast on a CPU nothing is cast, as for `torch.nn.functional.layer_norm`, except that where x and residual
    differ the narrower one is widened as an addition would. On a GPU everything is cast to float32.

    Returns:
        (normalised, summed): normalised like x; summed like residual (like x without one), contiguous. The
        normalisation reads `summed` as it is stored. Without residual and dropout `summed` is x itself. Statistics are
        in float32 (float64 for float64) whatever the dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if residual is not None:
        check_tensor("residual", residual)
    if bias is not None:
        check_tensor("bias", bias)
    if autocast_enabled(x):
        check_memory(("x", "residual", "weight", "bias"), x, residual, weight, bias)
        x, residual, weight, bias = cast(x, residual, weight, bias)
    check_rows(x)
    if residual is not None:
        if residual.shape != x.shape:
            raise mismatch("residual", f"shape {tuple(x.shape)}, as x", tuple(residual.shape))
        check_same_or_float32("residual", residual, x)
    check_vector("weight", weight, x.shape[-1], "the last dimension of x")
    check_same_or_float32("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x.shape[-1], "the last dimension of x")
        check_like("bias", bias, weight, "weight")
    eps = check_number("eps", eps, "a finite number above 0")
    if not eps > 0:
        raise mismatch("eps", "a finite number above 0", eps)
    dropout_p = check_probability("dropout_p", dropout_p)
    seed = operator.draw_seed(x, dropout_p)
    y, summed = operator(Forward(x, residual, weight, bias, seed, eps, dropout_p), backend)
    return y, x if summed is None else summed


def cast(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> list[Tensor | None]:
    """The casts of autocast."""
    if x.device.type == "cpu":
        return widen_for_autocast(x, residual, *parameters)
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in (x, residual, *parameters)]
