"""decoder_layer by the C++ kernel (csrc/cpu/decoder_layer.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.cpu import check_storages, kernels
from fastlm.ops.decoder_layer.spec import Layer

Slots = tuple[Tensor, Tensor, int]
Tables = tuple[Tensor | None, Tensor | None]


def decode(
    layers: list[Layer], x: Tensor, slots: list[Slots], tables: Sequence[Tables], key_padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs layers on one token of every sequence.

    Args:
        x: (batch, 1, width), contiguous: the input of the first layer, which has no residual sum yet.
        slots: of each layer, the tensors of keys and values, (batch, num_kv_heads, slots, head_dim), and the slot to
            which those of the token are written. It attends to the slots up to there.
        tables: of each layer, cos and sin of the positions, (batch or 1, 1, head_dim), in float32.
        key_padding: (batch, keys), bool, False at padding; its last entries belong to the slots.

    Returns:
        (x, residual): the output of the last layer, not yet added to the residual sum, and that sum.
    """
    check_storages(("x", "key_padding"), (x, key_padding))
    y, summed = torch.empty_like(x), torch.empty_like(x)
    kernels.decoder_layers(
        x=x,
        y=y,
        summed=summed,
        key_padding=key_padding,
        threads=cpu.threads(),
        slots=slots,
        tables=[*tables],
        names=Layer._fields,
        layers=layers,
    )
    return y, summed
