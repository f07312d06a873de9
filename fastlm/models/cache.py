"""The KV cache: keys and values of earlier tokens, so that a decoding step computes one row per sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.core.errors import mismatch


class KVCache:
    """Per layer, one (batch, heads, tokens, head_dim) tensor of keys and one of values, preallocated and written in
    place. A layer with a window keeps the last tokens only: its memory does not grow with the capacity.

    Args:
        layers: number of layers.
        capacity: maximum number of tokens. The allocation is not initialised, so unused capacity takes no physical
            memory.
        windows: for each layer, to how many tokens before its own a query attends; None: to all.

    Attributes:
        length: number of cached tokens. The model advances it once per call, after all its layers have written.
    """

    def __init__(self, layers: int, capacity: int, windows: Sequence[int | None] = ()) -> None:
        self.length, self.capacity = 0, capacity
        self.windows = tuple(windows) or (None,) * layers
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.held = [0] * layers  # tokens in the tensors of a layer with a window

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new (batch, heads, tokens, head_dim) tensors.

        Returns:
            Keys and values of all tokens so far; with a window of the new ones and of at least the window before the
            first of them.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise mismatch("past_key_values", f"capacity for {end} tokens", f"a cache of {self.capacity}")
        if self.length and torch.is_grad_enabled() and key.requires_grad:
            raise mismatch(
                "past_key_values",
                "a call under torch.no_grad() or torch.inference_mode(), as cached tensors have no gradients",
                "a call that requires gradients",
            )
        window = self.windows[layer]
        if window is None:
            return self.append(self.keys, layer, key, end), self.append(self.values, layer, value, end)
        keys, _ = self.append_to_window(self.keys, layer, key, window)
        values, self.held[layer] = self.append_to_window(self.values, layer, value, window)
        return keys, values

    def append(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = allocated(buffers, layer, new, self.capacity)
        buffer[:, :, self.length : end] = new.detach()
        # The first call returns its own tensors, so that gradients flow through them.
        return buffer[:, :, :end] if self.length else new

    def append_to_window(
        self, buffers: list[Tensor | None], layer: int, new: Tensor, window: int
    ) -> tuple[Tensor, int]:
        """(the result of update, tokens that are held now).

        The tensors have room for two windows: one of `window` steps moves the last window to the front.
        """
        held, tokens = self.held[layer], new.shape[2]
        buffer = allocated(buffers, layer, new, min(self.capacity, 2 * window + 1))
        if held + tokens > buffer.shape[2]:
            kept = buffer[:, :, held - min(held, window) : held]
            if kept.shape[2] + tokens > buffer.shape[2]:
                every = torch.cat([kept, new], 2) if held else new
                last = every[:, :, every.shape[2] - window :].detach()
                buffer[:, :, :window] = last
                return every, window
            held = kept.shape[2]
            buffer[:, :, :held] = kept.clone()
        buffer[:, :, held : held + tokens] = new.detach()
        return buffer[:, :, : held + tokens] if self.length else new, held + tokens


def allocated(buffers: list[Tensor | None], layer: int, new: Tensor, slots: int) -> Tensor:
    """The buffer of a layer, which the first call allocates."""
    buffer = buffers[layer]
    if buffer is None:
        batch, heads, _, head_dim = new.shape
        buffer = buffers[layer] = new.new_empty((batch, heads, slots, head_dim))
    elif buffer.shape[0] != new.shape[0]:
        raise mismatch("past_key_values", f"a cache of {new.shape[0]} sequences, as the input", buffer.shape[0])
    return buffer
