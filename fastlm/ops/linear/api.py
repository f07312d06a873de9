"""The public function: checks and documentation."""

from typing import Any

from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast, cast_with_originals
from fastlm.core.errors import check_choice, check_like, check_rows, check_tensor, check_vector, mismatch
from fastlm.ops.linear.autograd import operator
from fastlm.ops.linear.spec import LAYOUTS, Forward
from fastlm.ops.operator import check_memory


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, layout: str = "linear", backend: str | None = None
) -> Tensor:
    """Multiply the last dimension of x by a weight matrix and add a bias.

    Args:
        x: (..., in), floating point, any strides. Under autocast x, weight and bias are cast as for
            `torch.nn.functional.linear`.
        weight: (out, in) with layout="linear" (torch.nn.Linear), (in, out) with layout="conv1d" (GPT-2's Conv1D); dtype
            and device of x.
        bias: (out,) or None; dtype and device of x.
        layout: how the weight is stored. No weight is transposed in memory.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (..., out), contiguous, in x's dtype; products are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    originals: tuple = ()
    if autocast_enabled(x):
        x, originals, weight, bias = cast_operands(x, weight, bias)
    check_rows(x)
    check_choice("layout", layout, LAYOUTS)
    out_width = check_weight("weight", weight, x.shape[-1], layout, "the last dimension of x")
    check_like("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, out_width, "the output width of weight")
        check_like("bias", bias, x)
    return operator(Forward(x, weight, bias, layout), backend, originals)


def cast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """The casts of autocast: (x, originals, weight, bias). On a GPU gradients take the path through the casts."""
    check_memory(("x", "weight", "bias"), x, weight, bias)
    if x.is_cuda:
        x, weight, bias = cast_for_autocast(x, weight, bias)
        return x, (), weight, bias
    return cast_with_originals(x, weight, bias)


def check_weight(argument: str, weight: Tensor, in_width: int, layout: str, reason: str) -> int:
    """The output width of a weight matrix whose input width must be in_width."""
    shape = weight.shape
    if len(shape) != 2 or shape[layout == "linear"] != in_width or shape[layout != "linear"] == 0:
        expected = f"(out, {in_width})" if layout == "linear" else f"({in_width}, out)"
        raise mismatch(argument, f"shape {expected} with layout={layout!r}, {in_width} being {reason}", tuple(shape))
    return shape[layout != "linear"]
