"""decoder_layer by the C++ kernel (csrc/cpu/decoder_layer.h)."""

from typing import Any

from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.cpu import kernels


def decode(
    layer: dict[str, Any],
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    summed: Tensor,
    cached: tuple[Tensor, Tensor, int],
    tables: tuple[Tensor | None, Tensor | None],
    key_padding: Tensor | None,
) -> None:
    """Computes one token of every sequence.

    Args:
        layer: the fields of a Layer.
        x: (batch, 1, width), the output of the previous layer, not yet added to the residual sum.
        residual: the residual sum, like x; None: x is the first one.
        y, summed: the results, like x; they may be x and residual.
        cached: the tensors of keys and values, (batch, num_kv_heads, slots, head_dim), and the slot to which those of
            this token are written. It attends to the slots up to there.
        tables: cos and sin of its position, (batch or 1, 1, head_dim).
        key_padding: (batch, keys), bool, False at padding; its last entries belong to the slots.
    """
    kernels.decoder_layer(
        x=x,
        residual=residual,
        y=y,
        summed=summed,
        keys=cached[0],
        values=cached[1],
        slot=cached[2],
        cos=tables[0],
        sin=tables[1],
        key_padding=key_padding,
        threads=cpu.threads(),
        **layer,
    )
