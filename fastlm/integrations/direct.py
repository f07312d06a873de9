"""Hidden states of an encoder of transformers without its forward: embeddings, then all layers in one compiled call.

The forward around them computes what a caller of this function does not read: masks, a pooler, objects for outputs. It
is skipped if the model, its encoder and the other modules of the forward are as transformers wrote them, without hooks.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.integrations.capture import captured_outputs
from fastlm.integrations.encoders import OUTPUTS, EncoderPatch, own_forwards
from fastlm.integrations.families import FAMILIES, Base, Family
from fastlm.integrations.patch import patch_of
from fastlm.models.compiled import CALL, METHODS, Unchanged, may_skip_modules
from fastlm.models.encode_layers import encode_layers
from fastlm.models.packing import Gather, packed

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COMPILED = "_compiled_call_impl"  # by module.compile()
LIBRARIES = ("torch.", "transformers.")
function_modes = torch._C._len_torch_function_stack


def last_hidden_states(model: Any, features: dict[str, Tensor], real: int) -> Tensor | None:
    """The last hidden states of the real tokens, with the bits of a call of the model.

    Args:
        features: the arguments of the call: (batch, tokens) each, with a mask of 0 at padding, which is at the end.
        real: the number of real tokens.

    Returns:
        (real tokens, width); None: the model must be called.
    """
    family = FAMILIES.get(type(model).__module__)
    if family is None or family.base is None:
        return None
    base, ids = family.base, features["input_ids"]
    encoder: Any = model._modules.get(base.encoder)
    patch = None if encoder is None else patch_of(encoder)
    if not isinstance(patch, EncoderPatch) or captured_outputs() or not may_skip_modules(ids) or function_modes():
        return None
    layers = patch.description.layers(encoder._modules.get(family.layers))
    if layers is None or not are_plain(patch, model, family, base):
        return None
    x = model._modules[base.embeddings[0]](**{name: features[name] for name in base.arguments if name in features})
    for name in base.embeddings[1:]:
        if (module := model._modules.get(name)) is not None:
            x = module(x)
    # What was computed until here has no effect, so the model may be called all the same.
    if type(x) is not Tensor or x.dim() != 3 or not may_skip_modules(x):
        return None
    found = None
    if real < ids.numel():
        found = packed(features["attention_mask"] != 0, real)
        x = Gather.apply(x.flatten(0, 1), found.index)[None]
    x = encode_layers(layers, x, found)
    return None if x is None else x.flatten(0, 1)


class Surroundings(NamedTuple):
    """What is around the layers of a model, and whether its forward may be skipped while that is unchanged."""

    model: nn.Module
    unchanged: Unchanged
    are_plain: bool


def are_plain(patch: EncoderPatch, model: Any, family: Family, base: Base) -> bool:
    """Whether the forward around the layers calls only modules that are as they were written."""
    known: Surroundings | None = patch.surroundings
    if known is None or known.model is not model or not known.unchanged.still_holds():
        known = patch.surroundings = surroundings(patch, model, family, base)
    return known.are_plain


def surroundings(patch: EncoderPatch, model: Any, family: Family, base: Base) -> Surroundings:
    encoder, config, written = patch.module, model.config, sys.modules[family.module]
    modules = [model, encoder]
    for name in (*base.embeddings, *base.unread):
        if (module := model._modules.get(name)) is not None:
            modules += module.modules()
    # What may not change is read before it is judged, so that no change in between goes unnoticed.
    unchanged = Unchanged.watch(
        modules,
        [
            *((vars(config), key, value) for key, value in vars(config).items()),
            *((vars(module), COMPILED, vars(module).get(COMPILED)) for module in modules),
        ],
        sized=[vars(config), model._modules, encoder._modules],
        registries=[vars(module)[name] for module in modules for name in HOOKS[2:]],
    )
    plain = (
        getattr(written, base.name, None) is type(model)
        and getattr(written, str(family.encoder), None) is type(encoder)
        and own_forwards.get(type(encoder)) is type(encoder).forward
        and base.embeddings[0] in model._modules
        and all(is_called_by_class(module) for module in modules)
        and not any(getattr(config, name, None) for name in ("is_decoder", "is_causal", *OUTPUTS))
    )
    return Surroundings(model, unchanged, plain)


def is_called_by_class(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, or its patch, and nothing else."""
    kind, attributes = type(module), vars(module)
    return (
        kind.__call__ is CALL
        and attributes.get(COMPILED) is None
        and not any(attributes[name] for name in HOOKS)
        and (patch_of(module) is not None or not any(name in attributes for name in METHODS))
        and is_as_written(kind)
    )


def is_as_written(kind: Any) -> bool:
    """Whether the forward of a class is the one that PyTorch or transformers defines there."""
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    function, library = kind.forward, f"{owner.__module__.partition('.')[0]}."
    if library not in LIBRARIES or function.__qualname__ != f"{owner.__qualname__}.forward":
        return False
    homes: tuple[str, ...] = (library,)
    while function is not None:  # and each that it wraps
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith(homes):
            return False
        function, homes = getattr(function, "__wrapped__", None), LIBRARIES
    return True
