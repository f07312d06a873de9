"""One transformer layer on fastlm's operators, for pre-norm and post-norm layers of every family of families.py.

At every call a layer checks which of its parts may be replaced. If all may be, `fused_layer` computes it. Otherwise
`layer_by_parts` calls the modules that cannot be replaced (a projection with an adapter, a container with a hook) and
computes the others by operators.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from fastlm.integrations.adapters import AdapterPatch, is_adapter
from fastlm.integrations.attention import NAME, attend
from fastlm.integrations.capture import captures_attentions, collector
from fastlm.integrations.families import Family
from fastlm.integrations.parts import (
    PLAIN_TENSORS,
    Parts,
    containers,
    dropout_dict,
    parameter_names,
    projection_reason,
)
from fastlm.integrations.patch import (
    GLOBAL_HOOKS,
    MASK_ARGUMENTS,
    Patch,
    descend,
    functorch_stack,
    is_compiling,
    observed_reason,
    patch_of,
    put,
    tracing_state,
)
from fastlm.models.packing import Packed, attention_with_bias
from fastlm.ops.attention import attention, attention_varlen
from fastlm.ops.linear import linear
from fastlm.ops.rotary import rotary

# Since 5.24 transformers checkpoints in the forward of a layer's class, which the patch replaces. Before, it did so in
# `__call__`, around the patch.
CHECKPOINTS_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
CACHE_CLASSES = (Cache, EncoderDecoderCache)
# Gemma 3 of transformers 4 passes both to every layer.
GEMMA3_TABLES = ("position_embeddings_global", "position_embeddings_local")
WINDOW_MASK = "sliding_window_mask"
# An argument that models which make their own masks pass on to their layers.
PACKED_ARGUMENT = "cu_seqlens"


class LayerPatch(Patch):
    """The forward of a layer.

    Attributes:
        family: the description of the layer.
        returns: the tuple that the layer returns; None for a tensor.
        input_name, cache_name, mask_name: what the layer calls these arguments.
        rare: arguments that are seldom given and may mean that the layer cannot be replaced.
        all_options: whether no part of the layer is excluded.
        parts: the layer's modules, None until they are needed.
    """

    def __init__(self, layer: Any, family: Family, options: dict[str, bool]) -> None:
        super().__init__(layer, options)
        self.family, self.returns = family, family.returned()
        self.input_name = self.names[0]
        self.cache_name = next((name for name in self.names if name in CACHE_ARGUMENTS), CACHE_ARGUMENTS[0])
        self.mask_name = next(name for name in self.names if name in MASK_ARGUMENTS)
        self.other_caches = frozenset(CACHE_ARGUMENTS) - {self.cache_name}
        self.rare = self.other_caches | {"head_mask", "cu_seq_lens_q"}
        self.takes_tokens = family.encoder_input == "tokens"
        # Of transformers 4: the mask of layers with a window, beside the mask of the others.
        self.window_mask_name = WINDOW_MASK if WINDOW_MASK in self.names else None
        self.is_rotary = family.positions == "rotary"
        self.all_options = options["attention"] and options["layernorm"] and options["mlp"]
        self.new_parts()

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds the parts of its own layer."""
        return {**self.__dict__, "parts": None}

    def current_parts(self) -> Parts:
        """Between calls of the layer."""
        parts = self.parts
        return parts if parts is not None and parts.is_current(weights=False) else self.new_parts()

    def new_parts(self) -> Parts:
        parts = Parts(self.module, self.family)
        if not is_compiling():
            self.parts: Parts | None = parts
            if self.options["attention"]:
                patch_base_layers((*parts.qkv, parts.out), parts, self.options)
            if self.options["mlp"]:
                patch_base_layers((parts.gate, parts.up, parts.down), parts, self.options)
        return parts

    def __call__(self, *args: Any, _checkpoint: bool = CHECKPOINTS_IN_FORWARD, **kwargs: Any) -> Any:
        names, arguments = self.names, dict(kwargs)
        if len(args) > len(names):
            self.bind(args, kwargs)  # raises
        for name, argument in zip(names, args):  # noqa: B905  # there may be fewer arguments than names
            arguments[name] = argument
        if self.unsupported_reason(arguments):
            return self.original(*args, **kwargs)
        parts = self.parts
        if parts is None or not parts.is_current():
            parts = self.new_parts()
        own = parts.layer_dict
        if _checkpoint and own.get("gradient_checkpointing") and own["training"] and torch.is_grad_enabled():
            without_cache = {**dict.fromkeys(CACHE_ARGUMENTS), "use_cache": False}
            kwargs = {name: without_cache.get(name, value) for name, value in kwargs.items()}
            function = functools.partial(self, _checkpoint=False, **kwargs)
            return self.module._gradient_checkpointing_func(function, *args)
        x, mask = arguments[self.input_name], arguments.get(self.mask_name)
        if self.takes_tokens:
            packed = arguments.get(PACKED_ARGUMENT)
            if type(packed) is Packed:
                mask = packed
            elif self.window_mask_name is not None and window_of(parts) is not None:
                mask = arguments.get(self.window_mask_name)
        return_weights = bool(arguments.get("output_attentions"))
        if (
            parts.all_replaceable
            and self.all_options
            and not return_weights
            and not (collector is not None and collector.get())
        ):
            y = fused_layer(self, parts, x, mask, arguments)
            return y if self.returns is None else (y,)
        result = layer_by_parts(self, parts, x, mask, arguments, return_weights)
        if result is None:
            return self.original(**arguments)
        if self.returns is None:
            return result[0]
        if not return_weights:
            return (result[0],)
        outputs = {"hidden_states": result[0], "attentions": result[1]}
        return tuple(outputs[name] for name in self.returns)

    def unsupported_reason(self, arguments: dict) -> str:
        """Why the class's own forward computes a call."""
        if arguments.get("encoder_hidden_states") is not None:
            return "encoder_hidden_states is given"
        if not self.rare.isdisjoint(arguments):
            for name in ("head_mask", "cu_seq_lens_q"):
                if arguments.get(name) is not None:
                    return f"{name} is given"
            if not self.other_caches.isdisjoint(arguments):
                return f"an argument of the name {', '.join(self.other_caches & arguments.keys())}"
        if self.is_rotary and not has_positions(self, arguments):
            return "position_embeddings are missing"
        cache = arguments.get(self.cache_name)
        if cache is not None and not isinstance(cache, CACHE_CLASSES):
            return f"a cache of type {type(cache).__name__}"
        x = arguments.get(self.input_name)
        if type(x) is Tensor and not any(GLOBAL_HOOKS) and tracing_state() is None and functorch_stack() is None:
            return ""  # as observed_reason returns, with fewer calls
        return observed_reason(x)


