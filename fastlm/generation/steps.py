"""Tokens one after the other: the prompt in one pass, then one row per sequence and step against the cache."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache
from fastlm.generation.sampling import Sampling

if TYPE_CHECKING:
    from fastlm.models.gpt2 import GPT2LMHeadModel


class Steps:
    """Each call makes the next token of every row.

    Attributes:
        sequences: (batch, tokens + max_new_tokens), padding where there is nothing yet.
        ended: (batch,), whether a row has come to its end.
        begun: 0-d int64, how many tokens were made while some row had not.
    """

    waits = True  # for each token anyway: whether all rows have ended may then be looked at after each

    def __init__(
        self,
        model: "GPT2LMHeadModel",
        input_ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        eos: tuple[int, ...],
        pad: int,
        generator: torch.Generator | None,
        attention_mask: Tensor | None,
    ) -> None:
        self.model, self.sampling, self.pad, self.generator = model, sampling, pad, generator
        batch, self.prompt = input_ids.shape
        self.capacity = self.prompt + max_new_tokens
        self.sequences = input_ids.new_full((batch, self.capacity), pad)
        self.sequences[:, : self.prompt] = input_ids
        self.real = self.positions = None
        if attention_mask is not None:
            self.real = attention_mask.new_ones(self.sequences.shape)
            self.real[:, : self.prompt] = attention_mask
            self.positions = (self.real.cumsum(-1) - 1).clamp(
                min=0
            )  # the first real token of a row stands at 0, whatever is before it
        self.cache = KVCache(model.config.n_layer, self.capacity)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        self.endings = torch.tensor(eos, dtype=torch.long, device=input_ids.device)
        self.begun = torch.zeros((), dtype=torch.long, device=input_ids.device)

    def __call__(self, end: int) -> None:
        """The token at place `end` of every row, from those before it."""
        seen = slice(self.cache.length, end)
        real = None if self.real is None else self.real[:, :end]
        positions = None if self.positions is None else self.positions[:, seen]
        logits = self.model(self.sequences[:, seen], self.cache, real, position_ids=positions, logits_to_keep=1).logits
        self.sequences[:, end] = self.chosen(logits)

    def chosen(self, logits: Tensor) -> Tensor:
        tokens = self.sampling.choose(logits[:, -1], self.generator).masked_fill(self.ended, self.pad)
        self.begun += ~self.ended.all()
        if self.endings.numel():
            self.ended |= (tokens[:, None] == self.endings).any(-1)
        return tokens
