"""How glu_mlp is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.glu_mlp import reference, spec
from fastlm.ops.operator import Operator


class GluMlp(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, inputs = 4, 7

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (*call[: self.inputs], *results[1:]), (call.activation,)

    def without_saving(self, call: spec.Forward) -> spec.Forward:
        return spec.Forward(*call[:-1], recompute=spec.RECOMPUTE_LEVELS[-1])

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        inputs = call.x, call.w_gate, call.w_up, call.w_down, call.b_gate, call.b_up, call.b_down
        return functools.partial(reference.glu_mlp, activation=call.activation), inputs


operator = GluMlp("glu_mlp", __package__ or "")
