"""fastlm generate: continues a prompt with a trained model."""

from pathlib import Path
from typing import Any

from fastlm.commands.process import set_up
from fastlm.commands.streaming import continue_text
from fastlm.core.errors import mismatch
from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.models.language_model import LanguageModel
from fastlm.training.settings import check_seed


def run(directory: Path, prompt: str, *, device: str, threads: int | None, seed: int, **sampling: Any) -> None:
    check_seed(seed)
    chosen = set_up(device, threads)
    model = load_model(directory)
    if not isinstance(model, LanguageModel):
        expected = "a causal language model such as GPT-2 (use fastlm predict for masked-token models)"
        raise mismatch("model", expected, f"the {type(model).__name__} in {directory}")
    continue_text(model.to(chosen), load_tokenizer(directory), prompt, seed=seed, **sampling)
