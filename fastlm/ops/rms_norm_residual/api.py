"""The public function: checks and documentation."""

from torch import Tensor

from fastlm.core.autocast import autocast_enabled
from fastlm.core.errors import (
    check_flag,
    check_number,
    check_probability,
    check_rows,
    check_tensor,
    check_vector,
    mismatch,
)
from fastlm.ops.operator import check_memory
from fastlm.ops.residual_norm import check_same_or_float32, widen_for_autocast
from fastlm.ops.rms_norm_residual.autograd import operator
from fastlm.ops.rms_norm_residual.spec import Forward


def rms_norm_residual(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    unit_offset: bool = False,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x, after dropout, to the residual stream and normalize the sum by its root mean square.

    summed = residual + dropout(x); normalized = summed / √(mean(summed²) + eps) · weight, with the mean over the last
    dimension (Zhang and Sennrich, 2019, arXiv:1910.07467). A pre-norm block uses both results, a post-norm block the
    first. With x (batch, heads, tokens, head_dim), residual None and weight (head_dim,) it is the norm of queries or
    keys over their head dimension.

    Args:
        x: (..., width), floating point. Up to three leading dimensions may have any strides without a copy.
        residual: like x, in x's dtype or float32 (a float32 residual stream through a 16-bit model), or None.
        weight: (width,), in x's dtype or float32.
        eps: added to the mean square; > 0.
        unit_offset: False rounds the normalized sum to x's dtype and multiplies it by weight, as Llama does; True
            multiplies by 1 + weight in float32 and rounds the product, as Gemma does.
        dropout_p: probability of zeroing an element of x, in [0, 1); active whenever > 0 (a module passes 0 in eval).
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Under autocast nothing is cast, except that where x and residual differ the narrower one is widened as an addition
    would.

    Returns:
        (normalized, summed): normalized like x; summed like residual (like x without one), contiguous. The
        normalization reads `summed` as it is stored. Without residual and dropout `summed` is x itself. Statistics are
        in float32 (float64 for float64) whatever the dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if residual is not None:
        check_tensor("residual", residual)
    if autocast_enabled(x):
        check_memory(("x", "residual", "weight"), x, residual, weight)
        x, residual, weight = widen_for_autocast(x, residual, weight)
    check_rows(x)
    if residual is not None:
        if residual.shape != x.shape:
            raise mismatch("residual", f"shape {tuple(x.shape)}, as x", tuple(residual.shape))
        check_same_or_float32("residual", residual, x)
    check_vector("weight", weight, x.shape[-1], "the last dimension of x")
    check_same_or_float32("weight", weight, x)
    eps = check_number("eps", eps, "a finite number above 0")
    if not eps > 0:
        raise mismatch("eps", "a finite number above 0", eps)
    unit_offset = check_flag("unit_offset", unit_offset)
    dropout_p = check_probability("dropout_p", dropout_p)
    seed = operator.draw_seed(x, dropout_p)
    y, summed = operator(Forward(x, residual, weight, seed, eps, dropout_p, unit_offset), backend)
    return y, x if summed is None else summed
