"""How linear_log_prob is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.linear_log_prob import reference, spec
from fastlm.ops.operator import Operator


class LinearLogProb(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 4, 2, 3

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (*call[:4], *results[1:]), call[4:]

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        function = functools.partial(reference.linear_log_prob, target=call.target, settings=call.settings())
        return function, (call.x, call.weight, call.bias)


operator = LinearLogProb("linear_log_prob", __package__ or "")
