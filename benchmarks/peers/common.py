"""What the adapters share: padded batches, and the embeddings or scores that follow from their hidden states."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from benchmarks.peers.shapes import is_reranker
from fastlm.integrations.encoding.settings import from_directory
from fastlm.integrations.encoding.tokens import load_tokenizer

BATCHES = (1, 8, 32, 64)


class Run(Protocol):
    def __call__(self, texts: list[str], batch: int, query: str | None) -> Tensor:
        """The embeddings of texts, (len(texts), width), or the scores of their pairs with a query, (len(texts),)."""


def check_model(directory: Path) -> None:
    """All adapters compute the mean of the tokens, normalized."""
    settings = from_directory(directory)[1]
    following = [name for name, _ in settings.after]
    if settings.modes != ("mean",) or following not in ([], ["Normalize"]):
        raise ValueError(f"model: expected a SentenceTransformer with mean pooling, got {directory}")


def in_batches(directory: Path, hidden_states: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """hidden_states: of padded token ids and their mask."""
    tokenizer, length = load_tokenizer(directory), from_directory(directory)[1].max_length
    head = head_of(directory) if is_reranker(directory) else None

    @torch.inference_mode()
    def run(texts: list[str], batch: int, query: str | None) -> Tensor:
        found = []
        for i in range(0, len(texts), batch):
            given = texts[i : i + batch]
            tokens = tokenizer(
                *([given] if query is None else [[query] * len(given), given]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            hidden = hidden_states(ids, mask).float()
            found.append(mean(hidden, mask) if head is None else head(hidden))
        return torch.cat(found)

    return run


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None]
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def head_of(directory: Path) -> Callable[[Tensor], Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    return lambda hidden: model.classifier(model.bert.pooler(hidden))[:, 0]
