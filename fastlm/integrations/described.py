"""Descriptions of encoder layers for the compiled function that runs all of them (fastlm.models.encode_layers)."""

from typing import Any

from fastlm.integrations.layers import LayerPatch, head_shape, scale_of
from fastlm.integrations.patch import patch_of
from fastlm.ops.encoder_layer import Layer


def describe(layer: Any) -> Layer | None:
    """What `fused_layer` computes in a post-norm layer without positions; None if it computes anything else."""
    patch = patch_of(layer)
    if not isinstance(patch, LayerPatch) or not patch.all_options or not is_describable(patch):
        return None
    parts = patch.current_parts()
    if not parts.all_replaceable or not parts.is_current():
        return None
    own, (dropout, key_of_p) = parts.attention_dict, parts.attention_dropout
    dropouts = parts.out_dropout_dict, parts.mlp_dropout_dict
    first, second = parts.middle_norm_dict, parts.mlp_norm_dict
    if (
        own.get(parts.causal)
        or (own["training"] and dropout[key_of_p])
        or any(each["training"] and each["p"] for each in dropouts)
        or first["eps"] != second["eps"]
    ):
        return None
    num_heads, _ = head_shape(parts)
    qkv = [(each["weight"], each["bias"]) for each in parts.qkv_parameters]
    if type(num_heads) is not int or num_heads < 1:
        return None
    head_dim = qkv[0][0].shape[0] // num_heads // (3 if len(qkv) == 1 else 1)
    (norm, next_norm), scale = (first["_parameters"], second["_parameters"]), own.get("scaling")
    return Layer.of(
        qkv,
        attention_norm=norm["weight"],
        attention_norm_bias=norm["bias"],
        mlp_norm=next_norm["weight"],
        mlp_norm_bias=next_norm["bias"],
        output=parts.out_parameters["weight"],
        output_bias=parts.out_parameters["bias"],
        up=parts.up_parameters["weight"],
        up_bias=parts.up_parameters["bias"],
        down=parts.down_parameters["weight"],
        down_bias=parts.down_parameters["bias"],
        eps=first["eps"],
        activation="gelu" if parts.activation_name == "none" else "gelu_tanh",
        num_heads=num_heads,
        head_dim=head_dim,
        scale=scale_of(parts.attention, head_dim) if scale is None else scale,
    )


def is_describable(patch: LayerPatch) -> bool:
    """Whether the family is BERT or like it."""
    family = patch.family
    kinds = family.norm, family.norm_place, family.mlp, family.positions, family.layout
    return kinds == ("layer", "post", "plain", "learned", "linear") and family.num_heads is not None
