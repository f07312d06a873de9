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
        slot = make_room(buffer, held, tokens, window)
        if slot is None:
            every = torch.cat([buffer[:, :, held - min(held, window) : held], new], 2) if held else new
            buffer[:, :, :window] = every[:, :, every.shape[2] - window :].detach()
            return every, window
        buffer[:, :, slot : slot + tokens] = new.detach()
        return buffer[:, :, : slot + tokens] if self.length else new, slot + tokens

    def reserve(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Makes room for one token of every sequence, after a first call of update and below the capacity.

        Returns:
            The (batch, heads, slots, head_dim) tensors of keys and values, and the slot to which those of the token are
            to be written. The slots before it hold the tokens that update would return.
        """
        keys, values, window = self.keys[layer], self.values[layer], self.windows[layer]
        assert keys is not None and values is not None
        if window is None:
            return keys, values, self.length
        held = self.held[layer]
        slot = make_room(keys, held, 1, window)
        make_room(values, held, 1, window)
        assert slot is not None  # the tensors are wider than the window
        self.held[layer] = slot + 1
        return keys, values, slot


def make_room(buffer: Tensor, held: int, tokens: int, window: int) -> int | None:
    """The slot of a buffer with `held` tokens from which on so many more are written; None if they do not fit.

    If its end is reached, the last window is moved to the front.
    """
    slots = buffer.shape[2]
    if held + tokens <= slots:
        return held
    kept = min(held, window)
    if kept + tokens > slots:
        return None
    buffer[:, :, :kept] = buffer[:, :, held - kept : held].clone()
    return kept


def allocated(buffers: list[Tensor | None], layer: int, new: Tensor, slots: int) -> Tensor:
    """The buffer of a layer, which the first call allocates."""
    buffer = buffers[layer]
    if buffer is None:
        batch, heads, _, head_dim = new.shape
        buffer = buffers[layer] = new.new_empty((batch, heads, slots, head_dim))
    elif buffer.shape[0] != new.shape[0]:
        raise mismatch("past_key_values", f"a cache of {new.shape[0]} sequences, as the input", buffer.shape[0])
    return buffer
