"""The most likely tokens at one position of a text, with their logits and probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.core.errors import check_integer, check_number, mismatch, wrong_type
from fastlm.core.modules import evaluation_mode
from fastlm.generation.tokenizer import Tokenizer
from fastlm.models.auto import load_model
from fastlm.models.base import PretrainedModel
from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel

__all__ = ["Candidate", "load_model", "predict"]


class Candidate(NamedTuple):
    token: str
    score: float  # the logit
    probability: float  # softmax over all logits divided by the temperature
    place: int  # index of the [MASK] that the token fills; 0 for the next token


def predict(
    model: PretrainedModel, tokenizer: Tokenizer, text: str, top: int = 10, temperature: float = 1.0
) -> list[Candidate]:
    """The `top` most likely next tokens of a text (GPT-2) or fillings of each of its mask tokens (BERT), sorted.

    Raises:
        ValueError: the text is empty, longer than the context, or has no [MASK] for a BERT; top < 1;
            temperature <= 0; the model has no language-modelling head.
    """
    top = check_integer("top", top, "an integer >= 1", range(1, 2**63))
    if not check_number("temperature", temperature, "a finite number > 0") > 0:
        raise mismatch("temperature", "a finite number > 0", temperature)
    if not isinstance(text, str):
        raise wrong_type("text", "a string", text)
    if not hasattr(tokenizer, "mask_token_id"):
        raise wrong_type("tokenizer", "a tokenizer", tokenizer)
    causal = isinstance(model, LanguageModel)
    if not causal and not isinstance(model, EncoderForMaskedLM):
        raise mismatch("model", "a model that predicts the next or a masked token", f"a {type(model).__name__}")
    ids = tokenizer.encode(text)
    if not ids:
        raise mismatch("text", "at least one token", repr(text))
    context = model.config.max_position_embeddings if causal else model.config.context
    if len(ids) > context:
        raise mismatch("text", f"at most {context} tokens, the context of the model", len(ids))
    positions = [len(ids) - 1] if causal else [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    if not positions:
        if tokenizer.mask_token is None:
            raise mismatch("tokenizer", "a tokenizer with a mask token", "one without")
        raise mismatch("text", f"at least one {tokenizer.mask_token}", repr(text))
    logits = logits_at(model, ids, positions)
    # Relative to the largest one and in float64, logits do not overflow, however small the temperature is.
    probabilities = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(-1)
    candidates = []
    for place, (row, row_probabilities) in enumerate(zip(logits, probabilities, strict=True)):
        best = row.topk(min(top, row.numel()))
        candidates += [
            Candidate(tokenizer.token(token), score, row_probabilities[token].item(), place)
            for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return candidates


def logits_at(model: PretrainedModel, ids: list[int], positions: list[int]) -> Tensor:
    """(positions, vocabulary), float32, on the CPU."""
    with evaluation_mode(model), torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids], device=model.device)).logits
    return logits[0, positions].float().cpu()
