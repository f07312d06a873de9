"""The public function: checks and documentation."""

from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_with_originals
from fastlm.core.errors import check_choice, check_like, check_rows, check_tensor, check_vector
from fastlm.ops.gelu_mlp.autograd import operator
from fastlm.ops.gelu_mlp.spec import APPROXIMATIONS, RECOMPUTE_LEVELS, Forward
from fastlm.ops.linear.api import check_weight
from fastlm.ops.linear.spec import LAYOUTS
from fastlm.ops.operator import check_memory


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "none",
    layout: str = "linear",
    recompute: int = 0,
    backend: str | None = None,
) -> Tensor:
    """gelu(x W1 + b1) W2 + b2 (GELU: Hendrycks and Gimpel, 2016, arXiv:1606.08415).

    Args:
        x: (..., in), floating point, any strides. Under autocast everything is cast as for
            `torch.nn.functional.linear`.
        w1: (hidden, in) with layout="linear" (torch.nn.Linear), (in, hidden) with layout="conv1d" (GPT-2's Conv1D);
            dtype and device of x.
        b1: (hidden,) or None.
        w2: (out, hidden), or (hidden, out) with layout="conv1d".
        b2: (out,) or None.
        approximate: "none" for the exact GELU (erf), "tanh" for GPT-2's.
        layout: how both weights are stored. No weight is transposed in memory.
        recompute: what the backward recomputes instead of saving it: 0 nothing, 1 the GELU (half the memory), 2 the
            first product too (1/6 more FLOPs).
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("w1", w1)
    check_tensor("w2", w2)
    if b1 is not None:
        check_tensor("b1", b1)
    if b2 is not None:
        check_tensor("b2", b2)
    originals: tuple = ()
    if autocast_enabled(x):
        check_memory(("x", "w1", "b1", "w2", "b2"), x, w1, b1, w2, b2)
        x, originals, w1, b1, w2, b2 = cast_with_originals(x, w1, b1, w2, b2)
    check_rows(x)
    check_choice("approximate", approximate, APPROXIMATIONS)
    check_choice("layout", layout, LAYOUTS)
    check_choice("recompute", recompute, RECOMPUTE_LEVELS)
    hidden_width = check_weight("w1", w1, x.shape[-1], layout, "the last dimension of x")
    out_width = check_weight("w2", w2, hidden_width, layout, "the output width of w1")
    check_like("w1", w1, x)
    check_like("w2", w2, x)
    if b1 is not None:
        check_vector("b1", b1, hidden_width, "the output width of w1")
        check_like("b1", b1, x)
    if b2 is not None:
        check_vector("b2", b2, out_width, "the output width of w2")
        check_like("b2", b2, x)
    return operator(Forward(x, w1, b1, w2, b2, approximate, layout, recompute), backend, originals)
