"""Decode steps on a CPU: all layers in one call of compiled code (fastlm/ops/decoder_layer).

A step is the forward pass of one token per sequence after those in a KV cache. Its layers run in one call where nothing
asks for their modules: no gradients, hooks, tracing, autocast or other backend, and modules and parameters of the usual
types. Otherwise, and in every other forward pass, the modules run: on the backend `cpu` with the same bits.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlm.backends.cpu import kernels
from fastlm.core.autocast import autocast_enabled
from fastlm.core.tracing import needs_custom_op
from fastlm.models.cache import KVCache
from fastlm.ops.decoder_layer import Layer, is_selected
from fastlm.ops.decoder_layer.cpu import Tables, decode


class Steps(NamedTuple):
    """The layers of a model as compiled code takes them, and what must not have changed since.

    The entry of each of `dicts` at the key is the value; None: there is no such entry. Those of `empty` are empty.
    `forwards` are the methods of the modules' classes.
    """

    layers: list[Layer]
    numbers: list[int]  # of the layers in the cache
    kinds: list[Layer]  # one of each kind, for backend selection
    dicts: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    empty: tuple[dict[Any, Any], ...]
    forwards: dict[Any, Any]

    def still_hold(self) -> bool:
        return all(kind.forward is forward for kind, forward in self.forwards.items()) and kernels.unchanged(
            self.dicts, self.keys, self.values, self.empty
        )


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
    if steps.dicts[0] is not layers._modules or len(steps.layers) != len(layers) or not steps.still_hold():
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
    return (
        not needs_custom_op(x)  # first: what follows would add guards to a compiled graph
        and kernels is not None
        and x.shape[1] == 1
        and type(cache) is KVCache
        and 0 < cache.length < cache.capacity
        and not torch.is_grad_enabled()
        and x.is_cpu
        and x.is_contiguous()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not autocast_enabled(x)
        and not torch_module._has_any_global_hook()
    )


def forwards_of(*kinds: Any) -> dict[Any, Any]:
    """The forward of each class of modules. A caller may replace it, for all modules of the class."""
    return {kind: kind.forward for kind in kinds}


def is_part(module: nn.Module, parts: dict[Any, Any]) -> bool:
    """Whether a module is of one of these classes, with the forward that the class was written with."""
    return parts.get(type(module)) is type(module).forward


def describe(layers: nn.ModuleList) -> Steps | None:
    described: list[Layer] = []
    numbers: list[int] = []
    entries: list[tuple[dict[str, Any], str, Any]] = []
    empty: list[dict[Any, Any]] = []
    for name, layer in layers._modules.items():
        found = cast(Any, layer).describe()
        if found is None:
            return None
        numbers.append(found[0])
        described.append(found[1])
        entries.append((cast(Any, layers._modules), name, layer))
        for module in layers[int(name)].modules():
            attributes = vars(module)
            if module.training or "forward" in attributes or needs_custom_op(*module._parameters.values()):
                return None
            entries += [(attributes, key, value) for key, value in attributes.items() if not key.startswith("_")]
            entries.append((attributes, "forward", None))
            for mapping in cast(Any, (module._parameters, module._modules)):
                entries += [(mapping, key, value) for key, value in mapping.items()]
            empty += [module._forward_hooks, module._forward_pre_hooks]
    if not described or any(empty):
        return None
    kinds = {sizes_and_settings(layer): layer for layer in described}
    dicts, keys, values = zip(*entries, strict=True)
    forwards = forwards_of(*{type(module) for layer in layers for module in layer.modules()})
    return Steps(described, numbers, list(kinds.values()), dicts, keys, values, tuple(empty), forwards)


def sizes_and_settings(layer: Layer) -> tuple[Any, ...]:
    """Layers in which these are equal call the same operators with the same sizes."""
    return tuple([value.shape if isinstance(value, Tensor) else value for value in layer])
