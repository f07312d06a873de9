"""The same model twice, on fastlm's operators and on PyTorch's own, trained side by side on the same batches."""

import dataclasses
import time
from collections.abc import Iterator

from torch import Tensor

from fastlm.benchmarking.measure import Ratio
from fastlm.training.loop import Trainer


@dataclasses.dataclass
class Comparison:
    ours: list[float] = dataclasses.field(default_factory=list)  # seconds of each step
    plain: list[float] = dataclasses.field(default_factory=list)
    losses: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> Ratio:
        """The first pair, in which memory is allocated, is left out."""
        return Ratio.of(self.ours[1:], self.plain[1:])

    @property
    def disagreement(self) -> float:
        """The largest difference between the two losses of a step, relative to the loss."""
        return max(abs(a - b) / abs(b) for a, b in self.losses)


def side_by_side(
    ours: Trainer, plain: Trainer, batches: Iterator[tuple[Tensor, Tensor, float]]
) -> Iterator[Comparison]:
    """One step of each per batch and rate, each first every other time; yields after every pair, and the caller stops when it has seen enough."""
    seen = Comparison()
    for i, (inputs, targets, lr) in enumerate(batches):
        loss = {}
        for trainer, taken in ((ours, seen.ours), (plain, seen.plain))[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            loss[trainer] = trainer.step(inputs, targets, lr)
            taken.append(time.perf_counter() - start)
        seen.losses.append((loss[ours], loss[plain]))
        yield seen
