"""Decode steps on a CPU: all layers in one call of compiled code (fastlm/ops/decoder_layer).

A step is the forward pass of one token per sequence after those in a KV cache. Its layers run in one call without
gradients, hooks, tracing, autocast or other backend, if modules and parameters are of the usual types. Otherwise, and
in every other forward pass, the modules run: on the backend `cpu` with the same bits.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from fastlm.models.cache import KVCache
from fastlm.models.compiled import Unchanged, may_skip_modules, must_be_called
from fastlm.ops.decoder_layer import Layer, is_selected
from fastlm.ops.decoder_layer.cpu import Tables, decode


class Steps(NamedTuple):
    """The layers of a model as compiled code takes them, and what must not have changed since."""

    layers: list[Layer]
    numbers: list[int]  # of the layers in the cache
    kinds: list[Layer]  # one of each kind, for backend selection
    unchanged: Unchanged


# Made at the first step with a cache. None: the modules run, until the cache is dropped. Tensors are kept alive.
steps_of: weakref.WeakKeyDictionary[KVCache, Steps | None] = weakref.WeakKeyDictionary()


def decode_step(
    layers: nn.ModuleList, x: Tensor, cache: KVCache | None, tables: Sequence[Tables], key_padding: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Runs all layers on one new token of every sequence, if they can run in one call.

    Args:
        layers: modules with a method describe(), which returns the number of the layer in the cache and a Layer, or
            None if it cannot be described.
        x: (batch, tokens, width), the input of the first layer.
        tables: those of each layer.
        key_padding: (batch, cached tokens + tokens), bool, False at padding.

    Returns:
        (x, residual), as the last layer returns them; None: the modules must run.
    """
    if cache is None or not takes_one_token(x, cache):
        return None
    if cache not in steps_of:
        steps_of[cache] = describe(layers)
    steps = steps_of[cache]
    if steps is None:
        return None
    if not steps.unchanged.holds(layers):
        steps_of[cache] = None
        return None
    keys = cache.keys[0]
    assert keys is not None
    if keys.shape[0] != x.shape[0] or keys.dtype != x.dtype:
        return None
    for kind in steps.kinds:
        key_len = min(cache.length, kind.window) + 1
        if not is_selected(kind, x, keys.shape[3], key_len, key_padding is not None):
            return None
    slots = [cache.reserve(number) for number in steps.numbers]
    return decode(steps.layers, x, slots, tables, key_padding)


def takes_one_token(x: Tensor, cache: KVCache) -> bool:
    return may_skip_modules(x) and x.shape[1] == 1 and type(cache) is KVCache and 0 < cache.length < cache.capacity


def describe(layers: nn.ModuleList) -> Steps | None:
    if not layers or any(module.training for module in layers.modules()) or any(map(must_be_called, layers)):
        return None
    # What may not change is read before the layers are, so that no change in between goes unnoticed.
    unchanged = Unchanged.of(layers)
    found = [cast(Any, layer).describe() for layer in layers]
    if None in found or not unchanged.holds(layers):
        return None
    numbers, described = zip(*found, strict=True)
    kinds = {sizes_and_settings(layer): layer for layer in described}
    return Steps([*described], [*numbers], [*kinds.values()], unchanged)


def sizes_and_settings(layer: Layer) -> tuple[Any, ...]:
    """Layers in which these are equal call the same operators with the same sizes."""
    return tuple([value.shape if isinstance(value, Tensor) else value for value in layer])
