"""All layers of an encoder in one call of compiled code (fastlm/ops/encoder_layer), on a CPU and without gradients.

Layers that cannot be described, and calls for which another backend is selected, run by their modules: on the backend
`cpu` with the same bits.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlm.models.compiled import NOTHING, Skipping, Unchanged, may_skip_modules, must_be_called
from fastlm.models.packing import Packed
from fastlm.ops.encoder_layer import Layer, Layers
from fastlm.ops.encoder_layer.cpu import encode


class Described:
    """The layers of one encoder as compiled code takes them. They are described again once anything has changed."""

    def __init__(self, describe: Callable[[Any], Layer | None], skipping: Skipping = NOTHING) -> None:
        """describe: returns what a layer computes now; None if it cannot be described."""
        self.describe, self.skipping = describe, skipping
        self.found: tuple[Unchanged, Layers] | None = None  # its tensors are kept alive
        self.refused: Any = None  # the layer that could not be described, which is asked first

    def current(self, layers: nn.ModuleList) -> Layers | None:
        """None if a layer cannot be described."""
        if (found := self.found) is not None and found[0].holds(layers):
            return found[1]
        self.found, refused = None, self.refused
        modules: Any = [*layers._modules.values()]
        if refused is not None and refused in modules and self.one(refused) is None:
            return None
        described = []
        for layer in modules:
            one = self.one(layer)
            if one is None:
                self.refused = layer
                return None
            described.append(one)
        self.refused = None
        if (unchanged := Unchanged.of(layers, self.skipping)) is None:  # there are none
            return None
        self.found = unchanged, Layers.of(described)
        return self.found[1]

    def one(self, layer: nn.Module) -> Layer | None:
        found = None if must_be_called(layer, self.skipping) else self.describe(layer)
        return found if found is not None and found.is_readable() else None


of_models: weakref.WeakKeyDictionary[nn.ModuleList, Described] = weakref.WeakKeyDictionary()


def encode_layers(layers: nn.ModuleList, x: Tensor, padding: Packed | Tensor | None) -> Tensor | None:
    """Runs all layers, if they can run in one call.

    Args:
        layers: modules with a method describe(), which returns a Layer, or None if it cannot be described.
        x: (1, real tokens, width) of a packed batch, or (batch, tokens, width): the input of the first layer.
        padding: where the sequences of a packed batch are; the mask of one that is not packed; None without padding.

    Returns:
        The output of the last layer, like x; None: the modules must run.
    """
    if not may_skip_modules(x) or isinstance(padding, Tensor):
        return None
    described = of_models.get(layers)
    if described is None:
        described = of_models[layers] = Described(lambda layer: layer.describe())
    found = described.current(layers)
    return None if found is None else run(found, x, padding)


def run(layers: Layers, x: Tensor, packed: Packed | None) -> Tensor | None:
    """x after all layers; None if the backend `cpu` is not selected for them."""
    if packed is None:
        batch, tokens, _ = x.shape
        sequences = batch
    else:
        sequences = packed.cu_seqlens.shape[0] - 1
    if x.numel() == 0 or not layers.are_selected(x, sequences):
        return None
    starts = [*range(0, batch * tokens + 1, tokens)] if packed is None else packed.cu_seqlens.tolist()
    return encode(layers, x, starts)
