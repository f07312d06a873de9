"""Encoders on the real tokens alone: one gather in front of the layers, one scatter behind them, and nothing computed for padding in between.

Between the two hidden states are (1, real tokens, width), the sequences one after another, and a `Packed` stands where the mask was. Looking at the mask is
the one synchronisation that this costs on a GPU; while a CUDA graph is captured or a tracer watches, sizes may not depend on values, and nothing is packed.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.integrations.attention import padding_of
from fastlm.integrations.capture import collecting, idle
from fastlm.integrations.patch import Patch, eager, patch_of, watched


@dataclasses.dataclass(frozen=True)
class Packed:
    """What layers get in place of a mask."""

    cu_seqlens: Tensor  # (batch + 1,), int32: 0, then where each sequence ends
    index: Tensor  # (real tokens,): where each lies among batch · tokens
    batch: int
    tokens: int


def pack(padding: Tensor) -> Packed | None:
    """None where there is nothing to gain, and where a sequence begins with padding: its first position is what poolers and classifiers read."""
    batch, tokens = padding.shape
    real, begun = torch.stack([padding.sum(), padding[:, :1].sum()]).tolist()
    if real == batch * tokens or begun != batch:
        return None
    index = torch.nonzero_static(padding.flatten(), size=real)[:, 0]
    cu_seqlens = F.pad(padding.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return Packed(cu_seqlens, index, batch, tokens)


class Gather(torch.autograd.Function):
    """Rows of x by an index without repetitions, so that the gradient needs no sums."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy):
        return Scatter.apply(dy, ctx.saved_tensors[0], ctx.rows), None


class Scatter(torch.autograd.Function):
    """The way back: 0 in the rows that the index leaves out."""

    @staticmethod
    def forward(ctx, y, index, rows):
        ctx.save_for_backward(index)
        return y.new_zeros(rows, y.shape[1]).index_copy_(0, index, y)

    @staticmethod
    def backward(ctx, dx):
        return Gather.apply(dx, ctx.saved_tensors[0]), None, None


def encoder(patch: Patch, args: tuple, kwargs: dict) -> Any:
    """Forward of the module that runs the layers: that of its class, between gather and scatter where padding can be left out."""
    given = patch.bind(args, kwargs)
    name = patch.names[0]
    hidden: Any = given.get(name)
    masked = "attention_mask" if "attention_mask" in given else "attn_mask"
    packed = None if not_packable(patch, hidden, given) else packed_of(given.get(masked), hidden)
    if packed is None:
        return patch.original(*args, **kwargs)
    rows = Gather.apply(hidden.flatten(0, 1), packed.index)
    result = patch.original(**{**given, name: rows[None], masked: packed})
    padded = Scatter.apply(result[0][0], packed.index, packed.batch * packed.tokens).view(hidden.shape)
    if isinstance(result, tuple):
        return padded, *result[1:]
    result["last_hidden_state"] = padded
    return result


def packed_of(mask: Tensor | None, hidden: Tensor) -> Packed | None:
    padding = padding_of(mask) if eager(hidden) else None
    return pack(padding) if padding is not None and padding.shape == hidden.shape[:2] else None


def not_packable(patch: Patch, hidden: Any, given: dict) -> str:
    """Why padding stays: someone may see the hidden states between the layers, or a layer computes its attention by itself."""
    if watched(hidden):
        return watched(hidden)
    for name in ("encoder_hidden_states", "past_key_values", "cache", "output_hidden_states", "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            return f"{name} is given"
    if any(x is not None for x in given.get("head_mask") or ()):
        return "head_mask is given"
    if collecting():
        return "hidden states or attentions are collected"
    for name, layer in patch.module._modules["layer"]._modules.items():
        if why := shows_hidden_states(layer):
            return f"layer.{name} {why}"
    return ""


def shows_hidden_states(layer: Any) -> str:
    from fastlm.integrations import blocks

    patch = patch_of(layer)
    if patch is None or not patch.options["attention"]:
        return "is left alone"
    if hooked(layer):
        return "has a hook"
    parts = blocks.parts_of(patch)
    if not parts.clean:
        for name, module in layer.named_modules():
            if hooked(module):
                return f"has a hook at {name}"
    return parts.attention_why or parts.around_why


def hooked(module: Any) -> bool:
    """Whether someone looks at what goes in or out. Sharding does not."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            if not idle(hook) and not str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
                return True
    return False
