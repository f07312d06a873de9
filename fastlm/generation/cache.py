"""The keys and values of the tokens that a causal model has seen, so that each new token costs one row and not the whole sequence again."""

import torch
from torch import Tensor

from fastlm.ops.boundary import mismatch


class KVCache:
    """Per layer one (batch, heads, capacity, head_dim) tensor of keys and one of values, allocated once and written in place.

    Attributes:
        length: tokens seen. The model advances it once per call, after all its layers have written.
        capacity: tokens there is room for. Memory that no token has reached is not touched.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new (batch, heads, tokens, head_dim) behind what is there; returns all of it, as views."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise mismatch("past_key_values", f"room for {end} tokens", f"a cache of {self.capacity}")
        if self.length and torch.is_grad_enabled() and key.requires_grad:
            raise mismatch(
                "past_key_values",
                "a call under torch.no_grad() or inference_mode(): a cache carries no gradients",
                "one that wants gradients",
            )
        return self.append(self.keys, layer, key, end), self.append(self.values, layer, value, end)

    def append(self, store: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        kept = store[layer]
        if kept is None:
            batch, heads, _, head_dim = new.shape
            kept = store[layer] = new.new_empty((batch, heads, self.capacity, head_dim))
        elif kept.shape[0] != new.shape[0]:
            raise mismatch("past_key_values", f"a cache of {new.shape[0]} sequences, as the input", kept.shape[0])
        kept[:, :, self.length : end] = new.detach()
        return kept[:, :, :end] if self.length else new  # of a first call the originals, through which gradients flow
