"""The KV cache: keys and values of earlier tokens, so that a decoding step computes one row per sequence."""

import torch
from torch import Tensor

from fastlm.core.errors import mismatch


class KVCache:
    """Per layer, one (batch, heads, capacity, head_dim) tensor of keys and one of values, preallocated and written
    in place.

    Attributes:
        length: number of cached tokens. The model advances it once per call, after all its layers have written.
        capacity: maximum number of tokens. The allocation is not initialised, so unused capacity takes no physical
            memory.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new (batch, heads, tokens, head_dim) tensors; returns views of all cached keys and values."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise mismatch("past_key_values", f"capacity for {end} tokens", f"a cache of {self.capacity}")
        if self.length and torch.is_grad_enabled() and key.requires_grad:
            raise mismatch(
                "past_key_values",
                "a call under torch.no_grad() or torch.inference_mode(), as cached tensors have no gradients",
                "a call that requires gradients",
            )
        return self.append(self.keys, layer, key, end), self.append(self.values, layer, value, end)

    def append(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = buffers[layer]
        if buffer is None:
            batch, heads, _, head_dim = new.shape
            buffer = buffers[layer] = new.new_empty((batch, heads, self.capacity, head_dim))
        elif buffer.shape[0] != new.shape[0]:
            raise mismatch("past_key_values", f"a cache of {new.shape[0]} sequences, as the input", buffer.shape[0])
        buffer[:, :, self.length : end] = new.detach()
        # The first call returns its own tensors, so that gradients flow through them.
        return buffer[:, :, :end] if self.length else new
