"""Prints generated text token by token."""

import sys

import torch
from torch import Tensor

from fastlm.core.errors import mismatch
from fastlm.generation import Tokenizer
from fastlm.models.language_model import LanguageModel


class TextStreamer:
    """Prints the text of new tokens; incomplete characters are held back until they are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed = 0

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        self.show(whole=False)

    def end(self) -> None:
        self.show(whole=True)
        print(flush=True)

    def show(self, *, whole: bool) -> None:
        text = self.tokenizer.decode(self.ids)
        if not whole:
            text = text.rstrip("\ufffd")
        new, self.printed = text[self.printed :], max(self.printed, len(text))
        if sys.stdout.isatty():  # a byte-level model may generate terminal control sequences
            new = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in new)
        print(new, end="", flush=True)


def continue_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    """Generates and prints a continuation."""
    ids = tokenizer.encode(prompt, "prompt")
    if not ids:
        raise mismatch("prompt", "at least one token", repr(prompt))
    context = model.config.max_position_embeddings
    if len(ids) > context:
        print(f"the prompt has {len(ids)} tokens; the model reads the last {context}, its context", file=sys.stderr)
    model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        streamer=TextStreamer(tokenizer),
    )
