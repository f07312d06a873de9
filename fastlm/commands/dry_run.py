"""fastlm train --dry-run: what a run takes on this machine."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastlm.commands.display import describe_device, quantity, say
from fastlm.training import data
from fastlm.training.estimate import estimate, estimate_of
from fastlm.training.models import build
from fastlm.training.run_time import RunTime, disk_at, run_time, seconds_since_start
from fastlm.training.settings import Settings


def show_estimate(settings: Settings, corpus: data.Corpus, model: Any, device: torch.device, out: Path) -> None:
    """model: that to start from, which is measured as it is; None: a new one."""
    start = seconds_since_start()  # the run reads its text and its model as this command has done
    stored = 0
    if model is None:
        found = estimate(settings, corpus, lambda some: build(some, corpus.tokenizer), device)
    else:
        merged = model.merged(model.state_dict()) if settings.lora else {}  # as in memory while a checkpoint is written
        found = estimate_of(settings, corpus, model, device, model.loss if settings.lora else None)
        stored = sum(x.nbytes for x in merged.values())
        del merged
    found = dataclasses.replace(found, stored=found.stored + stored)
    say(f"{found.parameters:,} parameters, {settings.dtype}, {describe_device(device)}")
    how = "measured" if found.measured else "estimated from one and two layers, as the model does not fit"
    say(f"memory: {found.memory / 2**30:.2f} GiB of {found.available / 2**30:.1f} GiB available, {how}")
    speed = settings.tokens_per_step / found.seconds.step
    say(f"time per step: {duration(found.seconds.step)}, {speed:,.0f} tokens/s")
    folder = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    run = run_time(settings, found, start, disk_at(folder, found.stored))
    say(f"time of the run: {duration(run.total)} ({in_parts(run, settings.steps)})")


def in_parts(run: RunTime, steps: int) -> str:
    parts = {
        "start": run.start,
        quantity(steps, "step"): run.steps,
        quantity(run.evaluations, "evaluation"): run.evaluating,
        quantity(run.checkpoints, "checkpoint"): run.saving,
    }
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} seconds"
