"""An exponential moving average of the weights (Polyak & Juditsky, 1992; Tarvainen & Valpola, 2017)."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastlm.training.parallel import fill
from fastlm.training.whole import Whole

UPDATES, WEIGHTS = "average.updates", "weights."  # the names of their tensors in a checkpoint


class Average:
    """average ← decay · average + (1 − decay) · weights after every step.

    At the beginning the decay is (1 + n) / (10 + n) after n steps where that is smaller, so that the initial weights
    are soon forgotten.
    """

    def __init__(self, model: Whole, decay: float):
        self.model, self.named = model, model.parameters
        self.parameters: list[Tensor] = list(self.named.values())
        self.decay, self.updates = decay, 0
        self.values = [p.detach().clone() for p in self.parameters]  # the weights while the average is in the model

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights in the model and their average."""
        for p, value in zip(self.parameters, self.values, strict=True):
            weights = p.clone()
            p.copy_(value)
            value.copy_(weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state(self) -> dict[str, Tensor]:
        """While the average is in the model: what is not in the model."""
        values = zip(self.named, self.values, strict=True)
        weights = {WEIGHTS + name: self.model.stored(name, value) for name, value in values}
        return weights | {UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The model has the averaged weights of the checkpoint before, and its weights after."""
        self.updates = int(tensors[UPDATES])
        for value, (name, p) in zip(self.values, self.named.items(), strict=True):
            value.copy_(p)
            fill(self.model.stored(name, p), tensors[WEIGHTS + name])
