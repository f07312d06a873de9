"""How gelu_mlp is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.gelu_mlp import reference, spec
from fastlm.ops.operator import Operator


class GeluMlp(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, inputs = 3, 5

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        _, hidden, activated = results
        return (call.x, call.w1, call.b1, call.w2, call.b2, hidden, activated), (call.approximate, call.layout)

    def without_saving(self, call: spec.Forward) -> spec.Forward:
        return spec.Forward(*call[:-1], recompute=spec.RECOMPUTE_LEVELS[-1])

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        function = functools.partial(reference.gelu_mlp, approximate=call.approximate, layout=call.layout)
        return function, (call.x, call.w1, call.b1, call.w2, call.b2)


operator = GeluMlp("gelu_mlp", __package__ or "")
