"""How layernorm_residual is differentiated."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.layernorm_residual import reference, spec
from fastlm.ops.operator import gradients_of
from fastlm.ops.residual_norm import ResidualNorm


class LayerNormResidual(ResidualNorm):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 4, 2, 4

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        _, summed, mean, rstd = results
        # Of the inputs only their sum is saved: the gradients depend on nothing else of them.
        tensors = call.x if summed is None else summed, call.weight, mean, rstd, call.seed
        return tensors, (call.eps, call.dropout_p, call.x.dtype)

    def norm_gradients(self, call: spec.Backward) -> Sequence[Tensor | None]:
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
        formula = functools.partial(reference.layer_norm, bias=None, eps=call.eps, dtype=call.x_dtype)
        needed = needs_dx or needs_dresidual, needs_dweight
        dnorm, dweight = gradients_of(formula, (call.summed, call.weight), needed, (call.dy,))
        dbias = call.dy.reshape(-1, call.weight.shape[0]).sum(0).to(call.weight.dtype) if needs_dbias else None
        return dnorm, dweight, dbias


operator = LayerNormResidual("layernorm_residual", __package__ or "")
