"""fastlm.accelerate on transformers models. Importing this registers attn_implementation="fastlm".

A model is not rewritten: `forward` of each layer, encoder and head is put in place on the module itself (patch.py), and everything else about it stays. What
a family is made of stands in families.py, how its layers compute in blocks.py.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, __version__

from fastlm.backends import choice
from fastlm.integrations import attention as interface
from fastlm.integrations import blocks, loss, packing, views
from fastlm.integrations.families import FAMILIES, HEADS, Family, Head
from fastlm.integrations.patch import Patch, detach, patch_of, put, touched
from fastlm.integrations.report import Entry, Report

M = TypeVar("M", bound=nn.Module)
ROWS = 512  # for which a report says who serves

interface.register()


def accelerate(
    model: M,
    *,
    attention: bool = True,
    layernorm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    strict: bool = True,
) -> M:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            "model: expected one that is not compiled yet (accelerate, then torch.compile), got the result of torch.compile"
        )
    restore(model)
    options = {"attention": attention, "layernorm": layernorm, "mlp": mlp, "loss": loss}
    for _, module, family in layers(model):
        if not foreign(module):
            learn(module, family)
            blocks.put_layer(module, family, options)
    for _, module, family in encoders(model):
        if attention and not foreign(module):
            put(module, packing.encoder, family, options)
    for module in model.modules():
        if loss and (about := head_of(module)) is not None and not foreign(module):
            hold_loss(module, about, options)
        if attention and isinstance(module, PreTrainedModel) and uses_interface(module):
            look_through_views(module)
    if strict and not (found := report(model)).replaced:
        why = (
            "; ".join(f"{entry.module}: {entry.reason}" for entry in found.left_alone[:5])
            or "no layer of a known family in it"
        )
        raise ValueError(
            f"model: expected layers of {', '.join(sorted({f.block for f in FAMILIES.values()}))} to replace, got {type(model).__name__} ({why})"
        )
    return model


def restore(model: M) -> M:
    wrapped = [name or "the model" for name, module in model.named_modules() if buried(module)]
    if wrapped:
        raise RuntimeError(
            f"model: expected forwards as accelerate left them, got one wrapped by something else at {', '.join(wrapped[:5])}; undo that first"
        )
    for module in model.modules():
        if patch_of(module) is not None:
            detach(module)
        if views.is_view(config := module.__dict__.get("config")):
            module.__dict__["config"] = views.original(config)
    return model


def buried(module: nn.Module) -> bool:
    """Whether our forward is inside someone else's."""
    forward = module.__dict__.get("forward")
    return (
        forward is not None
        and type(forward) is not Patch
        and any(type(x) is Patch for x in (module.__dict__.get("_old_forward"), inspect.unwrap(forward)))
    )


# 1. Finding


def family_of(module: nn.Module, role: str) -> Family | None:
    """The family whose layer ("block") or "encoder" a module is: of that class or one that inherits its forward."""
    forward = inspect.unwrap(type(module).forward)
    family = FAMILIES.get(getattr(forward, "__module__", ""))
    if family is None or getattr(family, role) is None:
        return None
    named = any(
        kind.__name__ == getattr(family, role) and kind.__module__ == forward.__module__
        for kind in type(module).__mro__
    )
    return family if named else None


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    for name, module in model.named_modules():
        if (family := family_of(module, "block")) is not None:
            yield name, module, family


def encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    for name, module in model.named_modules():
        if (family := family_of(module, "encoder")) is not None:
            yield name, module, family


def head_of(module: nn.Module) -> Head | None:
    """What the table says of a head; None if it is none of those."""
    forward = inspect.unwrap(type(module).forward)
    if getattr(forward, "__module__", "") not in FAMILIES:
        return None
    return next(
        (
            HEADS[kind.__name__]
            for kind in type(module).__mro__
            if kind.__name__ in HEADS and kind.__module__ == forward.__module__
        ),
        None,
    )


def foreign(module: Any) -> bool:
    """Whether a module has a forward that is neither its class's nor ours: someone else's, to be left alone."""
    return touched(module) == "has a forward of its own"


def learn(layer: nn.Module, family: Family) -> None:
    """Remembers the classes of a layer's containers, if their forward is the one of transformers that the fused forward repeats."""
    home = inspect.unwrap(type(layer).forward).__module__
    for path in {
        family.attention,
        family.out[0],
        family.up[0],
        family.down[0],
        *((family.around,) if family.around else ()),
    }:
        kind = type(blocks.descend(layer, path))
        blocks.parameters(kind)
        if getattr(inspect.unwrap(kind.forward), "__module__", "") == home:
            blocks.known.add(kind)


# 2. Putting in place


def hold_loss(head: Any, about: Head, options: dict) -> None:
    put(head, loss.head, about, options)
    loss.hold(head, options)


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether layers of a known family take their attention and their masks through transformers' interface, and this model makes the masks."""
    if not type(model)._supports_attention_backend or views.is_view(model.config):
        return False
    found = [module for module in model.modules() if module is not model and isinstance(module, PreTrainedModel)]
    return not found and any(True for _ in layers(model))


def look_through_views(model: PreTrainedModel) -> None:
    config = model.config
    seen = views.view(config, config._attn_implementation)
    for module in model.modules():
        if module.__dict__.get("config") is config:
            module.__dict__["config"] = seen


# 3. Reporting