class BaseLayerPatch(Patch):
    """The forward of a projection inside an adapter, which is called as a module: the large product is fastlm's."""

    def __init__(self, projection: Any, layout: str, options: dict[str, bool]) -> None:
        super().__init__(projection, options)
        self.layout = layout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if kwargs or len(args) != 1 or observed_reason(args[0]) or projection_reason(module, self.layout):
            return self.original(*args, **kwargs)
        return linear(args[0], module.weight, module.bias, layout=self.layout)


def patch_base_layers(projections: Any, parts: Parts, options: dict[str, bool]) -> None:
    """For PEFT, which may add and remove adapters after `accelerate`."""
    for module in projections:
        if isinstance(patch := None if module is None else patch_of(module), BaseLayerPatch):
            patch.detach()  # it is no longer inside an adapter
        base = None if module is None else module._modules.get("base_layer")
        if base is not None and "forward" not in base.__dict__ and not projection_reason(base, parts.layout):
            put(BaseLayerPatch(base, parts.layout, options))
        if is_adapter(module) and "forward" not in module.__dict__:
            put(AdapterPatch(module, parts.layout, options))


# Attention, shared by both ways to compute a layer


def scale_of(module: Any, head_dim: int) -> float:
    """The scale of an attention module of transformers 4, which has no attribute `scaling`."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def self_attention(
    patch: LayerPatch,
    parts: Parts,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    arguments: dict,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the attention module computes between its projections.

    query, key, value: (batch, tokens, heads, head_dim). Returns (batch, tokens, heads · head_dim), and the weights if
    they are asked for.
    """
    module, own = parts.attention, parts.attention_dict
    scale = own.get("scaling")
    scale = scale_of(module, query.shape[-1]) if scale is None else scale
    dropout, key_of_p = parts.attention_dropout
    dropout_p = dropout[key_of_p] if own["training"] else 0.0
    bias = arguments.get("position_bias") if parts.is_relative else None
    if type(mask) is Packed and not parts.is_rotary:
        return packed_attention(query[0], key[0], value[0], mask, parts, scale, dropout_p, bias), None
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if parts.is_rotary and (parts.rotates is None or own[parts.rotates]):
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        cos, sin = position_tables(patch, arguments)
        query, key = rotary(query, key, cos.to(dtype), sin.to(dtype))
    if type(mask) is Packed:
        query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        return packed_attention(query, key, value, mask, parts, scale, dropout_p), None
    cache = arguments.get(patch.cache_name)
    if cache is not None:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        position = arguments.get("cache_position")
        more = () if position is None else ({"cache_position": position},)
        key, value = cache.update(key, value, module.layer_idx, *more)
    causal = arguments.get("is_causal")
    if causal is None:
        causal = own.get(parts.causal, False)
    if mask is None and causal and cache is not None and key.shape[2] > (tokens := query.shape[2]) > 1:
        # The masks of other implementations are None only when a static cache was empty. The keys behind the queries
        # are its unused end.
        if implementation(module) != NAME:
            key, value = key[:, :, :tokens], value[:, :, :tokens]
    window = window_of(parts)
    softcap = None if parts.softcap is None else own[parts.softcap]
    if mask is None and window is None and bias is None and not return_weights:
        out = attention(query, key, value, causal=causal, scale=scale, softcap=softcap, dropout_p=dropout_p)
        return out.transpose(1, 2).flatten(2), None
    out, weights = attend(
        query,
        key,
        value,
        mask,
        causal,
        scale,
        dropout_p,
        bias=bias,
        window=window,
        softcap=softcap,
        return_weights=return_weights,
    )
    return out.flatten(2), weights


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    parts: Parts,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
) -> Tensor:
    """query, key, value: (real tokens, heads, head_dim). Returns (1, real tokens, heads · head_dim)."""
    if bias is not None:
        out = attention_with_bias(query, key, value, packed, bias, scale, dropout_p)
    else:
        ends, window = packed.cu_seqlens, window_of(parts)
        sides = None if window is None else (window - 1, window - 1)
        out = attention_varlen(query, key, value, ends, ends, window=sides, scale=scale, dropout_p=dropout_p)
    return out.view(1, -1, out.shape[1] * out.shape[2])


