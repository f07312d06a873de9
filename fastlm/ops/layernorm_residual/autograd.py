"""How layernorm_residual is differentiated."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.ops.layernorm_residual import reference, spec
from fastlm.ops.operator import Operator, gradients_of


class LayerNormResidual(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 4, 2, 4

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        _, summed, mean, rstd = results
        # Of the inputs only their sum is saved: the gradients depend on nothing else of them.
        tensors = call.x if summed is None else summed, call.weight, mean, rstd, call.seed
        return tensors, (call.eps, call.dropout_p, call.x.dtype)

    def backward(self, call: spec.Backward, selected: Implementation[Any, Any] | str | None) -> Results:
        if not same_gradient(call):
            return super().backward(call, selected)
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
        needed = needs_dx or needs_dresidual, False, needs_dweight, needs_dbias
        dx, _, dweight, dbias = super().backward(spec.Backward(*call[:-1], needed), selected)
        return dx if needs_dx else None, dx if needs_dresidual else None, dweight, dbias

    def differentiable_gradients(self, call: spec.Backward, originals: Sequence[Tensor | None]) -> Results:
        """As a graph over the upstream gradients, the weight and the sum, whose own history leads to x and residual."""
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
        ds, dweight, dbias = call.dsummed, None, None
        if call.dy is not None:
            formula = functools.partial(reference.layer_norm, bias=None, eps=call.eps, dtype=call.x_dtype)
            needed = needs_dx or needs_dresidual, needs_dweight
            dnorm, dweight = gradients_of(formula, (call.summed, call.weight), needed, (call.dy,))
            ds = dnorm if ds is None else ds if dnorm is None else ds + dnorm
            if needs_dbias:
                dbias = call.dy.reshape(-1, call.weight.shape[0]).sum(0).to(call.weight.dtype)
        dx = (
            reference.dropout(ds, call.seed, call.dropout_p).to(call.x_dtype)
            if needs_dx or same_gradient(call)
            else None
        )
        dresidual = dx if same_gradient(call) else ds
        return dx if needs_dx else None, dresidual if needs_dresidual else None, dweight, dbias


def same_gradient(call: spec.Backward) -> bool:
    """Whether the gradients of x and residual are one tensor."""
    return call.seed is None and call.summed.dtype == call.x_dtype


operator = LayerNormResidual("layernorm_residual", __package__ or "")
