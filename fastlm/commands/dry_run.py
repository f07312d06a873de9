"""fastlm train --dry-run: what a run takes on this machine."""

from typing import Any

import torch

from fastlm.commands.display import describe_device, quantity, say
from fastlm.training import data
from fastlm.training.estimate import estimate
from fastlm.training.models import build
from fastlm.training.settings import Settings


def show_estimate(settings: Settings, corpus: data.Corpus, loaded: Any, device: torch.device) -> None:
    """loaded: the model to start from, which is measured as it is; None: a new one."""
    if loaded is not None:
        found = estimate(settings, corpus, lambda _: loaded, device)
    else:
        found = estimate(settings, corpus, lambda some: build(some, corpus.tokenizer), device)
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
