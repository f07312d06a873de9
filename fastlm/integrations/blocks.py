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
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

import fastlm
from fastlm.integrations.attention import NAME, attend
from fastlm.integrations.capture import attentions_wanted, collector
from fastlm.integrations.families import Family
from fastlm.integrations.packing import Packed
from fastlm.integrations.patch import (
    CACHES,
    GLOBAL_HOOKS,
    Patch,
    is_compiling,
    put,
    touched,
    traced_by,
    transformed_by,
    watched,
)
from fastlm.models.layers import RECOMPUTE

LAYOUTS = {nn.Linear: "linear", nn.modules.linear.NonDynamicallyQuantizableLinear: "linear", Conv1D: "conv1d"}
EXACT, TANH = (
    ("GELUActivation",),
    ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation", "AccurateGELUActivation"),
)
Parameter = nn.Parameter
PLAIN = (Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two: what tracing puts in a parameter's place
# Since 5.24 a layer checkpoints in its class's forward, which ours stands for; before, in __call__, around ours.
CHECKPOINTS_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


CACHE_CLASSES = (Cache, EncoderDecoderCache)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
is_dynamo_compiling = torch.compiler.is_dynamo_compiling

known: set[type] = set()  # classes of containers whose forward is the one that the fused forward repeats
signatures: dict[type, tuple[str, ...]] = {}


# 1. What may be replaced: "" or why not


def not_plain(module: Any) -> str:
    """Why a projection must be called as a module."""
    if type(module) not in LAYOUTS:
        return f"is a {type(module).__name__}"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return f"has a weight of type {type(weight).__name__}"
    return touched(module)


def not_container(module: Any) -> str:
    """Why a module that holds others must be called whole."""
    return f"is a {type(module).__name__}" if type(module) not in known else touched(module)


def not_norm(module: Any) -> str:
    if type(module) is not nn.LayerNorm:
        return f"is a {type(module).__name__}"
    if type(module._parameters.get("weight")) not in PLAIN:
        return "has no plain weight"
    return f"normalises over {module.normalized_shape}" if len(module.normalized_shape) != 1 else touched(module)


def not_dropout(module: Any) -> str:
    return (
        f"is a {type(module).__name__}"
        if type(module) is not nn.Dropout
        else "drops everything"
        if module.p >= 1
        else touched(module)
    )


def not_attention(module: Any) -> str:
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


class Parts:
    """The modules of a layer and, for each, why it must be called as a module; as long as no reason appears or vanishes."""

    def __init__(self, block: Any, family: Family) -> None:
        self.links: list[tuple[dict, str, Any]] = []
        self.attention, self.owner = self.find(block, family.attention), self.find(block, family.out[0])
        self.first, self.last = self.find(block, family.up[0]), self.find(block, family.down[0])
        self.norm1, self.norm2 = self.find(block, family.norm1), self.find(block, family.norm2)
        self.around: Any = None if family.around is None else self.find(block, family.around)
        self.projections = [self.find(self.attention, name) for name in family.projections]
        self.attention_dropout = self.find(self.attention, family.attention_dropout)
        self.out, self.up, self.down = (
            self.find(self.owner, family.out[1]),
            self.find(self.first, family.up[1]),
            self.find(self.last, family.down[1]),
        )
        self.out_dropout: Any = None if family.out[2] is None else self.find(self.owner, family.out[2])
        self.down_dropout: Any = None if family.down[2] is None else self.find(self.last, family.down[2])
        self.activation = getattr(self.first, family.up[2])  # a module, or a function
        if isinstance(self.activation, nn.Module):
            self.find(self.first, family.up[2])

        self.attention_why = not_attention(self.attention)
        self.around_why = "" if self.around is None else not_container(self.around)
        self.owner_why = self.attention_why if self.owner is self.attention else not_container(self.owner)
        self.first_why, self.last_why = not_container(self.first), not_container(self.last)
        self.gelu: Any = gelu(self.activation)
        plain = (*self.projections, self.out, self.up, self.down)
        self.why = {module: not_plain(module) for module in plain}
        self.why |= {module: not_norm(module) for module in (self.norm1, self.norm2)}
        self.why |= {
            module: not_dropout(module) for module in (self.out_dropout, self.down_dropout) if module is not None
        }
        reasons = (
            self.attention_why,
            self.around_why,
            self.owner_why,
            self.first_why,
            self.last_why,
            *self.why.values(),
        )
        self.clean = self.gelu is not None and not any(reasons)
        self.layout = LAYOUTS.get(type(self.up), "")
        self.even = self.clean and len({type(module) for module in plain}) == 1  # one layout
        self.parameters = [module._parameters for module in (*plain, self.norm1, self.norm2)]
        # What is compared at every call, whole lists at once.
        self.modules = list(dict.fromkeys(module for _, _, module in self.links))
        self.kinds, self.own = [type(module) for module in self.modules], [module.__dict__ for module in self.modules]
        self.inside = list({id(inside): inside for inside, _, _ in self.links}.values())
        self.held = [dict(inside) for inside in self.inside]
        self.hooks = [own[kind] for own in self.own for kind in HOOKS]
        # Attributes are read from here: a module's own lookup goes through nn.Module's __getattr__ slot, at several times the price.
        self.block_own, self.attention_own = block.__dict__, self.attention.__dict__
        self.norm1_own, self.norm2_own = self.norm1.__dict__, self.norm2.__dict__
        self.out_dropout_own = {"training": False} if self.out_dropout is None else self.out_dropout.__dict__
        self.down_dropout_own = {"training": False} if self.down_dropout is None else self.down_dropout.__dict__

    def find(self, module: Any, path: str) -> Any:
        for name in path.split("."):
            inside = module._modules
            module = inside[name]
            self.links.append((inside, name, module))
        return module

    def still_clean(self) -> bool:
        """Whether all was clean and is: nothing replaced, hooked or wrapped since. All that a layer pays, at every call, for letting that happen."""
        if not self.clean or self.inside != self.held or [*map(type, self.modules)] != self.kinds:
            return False
        if is_dynamo_compiling() or any(self.hooks):  # some hooks are idle
            return self.untouched()
        for own in self.own:
            if "forward" in own:
                return self.untouched()
        return True

    def untouched(self) -> bool:
        for module in self.modules:
            if touched(module):
                return False
        return True


def all_plain(parts: Parts) -> bool:
    """Sharding puts other tensors in the place of weights between two calls."""
    for own in parts.parameters:
        kind = type(own.get("weight"))
        if kind is not Parameter and kind not in PLAIN:
            return False
    return True


def parts_of(patch: Patch) -> Parts:
    found = patch.parts
    return found if found is not None and found.still_clean() else found_anew(patch)


def found_anew(patch: Patch) -> Parts:
    found = Parts(patch.module, patch.family)
    if not is_compiling():
        patch.parts = found
    return found


def project(module: Any, x: Tensor, why: str) -> Tensor:
    own = module._parameters
    weight = own.get("weight")
    if why or type(weight) not in PLAIN:  # sharding puts other tensors in its place between two calls
        return module(x)
    return fastlm.linear(x, weight, own["bias"], layout=LAYOUTS[type(module)])


def dropped(branch: Tensor, dropout: Any, why: dict) -> tuple[Tensor, float]:
    """(branch, the probability with which it is to be dropped), or (dropout(branch), 0) where the dropout must be called."""
    if why[dropout]:
        return dropout(branch), 0.0
    return branch, dropout.p if dropout.training else 0.0


def add_norm(
    branch: Tensor, residual: Tensor, dropout: Any, norm: Any, parts: Parts, fused: bool, post: bool
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(residual + dropout(branch)), the sum)."""
    branch, dropout_p = dropped(branch, dropout, parts.why) if dropout is not None else (branch, 0.0)
    own = norm._parameters
    if not fused or parts.why[norm] or type(own.get("weight")) not in PLAIN:
        summed = residual + (F.dropout(branch, dropout_p) if dropout_p else branch)
        return norm(summed), summed
    if branch.dtype != residual.dtype:
        branch, residual = widened(branch, residual, post)
    return fastlm.layernorm_residual(branch, residual, own["weight"], own["bias"], norm.eps, dropout_p=dropout_p)


def widened(branch: Tensor, residual: Tensor, post: bool) -> tuple[Tensor, Tensor]:
    """Under autocast: the sum is as wide as the wider one, and so is its LayerNorm. Before a product, which narrows it again, it may be narrow at once."""
    if not post and residual.dtype == torch.float32:
        return branch, residual
    wide = torch.promote_types(branch.dtype, residual.dtype)
    return branch.to(wide), residual.to(wide)


def feed_forward(x: Tensor, parts: Parts, fused: bool) -> Tensor:
    up, down, why = parts.up, parts.down, parts.why
    if not fused:
        return down(parts.activation(up(x)))
    a, b = up._parameters, down._parameters
    if (
        parts.gelu is None
        or why[up]
        or why[down]
        or type(up) is not type(down)
        or type(a.get("weight")) not in PLAIN
        or type(b.get("weight")) not in PLAIN
    ):
        return project(down, parts.activation(project(up, x, why[up])), why[down])
    return fastlm.gelu_mlp(
        x,
        a["weight"],
        a["bias"],
        b["weight"],
        b["bias"],
        approximate=parts.gelu,
        layout=LAYOUTS[type(up)],
        recompute=RECOMPUTE,
    )


def scale_of(module: Any, head_dim: int) -> float:
    """In transformers 4, where it is no attribute."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def projected(patch: Patch, parts: Parts, x: Tensor) -> Any:
    """Query, key and value, (batch, tokens, heads, head_dim)."""
    heads, (batch, tokens, _) = parts.attention.__dict__[patch.family.heads], x.shape
    found = [project(projection, x, parts.why[projection]) for projection in parts.projections]
    if (
        len(found) == 1
    ):  # the attention reads the three where the projection left them, side by side in every token's row
        return found[0].view(batch, tokens, 3, heads, -1).unbind(2)
    return [part.view(batch, tokens, heads, -1) for part in found]


def attended(
    patch: Patch, parts: Parts, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict, weights_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """What the attention module computes up to the output projection: (batch, tokens, heads · head_dim), and the weights if they are wanted."""
    module, own = parts.attention, parts.attention_own
    scale = own.get("scaling")
    scale = scale_of(module, query.shape[-1]) if scale is None else scale
    dropout_p = parts.attention_dropout.p if own["training"] else 0.0
    if type(mask) is Packed:
        ends = mask.cu_seqlens
        out = fastlm.attention_varlen(query[0], key[0], value[0], ends, ends, scale=scale, dropout_p=dropout_p)
        return out.view(1, -1, out.shape[1] * out.shape[2]), None
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    cache = given.get(patch.cache)
    if cache is not None:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        position = given.get("cache_position")
        key, value = cache.update(
            key, value, module.layer_idx, *(() if position is None else ({"cache_position": position},))
        )
    causal = given.get("is_causal")
    if causal is None:
        causal = own["is_causal"] if "is_causal" in own else own.get("is_decoder", False)
    if (
        mask is None
        and causal
        and cache is not None
        and key.shape[2] > (tokens := query.shape[2]) > 1
        and implementation(module) != NAME
    ):
        key, value = (
            key[:, :, :tokens],
            value[:, :, :tokens],
        )  # elsewhere no mask means an empty static cache then, whose end is empty
    if mask is None and not weights_wanted:
        return fastlm.attention(query, key, value, causal=causal, scale=scale, dropout_p=dropout_p).transpose(
            1, 2
        ).flatten(2), None
    out, weights = attend(query, key, value, mask, causal, scale, dropout_p, weights_wanted=weights_wanted)
    return out.flatten(2), weights


def implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


# 3. Layers


def unusual(patch: Patch, given: dict) -> str:
    """Why this call is left to the class's own forward."""
    get = given.get
    if get("encoder_hidden_states") is not None:
        return "cross-attention"
    a, b, c, d = patch.rare
    if a in given or b in given or c in given or d in given:
        if get("head_mask") is not None:
            return "a mask of heads"
        if not patch.not_cache.isdisjoint(given):
            return f"an argument of the name {', '.join(patch.not_cache & given.keys())}"
    cache = get(patch.cache)
    if cache is not None and not isinstance(cache, CACHE_CLASSES):
        return f"a cache of type {type(cache).__name__}"
    x = get(patch.names[0])
    if type(x) is Tensor and not any(GLOBAL_HOOKS) and traced_by() is None and transformed_by() is None:
        return ""  # as `watched` would say
    return watched(x)


def shared(patch: Patch, given: dict, module: Any) -> Any:
    """The arguments of the layer that its attention takes too; None if it takes them by other names."""
    accepted = parameters(type(module))
    if "hidden_states" not in accepted:
        return None
    ours = (patch.names[0], "encoder_hidden_states", "encoder_attention_mask")
    return {name: x for name, x in given.items() if name not in ours and (name in accepted or "**" in accepted)}


def parameters(kind: Any) -> tuple[str, ...]:
    if kind not in signatures:
        found = list(inspect.signature(kind.forward).parameters.values())[1:]
        signatures[kind] = tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in found)
    return signatures[kind]


def put_layer(module: Any, family: Family, options: dict[str, bool]) -> None:
    patch = put(module, pre_norm if family.pre_norm else post_norm, family, options)
    patch.cache = next((name for name in patch.names if name in CACHES), CACHES[0])
    patch.not_cache = frozenset(CACHES) - {patch.cache}
    patch.rare = (*patch.not_cache, "head_mask")
    patch.mask = next(name for name in patch.names if name in ("attention_mask", "attn_mask"))
    # Whether a layer returns (hidden states, …) or hidden states. The annotations of transformers 5.0 say the one and mean the other.
    patch.as_tuple = re.search(r"\boutputs? = \(", inspect.getsource(inspect.unwrap(type(module).forward))) is not None
    patch.fused = options["attention"] and options["layernorm"] and options["mlp"]
    patch.parts = Parts(module, family)


# Straight, where nothing is in the way of any operator: all that is between them is what a layer costs in Python.


def straight_pre_norm(patch: Patch, parts: Parts, x: Tensor, mask: Any, given: dict) -> Tensor:
    qkv, out, up, down, norm1, norm2 = parts.parameters
    layout, (batch, tokens, _) = parts.layout, x.shape
    y, _ = fastlm.layernorm_residual(x, None, norm1["weight"], norm1["bias"], parts.norm1_own["eps"])
    y = fastlm.linear(y, qkv["weight"], qkv["bias"], layout=layout).view(
        batch, tokens, 3, parts.attention_own[patch.family.heads], -1
    )
    query, key, value = y.unbind(2)
    y, _ = attended(patch, parts, query, key, value, mask, given, False)
    y = fastlm.linear(y, out["weight"], out["bias"], layout=layout)
    if y.dtype != x.dtype:
        y, x = widened(y, x, post=False)
    dropout = parts.out_dropout_own
    y, x = fastlm.layernorm_residual(
        y,
        x,
        norm2["weight"],
        norm2["bias"],
        parts.norm2_own["eps"],
        dropout_p=dropout["p"] if dropout["training"] else 0.0,
    )
    y = fastlm.gelu_mlp(
        y,
        up["weight"],
        up["bias"],
        down["weight"],
        down["bias"],
        approximate=parts.gelu,
        layout=layout,
        recompute=RECOMPUTE,
    )
    dropout = parts.down_dropout_own
    return x + (F.dropout(y, dropout["p"]) if dropout["training"] and dropout["p"] else y)


def straight_post_norm(patch: Patch, parts: Parts, x: Tensor, mask: Any, given: dict) -> Tensor:
    q, k, v, out, up, down, norm1, norm2 = parts.parameters
    layout, (batch, tokens, _), heads = parts.layout, x.shape, parts.attention_own[patch.family.heads]
    query = fastlm.linear(x, q["weight"], q["bias"], layout=layout).view(batch, tokens, heads, -1)
    key = fastlm.linear(x, k["weight"], k["bias"], layout=layout).view(batch, tokens, heads, -1)
    value = fastlm.linear(x, v["weight"], v["bias"], layout=layout).view(batch, tokens, heads, -1)
    y, _ = attended(patch, parts, query, key, value, mask, given, False)
    y = fastlm.linear(y, out["weight"], out["bias"], layout=layout)
    if y.dtype != x.dtype:
        y, x = widened(y, x, post=True)
    dropout = parts.out_dropout_own
    x, _ = fastlm.layernorm_residual(
        y,
        x,
        norm1["weight"],
        norm1["bias"],
        parts.norm1_own["eps"],
        dropout_p=dropout["p"] if dropout["training"] else 0.0,
    )
    y = fastlm.gelu_mlp(
        x,
        up["weight"],
        up["bias"],
        down["weight"],
        down["bias"],
        approximate=parts.gelu,
        layout=layout,
        recompute=RECOMPUTE,
    )
    if y.dtype != x.dtype:
        y, x = widened(y, x, post=True)
    dropout = parts.down_dropout_own
    return fastlm.layernorm_residual(
        y,
        x,
        norm2["weight"],
        norm2["bias"],
        parts.norm2_own["eps"],
        dropout_p=dropout["p"] if dropout["training"] else 0.0,
    )[0]


# Part by part


def layer(straight: Any) -> Any:
    """A layer's forward around a body that computes it part by part, and another that computes it straight where it can: (patch, parts, hidden states, mask,
    arguments) → hidden states. The body's last argument is whether weights are wanted; it returns (hidden states, weights), or None to leave all alone.
    """

    def around(body: Any) -> Any:
        @functools.wraps(body)
        def forward(patch: Patch, args: tuple, kwargs: dict, again: bool = False) -> Any:
            names, given = patch.names, dict(kwargs)
            if len(args) > len(names):
                patch.bind(args, kwargs)  # which says so
            for name, argument in zip(names, args):  # noqa: B905  # fewer arguments than names
                given[name] = argument
            if unusual(patch, given):
                return patch.original(*args, **kwargs)
            parts = patch.parts
            if parts is None or not parts.still_clean():
                parts = found_anew(patch)
            own = parts.block_own
            if (
                CHECKPOINTS_IN_FORWARD
                and own.get("gradient_checkpointing")
                and own["training"]
                and torch.is_grad_enabled()
                and not again
            ):
                without = {**dict.fromkeys(CACHES), "use_cache": False}
                kwargs = {name: without.get(name, x) for name, x in kwargs.items()}
                return patch.module._gradient_checkpointing_func(
                    lambda *args: forward(patch, args, kwargs, again=True), *args
                )
            x, mask, wanted = given[names[0]], given.get(patch.mask), bool(given.get("output_attentions"))
            if (
                parts.even
                and patch.fused
                and not wanted
                and all_plain(parts)
                and not (collector is not None and collector.get())
            ):
                out = straight(patch, parts, x, mask, given)
                return (out,) if patch.as_tuple else out
            result = body(patch, parts, x, mask, given, wanted)
            if result is None:
                return patch.original(**given)
            out, weights = result
            if not patch.as_tuple:
                return out
            if not wanted:
                return (out,)
            return (weights, out) if names[0] == "x" else (out, weights)  # DistilBERT's order

        return forward

    return around


@layer(straight_pre_norm)
def pre_norm(
    patch: Patch, parts: Parts, x: Tensor, mask: Any, given: dict, wanted: bool
) -> tuple[Tensor, Tensor | None] | None:
    """s = x + attention(LayerNorm(x)), s + feed_forward(LayerNorm(s)), each branch with dropout."""
    options = patch.options
    norms, norm1 = options["layernorm"], parts.norm1
    own = norm1._parameters
    if norms and not parts.why[norm1] and type(own.get("weight")) in PLAIN:
        y, _ = fastlm.layernorm_residual(x, None, own["weight"], own["bias"], norm1.eps)
    else:
        y = norm1(x)

    if options["attention"] and not parts.attention_why and not attentions_wanted():
        query, key, value = projected(patch, parts, y)
        context, weights = attended(patch, parts, query, key, value, mask, given, wanted)
        branch, dropout = project(parts.out, context, parts.why[parts.out]), parts.out_dropout
    else:
        branch, weights = taken(parts.attention(y, **shared(patch, given, parts.attention)))
        dropout = None
    y, x = add_norm(branch, x, dropout, parts.norm2, parts, norms, post=False)

    if not options["mlp"] or parts.first_why:
        return x + parts.first(y), weights
    branch, dropout_p = dropped(feed_forward(y, parts, True), parts.down_dropout, parts.why)
    return x + (F.dropout(branch, dropout_p) if dropout_p else branch), weights


@layer(straight_post_norm)
def post_norm(
    patch: Patch, parts: Parts, x: Tensor, mask: Any, given: dict, wanted: bool
) -> tuple[Tensor, Tensor | None] | None:
    """x = LayerNorm(x + attention(x)), LayerNorm(x + feed_forward(x)), each branch with dropout."""
    options = patch.options
    norms, fused, weights = options["layernorm"], options["attention"], None

    if parts.around_why:
        x, weights = taken(parts.around(x, **shared(patch, given, parts.around)))
    else:
        attention, owner = parts.attention, parts.owner
        done = False  # with the projection
        if fused and not parts.attention_why and not attentions_wanted():
            query, key, value = projected(patch, parts, x)
            branch, weights = attended(patch, parts, query, key, value, mask, given, wanted)
        else:
            passed = shared(patch, given, attention)
            if passed is None:
                return None
            branch, weights = taken(attention(x, **passed))
            done = owner is attention
        if owner is not attention and parts.owner_why:
            x = owner(branch, x)
        else:
            if not done:
                branch = project(parts.out, branch, parts.why[parts.out]) if fused else parts.out(branch)
            x, _ = add_norm(branch, x, None if done else parts.out_dropout, parts.norm1, parts, norms, post=True)

    fused, first, last = options["mlp"], parts.first, parts.last
    if not parts.first_why and not parts.last_why:
        branch = feed_forward(x, parts, fused)
    elif first is last:
        return add_norm(first(x), x, None, parts.norm2, parts, norms, post=True)[0], weights
    else:
        middle = (
            first(x)
            if parts.first_why
            else parts.activation(project(parts.up, x, parts.why[parts.up]) if fused else parts.up(x))
        )
        if parts.last_why:
            return last(middle, x), weights
        branch = project(parts.down, middle, parts.why[parts.down]) if fused else parts.down(middle)
    return add_norm(branch, x, parts.down_dropout, parts.norm2, parts, norms, post=True)[0], weights


def taken(result: Any) -> tuple[Tensor, Tensor | None]:
    """Attention modules return (output,), (output, weights) or more."""
    return result[0], result[1] if len(result) > 1 else None
