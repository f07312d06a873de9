"""One layer of a transformer on fastlm's operators: a forward for pre-norm layers and one for post-norm layers, for every family of families.py.

Each asks at every call which of its parts may be replaced. A projection that is not plain is called as the module that it is, whatever became of it; a
container with hooks is called whole. The rest stays fused.
"""

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

import fastlm
from fastlm.integrations.attention import NAME, attend
from fastlm.integrations.capture import attentions_wanted
from fastlm.integrations.packing import Packed
from fastlm.integrations.patch import CACHES, Patch, touched, watched

LAYOUTS = {nn.Linear: "linear", nn.modules.linear.NonDynamicallyQuantizableLinear: "linear", Conv1D: "conv1d"}
EXACT, TANH = ("GELUActivation",), ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation", "AccurateGELUActivation")
PLAIN = (nn.Parameter, Tensor)
# Since 5.24 a layer checkpoints in its class's forward, which ours stands for; before, in __call__, around ours.
CHECKPOINTS_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)

known: set[type] = set()  # classes of containers whose forward is the one that the fused forward repeats
signatures: dict[type, tuple[str, ...]] = {}


# 1. What may be replaced: "" or why not


def not_plain(module: nn.Module) -> str:
    """Why a projection must be called as a module."""
    if type(module) not in LAYOUTS:
        return f"is a {type(module).__name__}"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return f"has a weight of type {type(weight).__name__}"
    return touched(module)


def not_container(module: nn.Module) -> str:
    """Why a module that holds others must be called whole."""
    return f"is a {type(module).__name__}" if type(module) not in known else touched(module)


def not_norm(module: nn.Module) -> str:
    if type(module) is not nn.LayerNorm:
        return f"is a {type(module).__name__}"
    if type(module._parameters.get("weight")) not in PLAIN:
        return "has no plain weight"
    return f"normalises over {module.normalized_shape}" if len(module.normalized_shape) != 1 else touched(module)


def not_dropout(module: nn.Module) -> str:
    return f"is a {type(module).__name__}" if type(module) is not nn.Dropout else "drops everything" if module.p >= 1 else touched(module)


def not_attention(module: nn.Module) -> str:
    if getattr(module, "position_embedding_type", "absolute") != "absolute":
        return f"has {module.position_embedding_type} positions"
    return not_container(module)


def gelu(module: Any) -> str | None:
    """Which GELU an activation is; None if it is none, or must be called."""
    if not isinstance(module, nn.Module) or touched(module):
        return None
    if type(module) is nn.GELU:
        return module.approximate
    name = type(module).__name__ if type(module).__module__ == "transformers.activations" else ""
    return "none" if name in EXACT else "tanh" if name in TANH else None


# 2. Parts