def window_of(parts: Parts) -> int | None:
    """The number of keys that a query attends to on a side, with its own. None: all."""
    if parts.window is None:
        return None
    owner, name = parts.window
    window = owner[name]
    return window[0] + 1 or None if type(window) is tuple else window  # (-1, -1): all


def has_positions(patch: LayerPatch, arguments: dict) -> bool:
    """Whether there are tables of positions for `position_tables`."""
    if arguments.get("position_embeddings") is not None or GEMMA3_TABLES[0] in arguments:
        return True
    return own_rotary(patch) is not None and arguments.get("position_ids") is not None


def own_rotary(patch: LayerPatch) -> Any:
    """The module that computes a layer's tables, where the layer has one."""
    path = patch.family.rotary
    return None if path is None else descend(patch.module, path)


def position_tables(patch: LayerPatch, arguments: dict) -> Any:
    """(cos, sin) of the positions. Gemma 3 of transformers 4 gets two pairs, ModernBERT there none."""
    tables = arguments.get("position_embeddings")
    if tables is None and GEMMA3_TABLES[0] in arguments:
        tables = arguments[GEMMA3_TABLES[patch.module.get_submodule(patch.family.attention).is_sliding]]
    if tables is None:
        tables = own_rotary(patch)(arguments[patch.input_name], position_ids=arguments["position_ids"])
    return tables


