"""fastlm train --dry-run: what a run takes on this machine."""

from typing import Any

import torch

from fastlm.commands.display import describe_device, quantity, say
from fastlm.training import data
from fastlm.training.estimate import estimate, estimate_of
from fastlm.training.models import build, objective_of
from fastlm.training.settings import Settings


def show_estimate(settings: Settings, corpus: data.Corpus, model: Any, device: torch.device) -> None:
    """model: that to start from, which is measured as it is; None: a new one."""
    if model is None:
        found = estimate(settings, corpus, lambda some: build(some, corpus.tokenizer), device)
    else:
        loss = model.loss if settings.lora else objective_of(settings, corpus.tokenizer).loss
        merged = model.merged(model.state_dict()) if settings.lora else {}  # as in memory while a checkpoint is written
        found = estimate_of(settings, corpus, model, loss, device)
        del merged
    say(f"{found.parameters:,} parameters, {settings.dtype}, {describe_device(device)}")
    how = "measured" if found.measured else "estimated from one and two layers, as the model does not fit"
    say(f"memory: {found.memory / 2**30:.2f} GiB of {found.available / 2**30:.1f} GiB available, {how}")
    speed = settings.tokens_per_step / found.seconds
    say(f"time per step: {duration(found.seconds)}, {speed:,.0f} tokens/s")
    say(f"time for {quantity(settings.steps, 'step')}: {duration(settings.steps * found.seconds)} without evaluations")


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} seconds"
