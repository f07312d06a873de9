"""fastlm.report on transformers models."""

from typing import Any

import torch
from torch import nn

from fastlm.backends import registry, requested
from fastlm.backends.selection import decide
from fastlm.integrations.encoders import EncoderPatch
from fastlm.integrations.families import Family, parent
from fastlm.integrations.find import encoder_family, head_of, layer_family, norm_family
from fastlm.integrations.layers import LayerPatch
from fastlm.integrations.loss import HeadPatch
from fastlm.integrations.norms import NormPatch
from fastlm.integrations.parts import MLPS, NORMS, Parts
from fastlm.integrations.patch import has_foreign_forward, patch_of
from fastlm.integrations.report import Entry, Report

# The call for which a report names the backend.
CALL = {
    "batch": 1,
    "query_len": 512,
    "key_len": 512,
    "rows": 512,
    "conv1d": False,
    "masked": True,
}
VOCAB = 32000


def report(model: nn.Module) -> Report:
    entries: list[Entry] = []
    inside_layers: set[nn.Module] = set()
    for name, module in model.named_modules():
        name = name or "(model)"
        if module in inside_layers:
            continue
        if (family := layer_family(module)) is not None:
            entries += layer_entries(name, module, family)
            inside_layers.update(module.modules())
        elif encoder_family(module) is not None:
            if isinstance(patch := patch_of(module), EncoderPatch):
                entries.append(encoder_entry(name, patch))
        elif head_of(module) is not None:
            entries.append(head_entry(name, module))
        elif (family := norm_family(module)) is not None:
            entries.append(norm_entry(name, module, family))
    return Report(tuple(entries))


def entry(name: str, operator: str, parameter: torch.Tensor, reason: str, **sizes: Any) -> Entry:
    backend = "" if reason else selected_backend(operator, parameter, sizes)
    return Entry(name, operator, backend, reason)


def selected_backend(name: str, parameter: torch.Tensor, given: dict[str, Any]) -> str:
    """Sizes that the caller does not give are those of CALL, for flags False, or the parameter's width."""
    operator = registry.operators()[name]
    defaults = {size: False if size in operator.flag_names else parameter.shape[-1] for size in operator.size_names}
    known = defaults | CALL | given
    sizes = operator.sizes(**{size: known[size] for size in operator.size_names})
    return decide(operator, parameter.device, parameter.dtype, requested(None), sizes)[0]


def head_sizes(parts: Parts) -> dict[str, int]:
    own = parts.attention_dict
    if parts.head_dim is not None:
        return {"heads": own["config"].num_attention_heads, "head_dim": own[parts.head_dim]}
    heads = own[parts.num_heads]
    return {"heads": heads, "head_dim": parts.mlp_norm.weight.shape[-1] // heads}


def encoder_entry(name: str, patch: EncoderPatch) -> Entry:
    reason, sizes = patch.padding_reason(torch.empty(()), {}), {}
    if not reason:
        layer = next(iter(patch.layers().values()))
        sizes = head_sizes(patch_of(layer).current_parts())
    parameter = next(patch.module.parameters())
    return entry(f"{name}, without padding", "attention", parameter, reason, packed=True, **sizes)


def layer_entries(name: str, layer: Any, family: Family) -> list[Entry]:
    patch = patch_of(layer)
    if not isinstance(patch, LayerPatch):
        return [
            Entry(name, "layer", "", "has a forward of its own" if has_foreign_forward(layer) else "is not accelerated")
        ]
    parts, options, reasons = patch.current_parts(), patch.options, patch.current_parts().reasons
    entries: list[Entry] = []

    def excluded(option: str) -> str:
        return "" if options[option] else f"accelerate(…, {option}=False)"

    def add(path: str, operator: str, reason: str, **features: Any) -> None:
        parameter = parts.mlp_norm.weight
        conv1d = family.layout == "conv1d"
        entries.append(entry(f"{name}.{path}", operator, parameter, reason, conv1d=conv1d, **features))

    attention = excluded("attention") or parts.block_reason or parts.attention_reason
    add(family.attention, "attention", attention, **head_sizes(parts))
    if parts.is_rotary:
        add(family.attention, "rotary", attention, tokens=CALL["query_len"], **head_sizes(parts))
    for path, projection in zip(family.qkv, parts.qkv, strict=True):
        add(path, "linear", attention or reasons[projection])
    owner = parts.block_reason or parts.out_owner_reason
    add(family.out, "linear", excluded("attention") or owner or reasons[parts.out])
    # A container that is called whole also calls a norm inside it.
    norms: tuple[tuple[str | None, Any, str, str], ...] = (
        (None if parts.no_attention_norm else family.attention_norm, parts.attention_norm, parent(family.out), owner),
        (family.query_norm, parts.query_norm, family.attention, attention),
        (family.key_norm, parts.key_norm, family.attention, attention),
        (family.attention_output_norm, parts.attention_output_norm, parent(family.out), owner),
        (family.mlp_norm, parts.mlp_norm, parent(family.down), parts.down_owner_reason),
        (family.mlp_output_norm, parts.mlp_output_norm, parent(family.down), parts.down_owner_reason),
    )
    for place, norm, container, reason in norms:
        if place is not None:
            inside = reason if place.startswith(f"{container}.") else ""
            add(place, NORMS[family.norm].operator, excluded("layernorm") or inside or reasons[norm])
    mlp = excluded("mlp") or parts.up_owner_reason or parts.down_owner_reason or mlp_reason(parts, family)
    up, down = parent(family.up), parent(family.down)
    width = parts.mlp_norm.weight.shape[-1]
    add(up if up == down else f"{up} and .{down}", MLPS[family.mlp].operator, mlp, hidden_width=4 * width)
    return entries


def mlp_reason(parts: Parts, family: Family) -> str:
    modules = {family.gate: parts.gate, family.up: parts.up, family.down: parts.down}
    reasons = {path: parts.reasons[module] for path, module in modules.items() if module is not None}
    if parts.activation_name is None:
        reasons[family.activation] = f"is not {MLPS[family.mlp].expected}"
    return "; ".join(f"{path} {reason}" for path, reason in reasons.items() if reason)


def head_entry(name: str, head: Any) -> Entry:
    patch, operator = patch_of(head), "linear_cross_entropy"
    if not isinstance(patch, HeadPatch):
        reason = "has a forward of its own" if has_foreign_forward(head) else "accelerate(…, loss=False)"
        return Entry(name, operator, "", reason)
    reason = patch.loss_reason() or patch.projection_reason()
    return entry(name, operator, next(head.parameters()), reason, vocab=VOCAB)


def norm_entry(name: str, norm: Any, family: Family) -> Entry:
    patch, operator = patch_of(norm), NORMS[family.norm].operator
    if not isinstance(patch, NormPatch):
        reason = "has a forward of its own" if has_foreign_forward(norm) else "accelerate(…, layernorm=False)"
        return Entry(name, operator, "", reason)
    return entry(name, operator, norm.weight, patch.reason())
