"""Batches without padding: real tokens gathered before the first layer of an encoder and scattered after the last.

In between, hidden states are (1, real tokens, width), one sequence after another, and layers get a `Packed` in place of
the mask. Reading the mask's values is the only synchronization that this costs on a GPU.
"""

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


def pack_by_mask(mask: Tensor | None, hidden_states: Tensor) -> Packed | None:
    """None if the mask is not a padding mask, or if sizes may not depend on its values."""
    padding = padding_of(mask) if sizes_may_depend_on_values(hidden_states) else None
    return pack(padding) if padding is not None and padding.shape == hidden_states.shape[:2] else None
