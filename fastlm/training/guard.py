"""Keeps account of the steps that are skipped, and ends a run that skips too many in a row."""

import collections
import math
import statistics
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlm.core.errors import mismatch
from fastlm.training.settings import Settings
from fastlm.training.trainer import Outcome

SKIPPED, OVERFLOWS = "guard.skipped", "guard.overflows"  # the names of their tensors in a checkpoint
WINDOW, FEWEST = 128, 32  # numbers of losses from which the largest accepted one is computed
MAD_TO_SIGMA = 1.4826  # of a normal distribution
SMALLEST_SIGMA = 0.01  # relative to the median: losses that hardly vary must not make every step a spike


class Guard:
    """The steps that were skipped, by their numbers from 1.

    Attributes:
        skipped: because of a loss or a gradient.
        overflows: because of the scale of the gradients in float16, which the gradient scaler then lowers.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.skipped: list[int] = []
        self.overflows: list[int] = []
        self.in_a_row = 0
        self.accepted: collections.deque[float] = collections.deque(maxlen=WINDOW)

    @property
    def max_loss(self) -> float:
        """The largest loss that is no spike: median + skip_spikes · 1.4826 · MAD of the last accepted losses."""
        if not self.settings.skip_spikes or len(self.accepted) < FEWEST:
            return math.inf
        median = statistics.median(self.accepted)
        deviation = MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in self.accepted)
        limit = median + self.settings.skip_spikes * max(deviation, SMALLEST_SIGMA * abs(median))
        return struct.unpack("f", struct.pack("f", limit))[0]  # in float32, as the losses on a GPU

    def record(self, step: int, outcome: Outcome) -> None:
        """Raises ValueError if too many steps in a row were skipped."""
        if outcome.overflow:
            self.overflows.append(step)
        elif outcome.skipped or not math.isfinite(outcome.loss):
            self.skipped.append(step)
            self.in_a_row += 1
            if self.in_a_row >= self.settings.max_skipped:
                self.give_up(step, outcome)
        else:
            self.in_a_row = 0
            self.accepted.append(outcome.loss)

    def give_up(self, step: int, outcome: Outcome) -> None:
        count = f"{self.in_a_row} steps in a row were skipped" if self.in_a_row > 1 else "a step was skipped"
        last = f"of step {step}, {outcome.skipped or f'its loss is {outcome.loss}'}"
        advice = "use a smaller one, from the last checkpoint with --init"
        if self.settings.dtype == "float16":
            advice += ", or --dtype bf16"
        lr = self.settings.lr
        raise mismatch("lr", f"a learning rate with finite losses and gradients ({count}; {last}; {advice})", lr)

    def state(self) -> dict[str, Tensor]:
        return {
            SKIPPED: torch.tensor(self.skipped, dtype=torch.int64),
            OVERFLOWS: torch.tensor(self.overflows, dtype=torch.int64),
        }

    def load_state(self, tensors: Mapping[str, Tensor], losses: Sequence[float]) -> None:
        """losses: of all steps until the checkpoint."""
        self.skipped, self.overflows = tensors[SKIPPED].tolist(), tensors[OVERFLOWS].tolist()
        skipped, overflows = set(self.skipped), set(self.overflows)
        self.accepted.extend(
            loss for step, loss in enumerate(losses, 1) if step not in skipped and step not in overflows
        )
        self.in_a_row = 0
        for step in range(len(losses), 0, -1):
            if step in skipped:
                self.in_a_row += 1
            elif step not in overflows:
                break
