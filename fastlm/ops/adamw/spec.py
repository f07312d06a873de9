"""One update of AdamW: the call and the operator, which writes to its tensors and has no gradient."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.backends.registry import Registered


class Sizes(NamedTuple):
    amsgrad: bool
    gaps: bool  # a parameter is not dense in memory
    mixed: bool  # a gradient has another dtype than its parameter
    subclass: bool  # a tensor subclass


class Update(NamedTuple):
    """All lists have an entry per parameter; masters and max_exp_avg_sqs may be empty.

    The parameters have one dtype and device. Gradients are multiplied by factor first. With masters, float32 copies of
    16-bit parameters, the update is computed on these and the parameters are rounded from them; where a parameter was
    changed by others since, the parameter counts.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]  # 0-d float32, updates so far
    max_exp_avg_sqs: list[Tensor]  # of amsgrad
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    factor: float | Tensor
    zero_gradients: bool
    found_inf: Tensor | None = None  # on the parameters' device: if it is not 0, only zero_gradients has an effect

    def empty_results(self) -> Results:
        return ()

    def flops(self) -> int:
        return 0  # no matrix products

    def bytes(self) -> int:
        """Read everything, write all but the gradients, unless they are zeroed."""
        updated = (*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.masters, *self.max_exp_avg_sqs)
        gradients = sum(x.nbytes for x in self.gradients)
        return 2 * sum(x.nbytes for x in updated) + (1 + self.zero_gradients) * gradients


@dataclasses.dataclass(frozen=True, eq=False)
class AdamWImplementation(Implementation[Update, Update]):
    # The sum of the squares of all elements of tensors of one dtype, in float64 or a 0-d tensor: for gradient clipping.
    sum_of_squares: Callable[[Sequence[Tensor]], float | Tensor] = dataclasses.field(kw_only=True)
    takes_found_inf: bool = False  # else the caller reads it, which waits for the device


operator = Registered("adamw", __package__ or "", Sizes)
