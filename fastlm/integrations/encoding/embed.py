"""`fastlm.encode`: a model, what it is, and its embeddings batch by batch."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from fastlm.core.errors import check_flag, wrong_type
from fastlm.core.modules import submodules
from fastlm.integrations.encoding.forward import (
    Results,
    Runner,
    check_budget,
    check_model,
    gather,
    is_sentence_transformer,
)
from fastlm.integrations.encoding.load import load
from fastlm.integrations.encoding.pooling import check_pooling, pool
from fastlm.integrations.encoding.schedule import Item
from fastlm.integrations.encoding.settings import Settings, from_directory, from_model, normalized
from fastlm.integrations.encoding.tokens import (
    Tokenizing,
    check_max_length,
    check_texts,
    find_tokenizer,
    load_tokenizer,
)
from fastlm.models.base import PretrainedModel
from fastlm.models.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model and how it makes an embedding."""

    model: Any  # of transformers or fastlm.models, without head
    tokenizer: Any
    settings: Settings
    modes: tuple[str, ...]
    normalize: bool | None  # None: as the settings say
    prompt: str
    max_length: int

    def tokenizing(self, texts: list[str]) -> Tokenizing:
        lower_case = self.settings.lower_case
        return Tokenizing(self.tokenizer, texts, self.max_length, prompt=self.prompt, lower_case=lower_case)

    def run(self, tokenizing: Tokenizing, budget: int, done: int = 0) -> Results:
        """The embeddings of all batches but the first `done`."""
        runner = Runner(self.model)
        skip = 0 if self.settings.includes_prompt else tokenizing.prompt_tokens()

        def compute(batch: list[Item]) -> Tensor:
            rows = runner.hidden_states(tokenizing.pad(batch), [item.tokens for item in batch])
            return self.finish(pool(rows, self.modes, skip))

        return runner.run(tokenizing, budget, compute, done)

    def finish(self, embeddings: Tensor) -> Tensor:
        """What follows the pooling."""
        is_unit = False
        for kind, function in self.settings.after:
            if kind != "Normalize" or self.normalize is not False:
                embeddings = function(embeddings)
                is_unit = kind == "Normalize"
        if self.settings.width is not None:
            embeddings, is_unit = embeddings[:, : self.settings.width], False
        return normalized(embeddings) if self.normalize and not is_unit else embeddings

    def width(self) -> int:
        with torch.inference_mode():
            device = next(self.model.parameters()).device
            rows = torch.zeros(1, self.model.config.hidden_size, device=device)
            return self.finish(pool([rows], self.modes, 0)).shape[1]


def embedder(
    model: nn.Module | str | os.PathLike,
    *,
    tokenizer: Any = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Embedder:
    """dtype, device: of the parameters of a model in a directory."""
    mode = None if pooling is None else check_pooling(pooling)
    for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
        if not isinstance(value, str | None):
            raise wrong_type(name, "a string or None", value)
    normalize = None if normalize is None else check_flag("normalize", normalize)
    settings = Settings()
    if isinstance(model, str | os.PathLike):
        directory, settings = from_directory(Path(model))
        found: Any = load(directory, AutoModel, dtype=dtype, may_be_missing="pooler").to(device)
        for _, function in settings.after:
            if isinstance(function, nn.Module):
                function.to(device)
        own_tokenizer = load_tokenizer(directory) if tokenizer is None else None
    elif is_sentence_transformer(model, "SentenceTransformer"):
        found, own_tokenizer, settings = from_model(model)
    else:
        found, own_tokenizer = model, None
    check_model(found)
    used = own_tokenizer if tokenizer is None and own_tokenizer is not None else find_tokenizer(tokenizer, found)
    base = getattr(found, "base_model", found)
    if mode is not None:
        modes: tuple[str, ...] = (mode,)
    else:
        modes = settings.modes or ("last" if is_causal(base) else "mean",)
    if normalize is None and settings.modes is None:
        normalize = True
    text = settings.prompt(prompt, prompt_name)
    length = check_max_length(max_length, settings.max_length, base, used)
    return Embedder(base, used, settings, modes, normalize, text, length)


def encode(
    model: nn.Module | str | os.PathLike,
    texts: Iterable[str],
    *,
    max_tokens_per_batch: int,
    progress: bool | None,
    **options: Any,
) -> Tensor:
    found, budget = check_texts(texts), check_budget(max_tokens_per_batch)
    described = embedder(model, **options)
    tokenizing = described.tokenizing(found)
    out = gather(described.run(tokenizing, budget), len(found), "text", progress)
    tokenizing.warn("text")
    return torch.empty(0, described.width()) if out is None else out


def is_causal(model: nn.Module) -> bool:
    if isinstance(model, PretrainedModel):
        return not isinstance(model, Encoder)
    # Not getattr of a module, which searches three dicts and raises an error where there is none.
    return any(
        vars(module).get("is_causal", getattr(type(module), "is_causal", False)) is True
        for module in submodules(model, of_each_list=1)
    )
