"""Decoding steps launched one by one: the first processes the prompt, each later one a single token per sequence.

Beyond the model's context a token is predicted from the last `context` tokens. Their positions change with every step,
so that keys and values cannot be reused: such a step processes the whole window.
"""

import torch
from torch import Tensor

from fastlm.models.base import PretrainedModel
from fastlm.models.decoding.sampling import Sampling


class DecodingSteps:
    """A call computes the next token of every row.

    Attributes:
        sequences: (batch, tokens + max_new_tokens), filled with the padding token where nothing was generated yet.
        finished: (batch,) bool, whether a row has produced an eos token.
        num_generated: 0-d int64, the number of steps in which at least one row was not finished.
    """

    synchronous = True  # every step waits for its token, so that checking for the end after each costs nothing

    def __init__(
        self,
        model: PretrainedModel,
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
        self.attention_mask = self.position_ids = None
        if attention_mask is not None:
            self.attention_mask = attention_mask.new_ones(self.sequences.shape)
            self.attention_mask[:, : self.prompt] = attention_mask
            self.position_ids = positions(self.attention_mask)
        self.context: int = model.config.max_position_embeddings
        self.cache = model.new_cache(min(self.capacity, self.context))
        self.finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        self.eos = torch.tensor(eos, dtype=torch.long, device=input_ids.device)
        self.num_generated = torch.zeros((), dtype=torch.long, device=input_ids.device)

    def __call__(self, position: int) -> None:
        """Writes the token at `position` of every row, computed from the tokens before it."""
        if position > self.context:
            self.slide(position)
            return
        new = slice(self.cache.length, position)
        mask = None if self.attention_mask is None else self.attention_mask[:, :position]
        position_ids = None if self.position_ids is None else self.position_ids[:, new]
        logits = self.model(
            self.sequences[:, new], self.cache, mask, position_ids=position_ids, logits_to_keep=1
        ).logits
        self.sequences[:, position] = self.next_tokens(logits)

    def slide(self, position: int) -> None:
        """The same, from the last `context` tokens and without the cache."""
        window = slice(position - self.context, position)
        mask = None if self.attention_mask is None else self.attention_mask[:, window]
        logits = self.model(
            self.sequences[:, window],
            None,
            mask,
            position_ids=None if mask is None else positions(mask),
            logits_to_keep=1,
        ).logits
        self.sequences[:, position] = self.next_tokens(logits)

    def next_tokens(self, logits: Tensor) -> Tensor:
        tokens = self.sampling.choose(logits[:, -1], self.generator).masked_fill(self.finished, self.pad)
        self.num_generated += ~self.finished.all()
        if self.eos.numel():
            self.finished |= (tokens[:, None] == self.eos).any(-1)
        return tokens


def positions(mask: Tensor) -> Tensor:
    """The first real token of a row has position 0, however much padding precedes it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
