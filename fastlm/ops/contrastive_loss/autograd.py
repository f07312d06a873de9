"""How contrastive_loss is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.contrastive_loss import reference, spec
from fastlm.ops.operator import Operator


class ContrastiveLoss(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, inputs = 5, 3

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (*call[:4], *results[1:]), (call.temperature,)

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        function = functools.partial(reference.contrastive_loss, labels=call.labels, temperature=call.temperature)
        return function, (call.queries, call.documents, call.negatives)

    def without_saving(self, call: spec.Forward) -> spec.Forward:
        return call._replace(needed=(False, False))


operator = ContrastiveLoss("contrastive_loss", __package__ or "")
