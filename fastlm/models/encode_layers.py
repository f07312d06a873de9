"""All layers of an encoder in one call of compiled code (fastlm/ops/encoder_layer), on a CPU and without gradients.

Layers that cannot be described, and calls for which another backend is selected, run by their modules: on the backend
`cpu` with the same bits.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlm.models.compiled import USUAL, Conditions, Unchanged, must_be_called
from fastlm.models.packing import Packed
from fastlm.ops.encoder_layer import Layer, Layers
from fastlm.ops.encoder_layer.cpu import encode


class Description:
    """The layers of one encoder as the compiled function takes them. Changed layers are described again."""

    def __init__(self, describe: Callable[[Any], Layer | None], conditions: Conditions = USUAL) -> None:
        """describe: returns what a layer computes now; None if it cannot be described."""
        self.describe, self.conditions = describe, conditions
        self.described: tuple[Unchanged, Layers] | None = None  # its tensors are kept alive
        self.refused: Unchanged | None = None  # the layer that could not be described

    def layers(self, modules: nn.ModuleList) -> Layers | None:
        """None if a layer cannot be described."""
        if type(modules) is not nn.ModuleList or not modules:
            return None
        described, refused = self.described, self.refused  # once: another thread may replace them
        if described is not None and described[0].holds(modules):
            return described[1]
        if refused is not None and refused.holds(modules):
            return None
        self.described = self.refused = None
        # What may not change is read before the layers are, so that no change in between goes unnoticed.
        unchanged, layers = Unchanged.of(modules), []
        for module in modules:
            layer = self.describe_layer(module)
            if layer is None:
                self.refused = Unchanged.of(modules, only=module)
                return None
            layers.append(layer)
        if not unchanged.holds(modules):
            return None
        described = self.described = unchanged, Layers.of(layers)
        return described[1]

    def holds(self, modules: nn.ModuleList) -> bool:
        """Whether the layers have been described, and have not changed since."""
        described = self.described
        return described is not None and described[0].holds(modules)

    def describe_layer(self, module: nn.Module) -> Layer | None:
        return None if must_be_called(module, self.conditions) else self.describe(module)


descriptions: weakref.WeakKeyDictionary[nn.ModuleList, Description] = weakref.WeakKeyDictionary()


def description_of(modules: nn.ModuleList, describe: Callable[[Any], Layer | None]) -> Description:
    """The description that is kept for some layers, made at the first call."""
    description = descriptions.get(modules)
    if description is None:
        description = descriptions[modules] = Description(describe)
    return description


def encode_layers(layers: Layers, x: Tensor, packed: Packed | None) -> Tensor | None:
    """Runs all layers, if the backend `cpu` is selected for them.

    Args:
        x: (1, real tokens, width) of a packed batch, or (batch, tokens, width): the input of the first layer.
        packed: where the sequences of a packed batch are; None of one without padding.

    Returns:
        The output of the last layer, like x; None: the modules must run.
    """
    if x.numel() == 0:
        return None
    batch, tokens, _ = x.shape
    sequences = batch if packed is None else packed.cu_seqlens.shape[0] - 1
    # The data of a parameter may have been replaced by one of another shape, layout or dtype, which is no change of a
    # module. The compiled function checks the tensors of all layers before the first runs. Those that it does not take
    # are left to the modules, which compute with them or raise an error of their own.
    try:
        if not layers.are_selected(x, sequences):
            return None
        starts = [*range(0, batch * tokens + 1, tokens)] if packed is None else packed.cu_seqlens.tolist()
        return encode(layers, x, starts)
    except (TypeError, ValueError):
        return None
