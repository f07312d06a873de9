"""The public function: checks and documentation."""

from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_with_originals
from fastlm.core.errors import check_choice, check_like, check_rows, check_tensor, check_vector, mismatch
from fastlm.ops.activation import ACTIVATIONS
from fastlm.ops.glu_mlp.autograd import operator
from fastlm.ops.glu_mlp.spec import RECOMPUTE_LEVELS, Forward
from fastlm.ops.linear.api import check_weight
from fastlm.ops.operator import check_memory

ACTIVATION_NAMES = tuple(ACTIVATIONS)


def glu_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "silu",
    recompute: int = 1,
    backend: str | None = None,
) -> Tensor:
    """down(act(gate x) · up x), the gated feed-forward block (Shazeer, 2020, arXiv:2002.05202).

    Args:
        x: (..., in), floating point, any strides. Under autocast everything is cast as for
            `torch.nn.functional.linear`.
        w_gate: (hidden, in), as torch.nn.Linear stores it; dtype and device of x. No weight is copied where one of its
            strides is 1: w_gate and w_up may be two halves of one weight.
        w_up: (hidden, in).
        w_down: (out, hidden).
        b_gate: (hidden,) or None.
        b_up: (hidden,) or None.
        b_down: (out,) or None.
        activation: "silu" (SwiGLU: Llama, Mistral, Qwen), "gelu" for the exact GELU (erf), "gelu_tanh" (GeGLU: Gemma)
            or "relu".
        recompute: what the backward recomputes instead of saving it: 0 nothing, 1 act(gate x) · up x (two tensors of
            the hidden width are saved instead of three), 2 gate x and up x too (2/9 more FLOPs where out is in).
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("x", x)
    check_tensor("w_gate", w_gate)
    check_tensor("w_up", w_up)
    check_tensor("w_down", w_down)
    if b_gate is not None:
        check_tensor("b_gate", b_gate)
    if b_up is not None:
        check_tensor("b_up", b_up)
    if b_down is not None:
        check_tensor("b_down", b_down)
    originals: tuple = ()
    if autocast_enabled(x):
        weights = w_gate, w_up, w_down, b_gate, b_up, b_down
        check_memory(operator.tensor_names, x, *weights)
        x, originals, w_gate, w_up, w_down, b_gate, b_up, b_down = cast_with_originals(x, *weights)
    check_rows(x)
    check_choice("activation", activation, ACTIVATION_NAMES)
    check_choice("recompute", recompute, RECOMPUTE_LEVELS)
    hidden_width = check_weight("w_gate", w_gate, x.shape[-1], "linear", "the last dimension of x")
    if w_up.shape != w_gate.shape:
        raise mismatch("w_up", f"shape {tuple(w_gate.shape)}, as w_gate", tuple(w_up.shape))
    out_width = check_weight("w_down", w_down, hidden_width, "linear", "the output width of w_gate")
    check_like("w_gate", w_gate, x)
    check_like("w_up", w_up, x)
    check_like("w_down", w_down, x)
    if b_gate is not None:
        check_vector("b_gate", b_gate, hidden_width, "the output width of w_gate")
        check_like("b_gate", b_gate, x)
    if b_up is not None:
        check_vector("b_up", b_up, hidden_width, "the output width of w_up")
        check_like("b_up", b_up, x)
    if b_down is not None:
        check_vector("b_down", b_down, out_width, "the output width of w_down")
        check_like("b_down", b_down, x)
    call = Forward(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, recompute)
    return operator(call, backend, originals)