def descend(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules[name]
    return module


def project(module: nn.Module, x: Tensor, fused: bool = True) -> Tensor:
    if not fused or not_plain(module):
        return module(x)
    own = module._parameters
    return fastlm.linear(x, own["weight"], own["bias"], layout=LAYOUTS[type(module)])


def probability(dropout: nn.Module | None) -> float | None:
    """Of a plain dropout, as it is set now; None for a module that must be called."""
    if dropout is None:
        return 0.0
    return None if not_dropout(dropout) else dropout.p if dropout.training else 0.0


def add(branch: Tensor, residual: Tensor, dropout: nn.Module | None) -> Tensor:
    return residual + (branch if dropout is None else dropout(branch))


def add_norm(branch: Tensor, residual: Tensor, dropout: nn.Module | None, norm: nn.Module, fused: bool, post: bool) -> tuple[Tensor, Tensor]:
    """(LayerNorm(residual + dropout(branch)), the sum)."""
    dropout_p = probability(dropout)
    if not fused or dropout_p is None or not_norm(norm):
        summed = add(branch, residual, dropout)
        return norm(summed), summed
    if branch.dtype != residual.dtype and (post or residual.dtype != torch.float32):
        # Under autocast: the sum is as wide as the wider one, and so is its LayerNorm. Before a product, which narrows it again, it may be narrow at once.
        wide = torch.promote_types(branch.dtype, residual.dtype)
        branch, residual = branch.to(wide), residual.to(wide)
    own = norm._parameters
    return fastlm.layernorm_residual(branch, residual, own["weight"], own["bias"], norm.eps, dropout_p=dropout_p)


def feed_forward(x: Tensor, up: nn.Module, activation: Any, down: nn.Module, fused: bool = True) -> Tensor:
    if not fused:
        return down(activation(up(x)))
    approximate = gelu(activation)
    if approximate is None or type(up) is not type(down) or not_plain(up) or not_plain(down):
        return project(down, activation(project(up, x)))
    a, b = up._parameters, down._parameters
    return fastlm.gelu_mlp(x, a["weight"], a["bias"], b["weight"], b["bias"], approximate=approximate, layout=LAYOUTS[type(up)])


def scale_of(module: nn.Module, head_dim: int) -> float:
    scale = getattr(module, "scaling", None)
    if scale is None:  # transformers 4
        scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            scale /= module.layer_idx + 1
    return scale


def attended(patch: Patch, module: nn.Module, x: Tensor, mask: Any, given: dict, weights_wanted: bool) -> tuple[Tensor, Tensor | None]:
    """What the attention module computes up to the output projection: (batch, tokens, heads · head_dim), and the weights if they are wanted."""
    family = patch.family
    heads, batch, tokens = getattr(module, family.heads), x.shape[0], x.shape[1]
    parts = [project(module._modules[name], x) for name in family.projections]
    if len(parts) == 1:  # the attention reads the three where the projection left them, side by side in every token's row
        query, key, value = parts[0].view(batch, tokens, 3, heads, -1).unbind(2)
    else:
        query, key, value = (part.view(batch, tokens, heads, -1) for part in parts)
    scale = scale_of(module, query.shape[-1])
    dropout_p = module._modules[family.attention_dropout].p if module.training else 0.0
    if type(mask) is Packed:
        ends = mask.cu_seqlens
        out = fastlm.attention_varlen(query[0], key[0], value[0], ends, ends, scale=scale, dropout_p=dropout_p)
        return out.view(batch, tokens, -1), None
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    cache = cache_of(given)
    if cache is not None:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        position = given.get("cache_position")
        key, value = cache.update(key, value, module.layer_idx, *(() if position is None else ({"cache_position": position},)))
    causal = getattr(module, "is_causal", None)
    causal = getattr(module, "is_decoder", False) if causal is None else causal
    causal = causal if given.get("is_causal") is None else given["is_causal"]
    if mask is None and causal and key.shape[2] > tokens > 1 and implementation(module) != NAME:
        key, value = key[:, :, :tokens], value[:, :, :tokens]  # elsewhere no mask means an empty static cache then, whose end is empty
    out, weights = attend(query, key, value, mask, causal, scale, dropout_p, weights_wanted=weights_wanted)
    return out.flatten(2), weights


def implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def cache_of(given: dict) -> Any:
    for name in CACHES:
        if given.get(name) is not None:
            return given[name]
    return None


# 3. Layers


def unusual(patch: Patch, x: Any, given: dict) -> str:
    """Why this call is left to the class's own forward."""
    for name, what in (("encoder_hidden_states", "cross-attention"), ("head_mask", "a mask of heads")):
        if given.get(name) is not None:
            return what
    cache = cache_of(given)
    if cache is not None and not isinstance(cache, Cache | EncoderDecoderCache):
        return f"a cache of type {type(cache).__name__}"
    return watched(x)


def shared(patch: Patch, given: dict, module: nn.Module) -> dict | None:
    """The arguments of the layer that its attention takes too; None if it takes them by other names."""
    accepted = parameters(type(module))
    if "hidden_states" not in accepted:
        return None
    ours = (patch.names[0], "encoder_hidden_states", "encoder_attention_mask")
    return {name: x for name, x in given.items() if name not in ours and (name in accepted or "**" in accepted)}


def parameters(kind: type) -> tuple[str, ...]:
    if kind not in signatures:
        found = list(inspect.signature(kind.forward).parameters.values())[1:]
        signatures[kind] = tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in found)
    return signatures[kind]


def returns_tuple(kind: type) -> bool:
    """Whether a layer returns (hidden states, …) or hidden states. The annotations of transformers 5.0 say the one and mean the other."""
    return re.search(r"\boutputs? = \(", inspect.getsource(inspect.unwrap(kind.forward))) is not None


