"""fastlm generate: a checkpoint and a prompt in, text out."""

from pathlib import Path
from typing import Any

from fastlm.commands.display import set_threads
from fastlm.commands.streaming import continue_text
from fastlm.device import choose_device
from fastlm.generation import load_tokenizer
from fastlm.models import GPT2LMHeadModel, load_model
from fastlm.ops.boundary import mismatch
from fastlm.training.settings import whole


def run(directory: Path, prompt: str, *, device: str, threads: int | None, seed: int, **sampling: Any) -> None:
    whole("seed", seed, 0)
    chosen = choose_device(device)
    set_threads(threads)
    model = load_model(directory)
    if not isinstance(model, GPT2LMHeadModel):
        raise mismatch(
            "model",
            "a GPT-2 (a model of masked tokens fills in what is missing: fastlm predict)",
            f"the {type(model).__name__} in {directory}",
        )
    continue_text(model.to(chosen), load_tokenizer(directory), prompt, seed=seed, **sampling)
