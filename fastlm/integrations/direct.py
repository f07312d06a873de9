"""Hidden states of an encoder of transformers without its forward: embeddings, then all layers in one compiled call.

The forward around them computes what a caller of this function does not read: masks, a pooler, objects for outputs. It
is skipped only if nothing in it can be observed: the model's modules, methods and functions are as transformers wrote
them, and no hook sees their calls.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fastlm.integrations.capture import captured_outputs
from fastlm.integrations.encoders import OUTPUTS, EncoderPatch, own_forwards
from fastlm.integrations.families import FAMILIES, Base, Family
from fastlm.integrations.patch import REPLICATE, patch_of
from fastlm.models.compiled import CALL, METHODS, Unchanged, may_skip_modules
from fastlm.models.encode_layers import encode_layers
from fastlm.models.packing import Gather, packed

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TRANSFORMERS = ("transformers.",)
LIBRARIES = ("torch.", *TRANSFORMERS)
CALL_IMPL = nn.Module._call_impl
FUNCTION_MODES = torch._C._len_torch_function_stack


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
    if not isinstance(patch, EncoderPatch) or captured_outputs() or not may_skip_modules(ids) or FUNCTION_MODES():
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
    implementation: Any  # of attention, by name
    mask_function: Any
    are_plain: bool


def are_plain(patch: EncoderPatch, model: Any, family: Family, base: Base) -> bool:
    """Whether nothing that the forward calls around the layers can be observed."""
    known: Surroundings | None = patch.surroundings
    if (
        known is None
        or known.model is not model
        or not known.unchanged.still_holds()
        or ALL_MASK_ATTENTION_FUNCTIONS.get(known.implementation) is not known.mask_function
    ):
        known = patch.surroundings = surroundings(patch, model, family, base)
    return known.are_plain


def surroundings(patch: EncoderPatch, model: Any, family: Family, base: Base) -> Surroundings:
    encoder, config = patch.module, model.config
    outer = [model, encoder]
    for name in (*base.embeddings, *base.unread):
        if (module := model._modules.get(name)) is not None:
            outer += module.modules()
    kind = type(model)
    methods, names = read_by(kind) if is_as_written(kind) else ({}, [])
    # What may not change is read before it is judged, so that no change in between goes unnoticed.
    unchanged = Unchanged.watch(
        outer,
        [
            *((vars(config), key, value) for key, value in vars(config).items()),
            *((vars(module), key, vars(module)[key]) for module in outer for key in [*vars(module)] if key[0] == "_"),
            *names,
        ],
        methods=[(nn.Module, "_call_impl", CALL_IMPL), *((kind, name, method) for name, method in methods.items())],
        sized=[vars(config), *map(vars, outer), model._modules, encoder._modules],
        registries=[vars(module)[name] for module in outer for name in HOOKS[2:]],
    )
    implementation = config._attn_implementation
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    own = {encoder: ("forward", REPLICATE)}
    paths = *base.embeddings, *base.unread, base.encoder
    plain = (
        bool(methods)
        and nn.Module._call_impl is CALL_IMPL
        and getattr(sys.modules[family.module], base.name, None) is kind
        and getattr(sys.modules[family.module], str(family.encoder), None) is type(encoder)
        and own_forwards.get(type(encoder)) is type(encoder).forward
        and [*encoder._modules] == [family.layers]
        and base.embeddings[0] in model._modules
        and all(is_called_by_class(module, own.get(module, ())) for module in outer)
        # The forward finds its modules where the names in the family's description say.
        and not any(name in vars(model) or hasattr(kind, name) for name in paths)
        and all(is_of(function, TRANSFORMERS) for function in methods.values())
        and all(not callable(value) or is_of(value, TRANSFORMERS) for _, _, value in names)
        and is_of(mask_function, (*TRANSFORMERS, "fastlm."))
        and is_of(type(config), TRANSFORMERS)
        and not any(getattr(config, name, None) for name in ("is_decoder", "is_causal", *OUTPUTS))
        and not any(value for key, value in vars(config).items() if key.lstrip("_").startswith("output_"))
    )
    return Surroundings(model, unchanged, implementation, mask_function, plain)


def is_called_by_class(module: nn.Module, own: tuple[str, ...]) -> bool:
    """Whether a call of the module runs the forward of its class in a library, and nothing else.

    own: names of methods that stand in the module's `__dict__`.
    """
    kind, attributes = type(module), vars(module)
    return (
        kind.__module__.startswith(LIBRARIES)
        and kind.__call__ is CALL
        and module._compiled_call_impl is None
        and not any(attributes[name] for name in HOOKS)
        and not any(name in attributes and name not in own for name in METHODS)
        and not any(inspect.isfunction(getattr(kind, name, None)) for name in attributes if name not in own)
        and is_as_written(kind)
    )


def is_as_written(kind: Any) -> bool:
    """Whether the forward of a class is the one that its library defines there."""
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    library = f"{owner.__module__.partition('.')[0]}."
    return is_of(kind.forward, (library,)) and (kind.forward.__module__, kind.forward.__qualname__) == (
        owner.__module__,
        f"{owner.__qualname__}.forward",
    )


def is_of(value: Any, homes: tuple[str, ...]) -> bool:
    """Whether a class or function is defined in modules with these beginnings of names.

    The functions that it wraps are transformers' or PyTorch's.
    """
    if isinstance(value, type):
        return value.__module__.startswith(homes)
    while value is not None:
        if not getattr(value, "__globals__", {}).get("__name__", "").startswith(homes):
            return False
        value, homes = getattr(value, "__wrapped__", None), LIBRARIES
    return True


def read_by(kind: Any) -> tuple[dict[str, Any], list[tuple[Any, str, Any]]]:
    """The methods that the forward of a class calls, by name, and the names that they read in their Python module."""
    methods, read = {"forward": kind.forward}, []
    waiting = [kind.forward]
    for method in waiting:
        function: Any = inspect.unwrap(method)
        if not inspect.isfunction(function):
            continue
        for name in names_in(function.__code__):
            found = getattr(kind, name, None)
            # Names of methods of nn.Module, such as `to`, are those of tensors here.
            if name not in methods and inspect.isfunction(found) and found is not getattr(nn.Module, name, None):
                methods[name] = found
                waiting.append(found)
            if name in function.__globals__:
                read.append((function.__globals__, name, function.__globals__[name]))
    return methods, read


def names_in(code: Any) -> Iterator[str]:
    """Global names and attributes that a function reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from names_in(constant)