def layer(body: Any) -> Any:
    """A layer's forward around a body that computes it, (patch, hidden states, mask, arguments) → (hidden states, weights), or None to leave it alone."""

    @functools.wraps(body)
    def forward(patch: Patch, args: tuple, kwargs: dict) -> Any:
        given = patch.bind(args, kwargs)
        module = patch.module
        if unusual(patch, given.get(patch.names[0]), given):
            return patch.original(*args, **kwargs)
        if CHECKPOINTS_IN_FORWARD and module.gradient_checkpointing and module.training and torch.is_grad_enabled():
            without = {**dict.fromkeys(CACHES), "use_cache": False}
            kwargs = {name: without.get(name, x) for name, x in kwargs.items()}
            return module._gradient_checkpointing_func(functools.partial(run, patch, kwargs), *args)
        return compute(patch, given)

    def run(patch: Patch, kwargs: dict, *args: Any) -> Any:
        return compute(patch, patch.bind(args, kwargs))

    def compute(patch: Patch, given: dict) -> Any:
        mask = given.get("attention_mask") if "attention_mask" in given else given.get("attn_mask")
        wanted = bool(given.get("output_attentions"))
        result = body(patch, given[patch.names[0]], mask, given, wanted)
        if result is None:
            return patch.original(**given)
        out, weights = result
        if not patch.tuple:
            return out
        if not wanted:
            return (out,)
        return (weights, out) if patch.names[0] == "x" else (out, weights)

    return forward


@layer
def pre_norm(patch: Patch, x: Tensor, mask: Any, given: dict, wanted: bool) -> tuple[Tensor, Tensor | None] | None:
    """s = x + attention(LayerNorm(x)), s + feed_forward(LayerNorm(s)), each branch with dropout."""
    family, options = patch.family, patch.options
    parts, norms, weights = patch.module._modules, options["layernorm"], None
    norm1, norm2 = parts[family.norm1], parts[family.norm2]
    own = norm1._parameters
    y = norm1(x) if not norms or not_norm(norm1) else fastlm.layernorm_residual(x, None, own["weight"], own["bias"], norm1.eps)[0]

    owner, name, dropout = family.out
    attention = parts[owner]
    if options["attention"] and not not_attention(attention) and not attentions_wanted():
        context, weights = attended(patch, attention, y, mask, given, wanted)
        y, x = add_norm(project(attention._modules[name], context), x, attention._modules[dropout], norm2, norms, post=False)
    else:
        branch, weights = taken(attention(y, **shared(patch, given, attention)))
        y, x = add_norm(branch, x, None, norm2, norms, post=False)

    owner, up, activation = family.up
    mlp = parts[owner]
    if not options["mlp"] or not_container(mlp):
        return x + mlp(y), weights
    branch = feed_forward(y, mlp._modules[up], getattr(mlp, activation), mlp._modules[family.down[1]])
    return add(branch, x, mlp._modules[family.down[2]]), weights


@layer
def post_norm(patch: Patch, x: Tensor, mask: Any, given: dict, wanted: bool) -> tuple[Tensor, Tensor | None] | None:
    """x = LayerNorm(x + attention(x)), LayerNorm(x + feed_forward(x)), each branch with dropout."""
    family, options, block = patch.family, patch.options, patch.module
    norms, weights = options["layernorm"], None

    around = None if family.around is None else block._modules[family.around]
    if around is not None and not_container(around):
        x, weights = taken(around(x, **shared(patch, given, around)))
    else:
        attention, owner = descend(block, family.attention), descend(block, family.out[0])
        fused = options["attention"] and not not_attention(attention) and not attentions_wanted()
        if fused:
            branch, weights = attended(patch, attention, x, mask, given, wanted)
        else:
            passed = shared(patch, given, attention)
            if passed is None:
                return None
            branch, weights = taken(attention(x, **passed))
        if owner is not attention and not_container(owner):
            x = owner(branch, x)
        else:
            projected = owner is attention and not fused
            branch = branch if projected else project(owner._modules[family.out[1]], branch, options["attention"])
            dropout = None if projected or family.out[2] is None else owner._modules[family.out[2]]
            x, _ = add_norm(branch, x, dropout, descend(block, family.norm1), norms, post=True)

    first, last, norm2 = block._modules[family.up[0]], block._modules[family.down[0]], descend(block, family.norm2)
    whole, whole_last = not_container(first), not_container(last)
    if first is last and (whole or not options["mlp"]):
        return add_norm(first(x), x, None, norm2, norms, post=True)[0], weights
    up, activation, down = first._modules.get(family.up[1]), getattr(first, family.up[2], None), last._modules.get(family.down[1])
    if not whole and not whole_last:
        branch = feed_forward(x, up, activation, down, options["mlp"])
    else:
        middle = first(x) if whole else activation(project(up, x, options["mlp"]))
        if whole_last:
            return last(middle, x), weights
        branch = project(down, middle, options["mlp"])
    return add_norm(branch, x, last._modules[family.down[2]], norm2, norms, post=True)[0], weights


def taken(result: Any) -> tuple[Tensor, Tensor | None]:
    """Attention modules return (output,), (output, weights) or more."""
    return result[0], result[1] if len(result) > 1 else None
