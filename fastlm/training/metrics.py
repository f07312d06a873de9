"""The metrics of a run: RUN/metrics.jsonl and, if wanted, event files for TensorBoard.

Lines of metrics.jsonl, in the order of the run:

{"step": 7, "loss": 3.1, "lr": 0.001, "grad_norm": 1.2, "tokens_per_second": 9000.0}   every step
{"step": 250, "train_loss": 2.9, "val_loss": 3.0}                                       every evaluation
{"step": 500, "sample": "…"}                                                            every sample

A number that is not finite is null. A step that was skipped has "skipped": the reason.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from fastlm.core.errors import mismatch
from fastlm.training.report import Report, Step

FILE = "metrics.jsonl"
SIZE = "metrics_bytes"  # of the file, in a checkpoint
EVENTS = "tensorboard"


class JSONLines(Report):
    """Writes metrics.jsonl.

    Args:
        size: the number of bytes to keep of the file of an earlier run: lines of steps that are run again are deleted.
    """

    def __init__(self, run: Path, size: int = 0):
        self.file = (run / FILE).open("ab")
        self.file.truncate(min(size, self.file.tell()))
        self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> "JSONLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        self.file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def on_step(self, step: Step) -> None:
        record: dict[str, Any] = {"step": step.step, "loss": finite(step.loss), "lr": step.lr}
        record |= {"grad_norm": finite(step.grad_norm), "tokens_per_second": round(step.tokens_per_second, 1)}
        if step.skipped or step.overflow:
            record["skipped"] = step.skipped or "a gradient overflowed float16"
        self.write(record)

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None:
        self.write({"step": step, "train_loss": finite(train_loss), "val_loss": finite(val_loss)})
        self.file.flush()

    def on_sample(self, step: int, text: str) -> None:
        self.write({"step": step, "sample": text})
        self.file.flush()

    def on_save(self) -> dict[str, Any]:
        """The lines until now are on the disk before the checkpoint."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {SIZE: self.file.tell()}


def clear(run: Path) -> None:
    """Deletes the metrics of an earlier run."""
    (run / FILE).unlink(missing_ok=True)
    shutil.rmtree(run / EVENTS, ignore_errors=True)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class TensorBoard(Report):
    """Writes event files into RUN/tensorboard.

    Args:
        step: that the run goes on from; later events of an earlier process are hidden.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int = 0):
        self.writer = summary_writer()(str(run / EVENTS), purge_step=step + 1 if step else None)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()

    def on_step(self, step: Step) -> None:
        scalars = {"loss/batch": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
        for name, value in (scalars | {"tokens_per_second": step.tokens_per_second}).items():
            self.writer.add_scalar(name, value, step.step)

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None:
        self.writer.add_scalar("loss/train", train_loss, step)
        self.writer.add_scalar("loss/val", val_loss, step)

    def on_sample(self, step: int, text: str) -> None:
        self.writer.add_text("sample", text, step)

    def on_save(self) -> dict[str, Any]:
        self.writer.flush()
        return {}


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        expected = 'an installation with tensorboard (pip install "fastlm[tensorboard]")'
        raise mismatch("tensorboard", expected, "one without") from None
    return SummaryWriter
