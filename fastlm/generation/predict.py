"""What a model expects at one place: the tokens it thinks likeliest, with their scores and the probabilities that a temperature makes of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.generation.decode import evaluating
from fastlm.generation.tokenizer import Tokenizer
from fastlm.models.auto import load_model
from fastlm.models.base import PretrainedModel
from fastlm.ops.boundary import mismatch

__all__ = ["Candidate", "load_model", "predict"]


class Candidate(NamedTuple):
    token: str
    score: float  # the logit
    probability: float  # softmax of all scores divided by the temperature
    place: int  # which [MASK] of the text it fills, from 0; 0 for the next token


def predict(
    model: PretrainedModel, tokenizer: Tokenizer, text: str, top: int = 10, temperature: float = 1.0
) -> list[Candidate]:
    """The `top` likeliest next tokens of a text (GPT-2), or fillings of each [MASK] in it (BERT), likeliest first.

    Raises:
        ValueError: an empty text, one longer than the context, one without [MASK] for a BERT; top < 1; temperature ≤ 0; a model without a head over tokens.
    """
    if not isinstance(top, int) or top < 1:
        raise mismatch("top", "a whole number of at least 1", top)
    if not 0 < temperature < float("inf"):
        raise mismatch("temperature", "a positive number", temperature)
    masked = getattr(model, "cls", None) is not None
    if not masked and not hasattr(model, "lm_head"):
        raise mismatch("model", "one with scores for tokens: GPT2LMHeadModel or BertForMaskedLM", type(model).__name__)
    ids = tokenizer.encode(text)
    if not ids:
        raise mismatch("text", "at least one token", repr(text))
    context = model.config.max_position_embeddings if masked else model.config.n_positions
    if len(ids) > context:
        raise mismatch("text", f"at most {context} tokens, the context of the model", len(ids))
    places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id] if masked else [len(ids) - 1]
    if not places:
        raise mismatch(
            "text",
            f"at least one {tokenizer.mask_token}" if tokenizer.mask_token else "a tokenizer with a mask token",
            repr(text),
        )
    logits = scores(model, ids, places)
    probabilities = (logits / temperature).softmax(-1)
    rows = []
    for place, (likeliest, chances) in enumerate(zip(logits, probabilities, strict=True)):
        best = likeliest.topk(min(top, likeliest.numel()))
        rows += [
            Candidate(tokenizer.token(token), score, chances[token].item(), place)
            for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return rows


def scores(model: PretrainedModel, ids: list[int], places: list[int]) -> Tensor:
    """(places, vocabulary), in float32, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids], device=device)).logits
    return logits[0, places].float().cpu()
