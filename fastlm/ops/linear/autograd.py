"""How linear is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.linear import reference, spec
from fastlm.ops.operator import Operator


class Linear(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, inputs = 1, 3

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (call.x, call.weight, call.bias), (call.layout,)

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        return functools.partial(reference.linear, layout=call.layout), (call.x, call.weight, call.bias)


operator = Linear("linear", __package__ or "")
