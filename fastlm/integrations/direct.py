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
TABLES = ("word_embeddings", "token_type_embeddings", "position_embeddings")
function_modes = torch._C._len_torch_function_stack


def last_hidden_states(model: Any, features: dict[str, Tensor], real: int) -> Tensor | None:
    """The last hidden states of the real tokens in evaluation mode, with the bits of a call of the model.

    Args:
        features: the arguments of the call: (batch, tokens) each, with a mask of 0 at padding, which is at the end.
        real: the number of real tokens.

    Returns:
        (real tokens, width); None: the model must be called.
    """
    found, ids = encoder_of(model), features["input_ids"]
    if found is None or captured_outputs() or not may_skip_modules(ids) or function_modes():
        return None
    patch, family, base = found
    layers = patch.description.layers(patch.module._modules.get(family.layers))
    if layers is None or not (around := surroundings(patch, model, family, base)).are_plain:
        return None
    modules, (first, *others) = model._modules, base.embeddings
    arguments = {name: features[name] for name in base.arguments if name in features}
    if around.sum_tables and len(arguments) == len(base.arguments):  # the module has defaults for the others
        x: Any = sum_of_tables(modules[first], **arguments)
    else:
        x = modules[first](**arguments)
    for name in others:
        if (module := modules.get(name)) is not None:
            x = module(x)
    # What was computed until here has no effect, so the model may be called all the same.
    if type(x) is not Tensor or x.dim() != 3 or not may_skip_modules(x):
        return None
    where = None
    if real < ids.numel():
        where = packed(features["attention_mask"] != 0, real)
        x = Gather.apply(x.flatten(0, 1), where.index)[None]
    x = encode_layers(layers, x, where)
    return None if x is None else x.flatten(0, 1)


def is_unchanged(model: Any) -> bool:
    """Whether a model is as it was when `last_hidden_states` computed in its place, in evaluation mode."""
    found = encoder_of(model)
    if found is None:
        return False
    patch, family, _ = found
    known: Surroundings | None = patch.surroundings
    layers = patch.module._modules.get(family.layers)
    return known is not None and known.are_plain and known.holds(model) and patch.description.holds(layers)


def encoder_of(model: Any) -> tuple[EncoderPatch, Family, Base] | None:
    family = FAMILIES.get(type(model).__module__)
    if family is None or family.base is None:
        return None
    encoder = model._modules.get(family.base.encoder)
    patch = None if encoder is None else patch_of(encoder)
    return (patch, family, family.base) if isinstance(patch, EncoderPatch) else None


class Surroundings(NamedTuple):
    """What is around the layers of a model, and what that is while it is unchanged."""

    model: nn.Module
    unchanged: Unchanged
    are_plain: bool  # the model's forward may be skipped
    sum_tables: bool  # `sum_of_tables` may run in place of the first of the embeddings

    def holds(self, model: nn.Module) -> bool:
        return self.model is model and self.unchanged.still_holds()


def surroundings(patch: EncoderPatch, model: Any, family: Family, base: Base) -> Surroundings:
    known: Surroundings | None = patch.surroundings
    if known is None or not known.holds(model):
        known = patch.surroundings = describe(patch, model, family, base)
    return known


def describe(patch: EncoderPatch, model: Any, family: Family, base: Base) -> Surroundings:
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
    sum_tables = plain and base.sums_tables and are_tables(model._modules[base.embeddings[0]])
    return Surroundings(model, unchanged, plain, sum_tables)


def are_tables(embeddings: Any) -> bool:
    """Whether the parts of embeddings are those that `sum_of_tables` reads."""
    parts = embeddings._modules
    return (
        type(parts.get("LayerNorm")) is nn.LayerNorm
        and type(parts.get("dropout")) is nn.Dropout
        and all(type(parts[name]) is nn.Embedding and parts[name].max_norm is None for name in TABLES if name in parts)
        and embeddings._buffers.get("position_ids") is not None
        and getattr(embeddings, "position_embedding_type", "absolute") == "absolute"  # transformers 4
    )


def sum_of_tables(embeddings: Any, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """The result and bits of embeddings, without calling the modules in them."""
    parts, positions = embeddings._modules, embeddings._buffers["position_ids"][:, : input_ids.shape[1]]
    indices = (input_ids, token_type_ids, positions)
    rows = [
        torch.embedding(parts[name]._parameters["weight"], index)
        for name, index in zip(TABLES, indices, strict=True)
        if index is not None
    ]
    x = sum(rows[1:], rows[0])
    norm, affine = parts["LayerNorm"], parts["LayerNorm"]._parameters
    return torch.layer_norm(x, norm.normalized_shape, affine["weight"], affine["bias"], norm.eps)


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