def report(model: nn.Module) -> Report:
    entries: list[Entry] = []
    for name, module in model.named_modules():
        name = name or "(model)"
        if (family := family_of(module, "block")) is not None:
            entries += layer_entries(name, module, family)
        elif (family := family_of(module, "encoder")) is not None and (patch := patch_of(module)) is not None:
            why = packing.not_packable(patch, torch.empty(()), {})
            entries.append(
                entry(
                    f"{name}, padding left out",
                    "attention_varlen",
                    next(module.parameters()),
                    why,
                    **({} if why else heads_inside(module)),
                )
            )
        elif head_of(module) is not None:
            entries.append(head_entry(name, module))
    return Report(tuple(entries))


def heads_inside(encoder: Any) -> dict[str, int]:
    """The sizes that its layers call attention with."""
    layer = next(encoder._modules["layer"].children())
    family = family_of(layer, "block")
    assert family is not None  # a layer that is not known is a reason to keep the padding
    return heads_of(blocks.Parts(layer, family), family)


def heads_of(parts: blocks.Parts, family: Family) -> dict[str, int]:
    heads = getattr(parts.attention, family.heads)
    return {"heads": heads, "head_dim": parts.norm1.weight.shape[-1] // heads}


def entry(name: str, operator: str, parameter: torch.Tensor, why: str, **features: Any) -> Entry:
    if why:
        return Entry(name, operator, "", why)
    sizes = {
        "batch": 1,
        "query_len": ROWS,
        "key_len": ROWS,
        "rows": ROWS,
        "conv1d": False,
        "masked": True,
        "dropout": False,
        "return_lse": False,
        "mask_gradient": False,
    }
    asked = {feature: {**sizes, **features}.get(feature, parameter.shape[-1]) for feature in choice.FEATURES[operator]}
    return Entry(
        name, operator, choice.decide(operator, parameter.device, parameter.dtype, choice.requested(None), asked)[0], ""
    )


def layer_entries(name: str, layer: Any, family: Family) -> list[Entry]:
    patch = patch_of(layer)
    if patch is None:
        return [Entry(name, "layer", "", "has a forward of its own" if foreign(layer) else "is not accelerated")]
    parts, entries = blocks.Parts(layer, family), []
    around, why = parts.around_why, parts.why
    width = parts.norm1.weight.shape[-1]

    def off(option: str) -> str:
        return "" if patch.options[option] else f"accelerate(…, {option}=False)"

    conv1d = blocks.LAYOUTS.get(type(parts.up)) == "conv1d"

    def add(where: str, operator: str, reason: str, **features: Any) -> None:
        entries.append(entry(f"{name}.{where}", operator, parts.norm1.weight, reason, conv1d=conv1d, **features))

    inside = off("attention") or around or parts.attention_why
    add(family.attention, "attention", inside, **heads_of(parts, family))
    for path, projection in zip(family.projections, parts.projections, strict=True):
        add(f"{family.attention}.{path}", "linear", inside or why[projection])
    add(f"{family.out[0]}.{family.out[1]}", "linear", off("attention") or around or parts.owner_why or why[parts.out])
    for path, norm, owner, hidden in (
        (family.norm1, parts.norm1, family.out[0], around or parts.owner_why),
        (family.norm2, parts.norm2, family.down[0], parts.last_why),
    ):
        hidden = hidden if path.startswith(f"{owner}.") else ""  # a container that is called whole hides what it holds
        add(path, "layernorm_residual", off("layernorm") or hidden or why[norm])
    hidden = off("mlp") or parts.first_why or parts.last_why
    reasons = {
        f"{family.up[0]}.{family.up[1]}": why[parts.up],
        f"{family.down[0]}.{family.down[1]}": why[parts.down],
        f"{family.up[0]}.{family.up[2]}": "" if parts.gelu is not None else "is not a plain GELU",
    }
    inside = "; ".join(f"{path} {reason}" for path, reason in reasons.items() if reason)
    where = family.up[0] if parts.first is parts.last else f"{family.up[0]} and .{family.down[0]}"
    add(where, "gelu_mlp", hidden or inside, hidden_width=4 * width)
    return entries


def head_entry(name: str, head: Any) -> Entry:
    patch = patch_of(head)
    if patch is None:
        return Entry(
            name,
            "linear_cross_entropy",
            "",
            "has a forward of its own" if foreign(head) else "accelerate(…, loss=False)",
        )
    decoder = head.get_output_embeddings()
    why = blocks.not_plain(decoder) if decoder is not None else "is missing"
    own_loss = loss.own_loss(patch)
    return entry(
        name,
        "linear_cross_entropy",
        next(head.parameters()),
        own_loss or (why and f"its output projection {why}"),
        vocab=32000,
    )


# 4. transformers 4, whose other families choose a class by the implementation's name


class Refusal:
    """Stands where transformers 4 looks for an attention class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f'attn_implementation: expected "eager" or "sdpa", got {interface.NAME!r}: this model does not compute attention through the interface in this '
            "version of transformers. Load it as usual, then call fastlm.accelerate(model)"
        )


def refuse_by_name() -> None:
    for home in FAMILIES:
        for name, table in vars(importlib.import_module(home)).items():
            if name.endswith("ATTENTION_CLASSES") and isinstance(table, dict):
                table.setdefault(interface.NAME, Refusal)


if int(__version__.partition(".")[0]) < 5:
    refuse_by_name()
