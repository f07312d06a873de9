"""encoder_layer by the C++ kernel (csrc/cpu/encoder_layer.h)."""

import torch
from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.cpu import check_storages, kernels, new, new_like
from fastlm.ops.encoder_layer.spec import Layer, Layers


def encode(layers: Layers, x: Tensor, starts: list[int]) -> Tensor:
    """Runs all layers on packed sequences.

    Args:
        x: (…, width), contiguous: the rows of the sequences, one after another.
        starts: (sequences + 1) where they begin, and the number of rows.

    Returns:
        The output of the last layer, like x.

    Raises:
        TypeError, ValueError: a tensor is not as the layer says. Nothing has been computed.
    """
    check_storages(("x",), (x,))
    y, rows = new_like(x), x.numel() // x.shape[-1]
    kernels.encoder_layers(
        x=x,
        y=y,
        scratch=new(x, (rows, layers.scratch_width)),
        statistics=new(x, (rows, layers.statistics_width), dtype=torch.float32),
        starts=starts,
        threads=cpu.threads(),
        names=Layer._fields,
        layers=layers.layers,
    )
    return y
