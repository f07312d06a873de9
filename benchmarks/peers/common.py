"""What the adapters share: padded batches, and the embeddings of their hidden states."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.integrations.encoding.settings import from_directory
from fastlm.integrations.encoding.tokens import load_tokenizer

Embed = Callable[[list[str], int], Tensor]
BATCHES = (1, 8, 32, 64)


def check_model(directory: Path) -> None:
    """All adapters compute the mean of the tokens, normalized."""
    settings = from_directory(directory)[1]
    following = [name for name, _ in settings.after]
    if settings.modes != ("mean",) or following not in ([], ["Normalize"]):
        raise ValueError(f"model: expected a SentenceTransformer with mean pooling, got {directory}")


def in_batches(directory: Path, hidden_states: Callable[[Tensor, Tensor], Tensor]) -> Embed:
    """hidden_states: of padded token ids and their mask."""
    tokenizer, length = load_tokenizer(directory), from_directory(directory)[1].max_length

    def embed(texts: list[str], batch: int) -> Tensor:
        found = []
        for i in range(0, len(texts), batch):
            tokens = tokenizer(
                texts[i : i + batch], padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            found.append(mean(hidden_states(ids, mask), mask))
        return torch.cat(found)

    return embed


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None]
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