def head_shape(parts: Parts) -> tuple[int, int]:
    """(heads, head_dim) as arguments of `view`."""
    own = parts.attention_dict
    return (own[parts.num_heads], -1) if parts.head_dim is None else (-1, own[parts.head_dim])


def implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def match_dtypes(branch: Tensor, residual: Tensor, pre_norm: bool) -> tuple[Tensor, Tensor]:
    """The operands of a residual addition under autocast, as PyTorch's type promotion adds them.

    The sum has the wider dtype, and so has the output of a post-norm. A pre-norm's output goes into a projection, which
    casts it to the narrower dtype.
    """
    if pre_norm and residual.dtype == torch.float32:
        return branch, residual
    wider = torch.promote_types(branch.dtype, residual.dtype)
    return branch.to(wider), residual.to(wider)


# A layer whose parts can all be replaced


def fused_layer(patch: LayerPatch, parts: Parts, x: Tensor, mask: Any, arguments: dict) -> Tensor:
    pre_norm, layout, norm = parts.pre_norm, parts.layout, parts.run_norm
    y = x
    if parts.input_norm_dict is not None:
        y, _ = norm(parts.input_norm_dict, x, None)

    (batch, tokens, _), shape = x.shape, head_shape(parts)
    projections = parts.qkv_parameters
    if len(projections) == 1:
        own = projections[0]
        y = linear(y, own["weight"], own["bias"], layout=layout)
        query, key, value = y.view(batch, tokens, 3, *shape).unbind(2)
    else:
        q, k, v = projections
        query = linear(y, q["weight"], q["bias"], layout=layout).view(batch, tokens, *shape)
        key = linear(y, k["weight"], k["bias"], layout=layout).view(batch, tokens, *shape)
        value = linear(y, v["weight"], v["bias"], layout=layout).view(batch, tokens, *shape)
    if parts.query_norm_dict is not None:
        query, key = norm(parts.query_norm_dict, query, None)[0], norm(parts.key_norm_dict, key, None)[0]
    y, _ = self_attention(patch, parts, query, key, value, mask, arguments, False)
    own = parts.out_parameters
    y = linear(y, own["weight"], own["bias"], layout=layout)
    if parts.attention_output_norm_dict is not None:
        y = norm(parts.attention_output_norm_dict, y, None)[0]

    if y.dtype != x.dtype:
        y, x = match_dtypes(y, x, pre_norm)
    own = parts.out_dropout_dict
    dropout_p = own["p"] if own["training"] else 0.0
    y, x = norm(parts.middle_norm_dict, y, x, dropout_p)
    if not pre_norm:
        x = y

    own = parts.hidden_dropout_dict
    if own["p"] and own["training"]:
        y = mlp(y, parts, True)
    else:
        gate, up, down = parts.gate_parameters, parts.up_parameters, parts.down_parameters
        y = parts.run_mlp(y, gate, up, down, parts.activation_name, layout)
    if parts.mlp_output_norm_dict is not None:
        y = norm(parts.mlp_output_norm_dict, y, None)[0]
    own = parts.mlp_dropout_dict
    dropout_p = own["p"] if own["training"] else 0.0
    if pre_norm:
        return x + (F.dropout(y, dropout_p) if dropout_p else y)
    if y.dtype != x.dtype:
        y, x = match_dtypes(y, x, pre_norm)
    return norm(parts.mlp_norm_dict, y, x, dropout_p)[0]


