"""`fastlm.rerank`: the scores of a cross-encoder for pairs of a query and a text."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fastlm.core.errors import check_choice, mismatch, wrong_type
from fastlm.integrations.encoding.forward import (
    Results,
    Runner,
    check_budget,
    check_model,
    gather,
    is_sentence_transformer,
)
from fastlm.integrations.encoding.load import load
from fastlm.integrations.encoding.schedule import Item
from fastlm.integrations.encoding.tokens import Tokenizing, check_max_length, check_texts, find_tokenizer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "identity": lambda x: x}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A cross-encoder."""

    model: Any  # of transformers or fastlm.models, with a head of one label
    tokenizer: Any
    activation: Callable[[Tensor], Tensor]
    max_length: int

    def tokenizing(self, query: str, texts: list[str]) -> Tokenizing:
        return Tokenizing(self.tokenizer, texts, self.max_length, query=query)

    def run(self, tokenizing: Tokenizing, budget: int) -> Results:
        """The scores of all batches."""
        runner = Runner(self.model)

        def compute(batch: list[Item]) -> Tensor:
            logits = runner(tokenizing.pad(batch))[0].float()
            if logits.shape != (len(batch), 1):
                expected = f"results of shape {(len(batch), 1)} for {len(batch)} pairs"
                raise mismatch("model", expected, f"{tuple(logits.shape)} from {type(self.model).__name__}")
            return self.activation(logits)[:, 0]

        return runner.run(tokenizing, budget, compute)


def scorer(
    model: nn.Module | str | os.PathLike,
    *,
    tokenizer: Any = None,
    activation: str | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Scorer:
    """dtype, device: of the parameters of a model in a directory."""
    if activation is not None:
        check_choice("activation", activation, tuple(ACTIVATIONS))
    own: Callable[[Tensor], Tensor] | None = None
    found: Any = model
    if isinstance(model, str | os.PathLike):
        found = load(model, AutoModelForSequenceClassification, dtype=dtype, may_be_missing="\0").to(device)
        tokenizer = Path(model) if tokenizer is None else tokenizer
    elif is_sentence_transformer(model, "CrossEncoder"):
        found, tokenizer, own = from_cross_encoder(model, tokenizer)
    check_model(found)
    if found.config.num_labels != 1:
        got = f"{type(found).__name__} of {found.config.num_labels}"
        raise mismatch("model", "a model for the classification of sequences with one label", got)
    used = find_tokenizer(tokenizer, found)
    chosen = ACTIVATIONS[activation] if activation is not None else own or own_activation(found.config)
    return Scorer(found, used, chosen, check_max_length(max_length, None, found.base_model, used))


def from_cross_encoder(model: Any, tokenizer: Any) -> tuple[nn.Module, Any, Callable[[Tensor], Tensor]]:
    """(the transformers model, the tokenizer, the activation)."""
    # Since version 5.4 it is a Sequential, whose first module holds the transformers model.
    following = [type(module).__name__ for module in list(model)[1:]] if isinstance(model, nn.Sequential) else []
    prompt = getattr(model, "default_prompt_name", None)
    if following or prompt is not None:
        got = f"one with {', '.join(following)}" if following else f"one with the prompt {prompt!r}"
        raise mismatch("model", "a CrossEncoder of a transformers model alone", got)
    return model.model, model.tokenizer if tokenizer is None else tokenizer, model.activation_fn


def own_activation(config: Any) -> Callable[[Tensor], Tensor]:
    """What sentence-transformers applies: the activation that the configuration names, or the sigmoid."""
    described = getattr(config, "sentence_transformers", None) or {}
    name = described.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    name = "sigmoid" if name is None else str(name).rpartition(".")[2].lower()
    if name not in ACTIVATIONS:
        raise mismatch("activation", f"one of {', '.join(map(repr, ACTIVATIONS))}", f"{name!r} in the configuration")
    return ACTIVATIONS[name]


def rerank(
    model: nn.Module | str | os.PathLike,
    query: str,
    texts: Iterable[str],
    *,
    max_tokens_per_batch: int,
    progress: bool | None,
    **options: Any,
) -> Tensor:
    if not isinstance(query, str):
        raise wrong_type("query", "a string", query)
    found, budget = check_texts(texts), check_budget(max_tokens_per_batch)
    described = scorer(model, **options)
    tokenizing = described.tokenizing(query, found)
    out = gather(described.run(tokenizing, budget), len(found), "pair", progress)
    tokenizing.warn("pair")
    return torch.empty(0) if out is None else out
