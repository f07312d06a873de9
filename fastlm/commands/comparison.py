"""Trains the same model with fastlm and in plain PyTorch, interleaved, on the same batches."""

import dataclasses
import time
from collections.abc import Iterator

from torch import Tensor

from fastlm.benchmarking.measure import Ratio
from fastlm.training.trainer import Trainer


@dataclasses.dataclass
class Comparison:
    ours: list[float] = dataclasses.field(default_factory=list)  # seconds of each step
    plain: list[float] = dataclasses.field(default_factory=list)  # the same of plain PyTorch
    losses: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> Ratio:
        """Without the first pair of steps, which allocates memory."""
        return Ratio.of(self.ours[1:], self.plain[1:])

    @property
    def disagreement(self) -> float:
        """The largest relative difference between the two losses of a step."""
        return max(abs(a - b) / abs(b) for a, b in self.losses)


def side_by_side(
    ours: Trainer, plain: Trainer, batches: Iterator[tuple[Tensor, Tensor, float]]
) -> Iterator[Comparison]:
    """One step of each model per (inputs, targets, learning rate), in alternating order; yields after every pair.

    The caller stops the iteration.
    """
    comparison = Comparison()
    for i, (inputs, targets, lr) in enumerate(batches):
        loss = {}
        for trainer, seconds in ((ours, comparison.ours), (plain, comparison.plain))[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            loss[trainer] = trainer.step(inputs, targets, lr)
            seconds.append(time.perf_counter() - start)
        comparison.losses.append((loss[ours], loss[plain]))
        yield comparison
