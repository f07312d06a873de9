"""Batches without padding: real tokens gathered before the first layer of an encoder and scattered after the last.

In between, hidden states are (1, real tokens, width), one sequence after another, and layers get a `Packed` in place of
the mask. Reading the mask's values is the only synchronization that this costs on a GPU.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.integrations.attention import padding_of
from fastlm.integrations.patch import sizes_may_depend_on_values
from fastlm.models.packing import Packed, packed


def pack(padding: Tensor, *, at_end: bool = False, always: bool = False) -> Packed | None:
    """padding: (batch, tokens), True for real tokens.

    None if there is no padding, or if a sequence begins with padding: poolers and classifiers read its first position.

    Args:
        at_end: None also if real tokens follow padding. Packing would change their distances, which a window needs.
        always: pack without padding, too.
    """
    batch, tokens = padding.shape
    counts = [padding.sum(), padding[:, :1].sum()]
    if at_end:
        counts.append((padding[:, 1:] > padding[:, :-1]).sum())
    real, first_real, *resumed = torch.stack(counts).tolist()
    if (real == batch * tokens and not always) or first_real != batch or any(resumed):
        return None
    return packed(padding, real)


def pack_by_mask(mask: Tensor | None, hidden_states: Tensor, *, always: bool = False) -> Packed | None:
    """None if the mask is not a padding mask, or if sizes may not depend on its values."""
    padding = padding_of(mask) if sizes_may_depend_on_values(hidden_states) else None
    return pack(padding, always=always) if padding is not None and padding.shape == hidden_states.shape[:2] else None


# A list to which encoders append how their result is packed, instead of padding it; None: they pad it.
packed_results: contextvars.ContextVar[list[Packed] | None] = contextvars.ContextVar("packed_results", default=None)


@contextlib.contextmanager
def packed_output() -> Iterator[list[Packed]]:
    """Encoders whose call runs packed return (1, real tokens, width), for a caller that pools the tokens.

    Yields a list that is empty if the call ran with padding. Poolers and heads on top of the encoder then read packed
    hidden states, so their results have no meaning.
    """
    taken: list[Packed] = []
    token = packed_results.set(taken)
    try:
        yield taken
    finally:
        packed_results.reset(token)
