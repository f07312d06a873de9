"""The public function: checks and documentation."""

from torch import Tensor

from fastlm.core.autocast import autocast_enabled
from fastlm.core.errors import check_float32, check_integer, check_rows, check_softcap, check_tensor
from fastlm.ops.linear.api import cast_operands
from fastlm.ops.linear_cross_entropy.api import check_operands
from fastlm.ops.linear_log_prob.autograd import operator
from fastlm.ops.linear_log_prob.spec import Forward


def linear_log_prob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of p = softmax(linear(x, weight, bias) / temperature), without storing the logits.

    What DPO, GRPO and distillation take of a language model. Logits exist for one chunk of rows at a time, forward and
    backward: the backward computes them again.

    Args:
        x: (..., width), floating point, any strides. Under autocast x, weight and bias are cast as for
            `torch.nn.functional.linear`.
        weight: (vocab, width): the output projection, often the token embedding itself; dtype and device of x. A weight
            without gradient costs no product for one.
        target: (...), int64: class indices in [0, vocab), or ignore_index.
        bias: (vocab,) or None.
        temperature: positive: the logits are divided by it.
        softcap: positive, or None: before that the logits z become softcap · tanh(z / softcap) (Gemma 2).
        ignore_index: a row with this target has log-probability 0, entropy 0 and no gradient.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (log_prob, entropy), both like target, in float32 (float64 for float64), whatever the dtype of x. The entropy is
        in nats; a logit of −∞ adds nothing to it. Gradients of x, weight and bias flow through both.

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
        x, originals, weight, bias = cast_operands(x, weight, bias)
    check_rows(x)
    check_operands(x, weight, target, bias)
    ignore_index = check_integer("ignore_index", ignore_index)
    temperature = check_float32("temperature", temperature)
    call = Forward(x, weight, bias, target, ignore_index, temperature, check_softcap(softcap))
    log_prob, entropy = operator(call, backend, originals)
    return log_prob, entropy
