"""What the training loop reports, and to whom."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    step: int  # from 1
    loss: float  # of the batch, before the update
    lr: float
    grad_norm: float  # before clipping; NaN if it was not computed
    tokens_per_second: float  # of this step and those reported with it
    mean_tokens_per_second: float  # of all steps of the run
    skipped: str  # why weights and optimiser state were left as they were, or ""
    overflow: bool  # skipped because a gradient in float16 overflowed


class Report:
    """Callbacks of the training loop; a progress bar overrides them."""

    def on_step(self, step: Step) -> None: ...

    def on_evaluation_start(self) -> None: ...

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None: ...

    def on_sample(self, step: int, text: str) -> None: ...

    def on_save(self) -> dict[str, Any]:
        """Called before a checkpoint is written, with which the result is saved (in JSON)."""
        return {}


class Reports(Report):
    """Several, called one after the other."""

    def __init__(self, reports: Sequence[Report]):
        self.reports = reports

    def on_step(self, step: Step) -> None:
        for report in self.reports:
            report.on_step(step)

    def on_evaluation_start(self) -> None:
        for report in self.reports:
            report.on_evaluation_start()

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None:
        for report in self.reports:
            report.on_evaluation_end(step, train_loss, val_loss)

    def on_sample(self, step: int, text: str) -> None:
        for report in self.reports:
            report.on_sample(step, text)

    def on_save(self) -> dict[str, Any]:
        return {key: value for report in self.reports for key, value in report.on_save().items()}
