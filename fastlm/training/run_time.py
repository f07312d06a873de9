"""How long a run takes on this machine: its steps, and what it does besides."""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastlm.training.checkpoints import flush, sha256
from fastlm.training.estimate import Estimate
from fastlm.training.settings import Settings

WRITTEN = 2**28  # bytes that are written to measure the disk, at most


@dataclasses.dataclass(frozen=True)
class Disk:
    """Seconds in which a checkpoint is written, per byte."""

    seconds: float
    busy: float  # of the processor


@dataclasses.dataclass(frozen=True)
class RunTime:
    """Seconds of a run, and how often it evaluates and saves."""

    start: float
    steps: float
    evaluations: int
    evaluating: float
    checkpoints: int
    saving: float  # of the model at the end, too

    @property
    def total(self) -> float:
        return self.start + self.steps + self.evaluating + self.saving


def run_time(settings: Settings, found: Estimate, start: float, disk: Disk) -> RunTime:
    """Of a run without samples that is not interrupted and does not stop early.

    start: seconds until text and model are there.
    """
    evaluations = (settings.steps - 1) // settings.eval_every + 1
    checkpoints = (settings.steps - 1) // settings.checkpoint_every + 1 if settings.checkpoint_every else 1
    model = 4 * found.parameters
    # All but the last are written while training goes on, with which they share the processor.
    saving = checkpoints * found.seconds.copy + (checkpoints - 1) * disk.busy * found.stored
    saving += disk.seconds * (found.stored + model)
    return RunTime(
        start=start + found.seconds.start,
        steps=settings.steps * found.seconds.step,
        evaluations=evaluations,
        evaluating=evaluations * found.seconds.evaluation,
        checkpoints=checkpoints,
        saving=saving,
    )


def disk_at(folder: Path, stored: int) -> Disk:
    """Measured by a file as large as a checkpoint, or smaller. Where none can be written, it takes no time.

    folder: nothing is left there.
    """
    content = torch.randint(256, (max(1, min(stored, WRITTEN)),), dtype=torch.uint8)
    try:
        with tempfile.TemporaryDirectory(prefix=".fastlm-", dir=folder) as place:
            began, busy = time.perf_counter(), time.thread_time()
            file = Path(place) / "model.safetensors"
            save_file({"content": content}, file)
            sha256(file)
            flush(file)
            flush(file.parent)
            return Disk((time.perf_counter() - began) / len(content), (time.thread_time() - busy) / len(content))
    except (OSError, SafetensorError):
        return Disk(0.0, 0.0)


def seconds_since_start() -> float:
    """Of this process; 0 where the system does not tell."""
    file = Path("/proc/self/stat")
    if not file.exists():
        return 0.0
    ticks = int(file.read_text().rpartition(")")[2].split()[19])
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
