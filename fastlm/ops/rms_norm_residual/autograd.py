"""How rms_norm_residual is differentiated."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.operator import gradients_of
from fastlm.ops.residual_norm import ResidualNorm
from fastlm.ops.rms_norm_residual import reference, spec


class RMSNormResidual(ResidualNorm):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 3, 2, 3

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        _, summed, rstd = results
        # Of the inputs only their sum is saved: the gradients depend on nothing else of them.
        tensors = call.x if summed is None else summed, call.weight, rstd, call.seed
        return tensors, (call.eps, call.dropout_p, call.unit_offset, call.x.dtype)

    def norm_gradients(self, call: spec.Backward) -> Sequence[Tensor | None]:
        needs_dx, needs_dresidual, needs_dweight = call.needed
        formula = functools.partial(reference.rms_norm, eps=call.eps, unit_offset=call.unit_offset, dtype=call.x_dtype)
        return gradients_of(
            formula, (call.summed, call.weight), (needs_dx or needs_dresidual, needs_dweight), (call.dy,)
        )


operator = RMSNormResidual("rms_norm_residual", __package__ or "")
