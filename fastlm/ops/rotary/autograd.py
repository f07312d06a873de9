"""How rotary is differentiated."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.ops.operator import Operator
from fastlm.ops.rotary import reference, spec


class Rotary(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 2, 2, 2

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (call.cos, call.sin), ()

    def backward(self, call: spec.Backward, selected: Implementation[Any, Any] | str | None) -> Results:
        given = call.dquery is not None, call.dkey is not None
        needed = tuple([need and there for need, there in zip(call.needed, given, strict=True)])
        return super().backward(call._replace(needed=needed), selected)

    def differentiable_gradients(self, call: spec.Backward, originals: Sequence[Tensor | None]) -> Results:
        """The rotation is linear, so its gradient is a function of the upstream gradients alone."""
        return tuple(
            reference.rotate(x, call.cos, call.sin, inverse=True) if x is not None and need else None
            for x, need in zip(call[:2], call.needed, strict=True)
        )


operator = Rotary("rotary", __package__ or "")