# A layer of which some part must be called as a module


def layer_by_parts(
    patch: LayerPatch, parts: Parts, x: Tensor, mask: Any, arguments: dict, return_weights: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(hidden states, attention weights or None). None if only the class's own forward can compute the layer."""
    options, pre_norm = patch.options, parts.pre_norm
    if parts.block_reason:
        x, weights = first_two(parts.attention_block(x, **shared_arguments(patch, arguments, parts.attention_block)))
        y = x
    else:
        y = normalize(x, parts.attention_norm, parts, options["layernorm"]) if pre_norm else x
        is_projected = False
        if options["attention"] and not parts.attention_reason and not captures_attentions():
            query, key, value = project_qkv(y, parts)
            if parts.query_norm is not None:
                query = normalize(query, parts.query_norm, parts, options["layernorm"])
                key = normalize(key, parts.key_norm, parts, options["layernorm"])
            branch, weights = self_attention(patch, parts, query, key, value, mask, arguments, return_weights)
        else:
            passed = shared_arguments(patch, arguments, parts.attention)
            if passed is None:
                return None
            branch, weights = first_two(parts.attention(y, **passed))
            is_projected = parts.out_owner is parts.attention
        if parts.out_owner is not parts.attention and parts.out_owner_reason:
            x = y = parts.out_owner(branch, x)  # projects, adds the residual and normalizes
        else:
            if not is_projected:
                branch = project(parts.out, branch, parts) if options["attention"] else parts.out(branch)
            dropout = None if is_projected and parts.attention_has_dropout else parts.out_dropout
            if parts.attention_output_norm is not None:
                branch = normalize(branch, parts.attention_output_norm, parts, options["layernorm"])
            y, residual_sum = add_norm(branch, x, dropout, parts.middle_norm, parts, options["layernorm"])
            x = residual_sum if pre_norm else y

    up_owner, down_owner, dropout = parts.up_owner, parts.down_owner, parts.mlp_dropout
    if not parts.up_owner_reason and not parts.down_owner_reason:
        branch = mlp(y, parts, options["mlp"])
    elif up_owner is down_owner:
        branch, dropout = up_owner(y), None if parts.mlp_has_dropout else dropout
    else:
        if parts.up_owner_reason:
            hidden = up_owner(y)
        else:
            hidden = hidden_of(y, parts, options["mlp"])
        if parts.down_owner_reason:
            return down_owner(hidden, x), weights  # projects, adds the residual and normalizes
        branch = project(parts.down, hidden, parts) if options["mlp"] else parts.down(hidden)
    if parts.mlp_output_norm is not None:
        branch = normalize(branch, parts.mlp_output_norm, parts, options["layernorm"])
    if pre_norm:
        branch, dropout_p = apply_or_defer(dropout, branch, parts)
        return x + (F.dropout(branch, dropout_p) if dropout_p else branch), weights
    return add_norm(branch, x, dropout, parts.mlp_norm, parts, options["layernorm"])[0], weights


def shared_arguments(patch: LayerPatch, arguments: dict, module: Any) -> Any:
    """The layer's arguments that its attention takes too; None if the attention calls the hidden states otherwise."""
    container = containers.get(type(module))
    accepted = parameter_names(type(module)) if container is None else container.parameters
    if "hidden_states" not in accepted:
        return None
    of_layer = (patch.input_name, "encoder_hidden_states", "encoder_attention_mask", *GEMMA3_TABLES)
    shared = {
        name: value
        for name, value in arguments.items()
        if name not in of_layer and (name in accepted or "**" in accepted)
    }
    if patch.is_rotary and own_rotary(patch) is None:
        shared["position_embeddings"] = position_tables(patch, arguments)
    return shared


def project(module: Any, x: Tensor, parts: Parts) -> Tensor:
    if not is_plain(module, parts):
        return module(x)
    own = module._parameters
    return linear(x, own["weight"], own["bias"], layout=parts.layout)


def is_plain(module: Any, parts: Parts) -> bool:
    """Whether an operator may replace a projection or a norm. Sharding replaces weights between two calls."""
    return not parts.reasons[module] and type(module._parameters.get("weight")) in PLAIN_TENSORS


def project_qkv(x: Tensor, parts: Parts) -> Any:
    """Query, key and value: (batch, tokens, heads, head_dim)."""
    (batch, tokens, _), shape = x.shape, head_shape(parts)
    projected = [project(projection, x, parts) for projection in parts.qkv]
    if len(projected) == 1:
        return projected[0].view(batch, tokens, 3, *shape).unbind(2)
    return [part.view(batch, tokens, *shape) for part in projected]


def normalize(x: Tensor, norm: Any, parts: Parts, fused: bool) -> Tensor:
    if not fused or not is_plain(norm, parts):
        return norm(x)
    return parts.run_norm(norm.__dict__, x, None)[0]


def apply_or_defer(dropout: Any, branch: Tensor, parts: Parts) -> tuple[Tensor, float]:
    """(branch, the probability of the dropout to apply), or (dropout(branch), 0) if the module must be called."""
    if dropout is None:
        return branch, 0.0
    if parts.reasons[dropout]:
        return dropout(branch), 0.0
    own = dropout_dict(dropout)
    return branch, own["p"] if own["training"] else 0.0


def add_norm(
    branch: Tensor, residual: Tensor, dropout: Any, norm: Any, parts: Parts, fused: bool
) -> tuple[Tensor, Tensor]:
    """(norm(residual + dropout(branch)), the sum)."""
    branch, dropout_p = apply_or_defer(dropout, branch, parts)
    if not fused or not is_plain(norm, parts):
        residual_sum = residual + (F.dropout(branch, dropout_p) if dropout_p else branch)
        return norm(residual_sum), residual_sum
    if branch.dtype != residual.dtype:
        branch, residual = match_dtypes(branch, residual, parts.pre_norm)
    return parts.run_norm(norm.__dict__, branch, residual, dropout_p)


def mlp(x: Tensor, parts: Parts, fused: bool) -> Tensor:
    down = parts.down
    if not fused:
        return down(hidden_of(x, parts, False))
    projections = [module for module in (parts.gate, parts.up, down) if module is not None]
    if (
        parts.activation_name is None
        or not all(is_plain(module, parts) for module in projections)
        or drops_hidden(parts)
    ):
        return project(down, hidden_of(x, parts, True), parts)
    gate = None if parts.gate is None else parts.gate._parameters
    return parts.run_mlp(x, gate, parts.up._parameters, down._parameters, parts.activation_name, parts.layout)


def hidden_of(x: Tensor, parts: Parts, fused: bool) -> Tensor:
    """What the down projection of an MLP takes."""
    up = project(parts.up, x, parts) if fused else parts.up(x)
    if parts.is_gate_fused:
        gate, up = up.chunk(2, -1)
        hidden = parts.activation(gate) * up
    elif parts.gate is None:
        hidden = parts.activation(up)
    else:
        hidden = parts.activation(project(parts.gate, x, parts) if fused else parts.gate(x)) * up
    return hidden if parts.hidden_dropout is None else parts.hidden_dropout(hidden)


def drops_hidden(parts: Parts) -> bool:
    """Whether the dropout before the down projection does anything, or must be called."""
    dropout, own = parts.hidden_dropout, parts.hidden_dropout_dict
    return dropout is not None and bool(parts.reasons[dropout] or (own["p"] and own["training"]))


def first_two(result: Any) -> tuple[Tensor, Tensor | None]:
    """Attention modules return (output,), (output, weights) or more."""
    return result[0], result[1] if len(result) > 1 else None
