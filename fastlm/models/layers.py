"""Layers shared by all models. Parameters have Hugging Face's names and shapes; fastlm's operators compute."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.core.tracing import needs_custom_op
from fastlm.ops.attention import attention_varlen
from fastlm.ops.layernorm_residual import layernorm_residual
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.rms_norm_residual import rms_norm_residual

RECOMPUTE = 1  # the default level of recomputation; see PretrainedModel.recompute


class SkipInit:
    """Leaves parameters uninitialised: PretrainedModel.initialise sets each of them once."""

    def reset_parameters(self) -> None:
        pass


class Linear(SkipInit, nn.Linear):
    """x Wᵀ + b, weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """x W + b, weight (in, out): GPT-2's layout."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, layout="conv1d")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Embedding(SkipInit, nn.Embedding):
    """nn.Embedding without its own initialisation. As there, the row `padding_idx` receives no gradient."""


class LayerNorm(SkipInit, nn.LayerNorm):
    """Normalises residual + dropout(x). Returns the result and the residual sum, the input of the next addition."""

    def forward(  # type: ignore[override]  # returns two tensors
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return layernorm_residual(x, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p)


class RMSNorm(nn.Module):
    """Normalises residual + dropout(x). Returns the result and the residual sum, the input of the next addition."""

    def __init__(self, width: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        return rms_norm_residual(x, residual, self.weight, self.eps, unit_offset=self.unit_offset, dropout_p=dropout_p)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class FeedForward(nn.Module):
    """Base class of modules that contain an MLP. recompute: the argument of that name of fastlm.gelu_mlp."""

    recompute = RECOMPUTE


class SharedTable(torch.autograd.Function):
    """Embedding lookup that also returns the table, for an output projection that is tied to it.

    The backward pass receives both gradients of the table and adds the gradient of the looked-up rows into that of
    the projection. Separate nodes would allocate a second table of zeros and add two whole tables.
    """

    @staticmethod
    def forward(ctx, table, ids, padding_idx):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.size, ctx.padding_idx = table.shape[0], -1 if padding_idx is None else padding_idx
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, drows, dtable):
        (ids,) = ctx.saved_tensors
        if drows is None:
            return dtable, None, None
        if dtable is None or torch.is_grad_enabled():  # nothing to add into, or create_graph=True
            dense = torch.ops.aten.embedding_dense_backward(drows, ids, ctx.size, ctx.padding_idx, False)
            return dense if dtable is None else dtable + dense, None, None
        # In-place is safe: the view is passed to fastlm's operators only, so dtable is a new tensor that only this
        # node uses.
        ids, drows = ids.flatten(), drows.flatten(0, -2)
        if ctx.padding_idx >= 0:
            kept = (ids != ctx.padding_idx).nonzero()[:, 0]
            ids, drows = ids[kept], drows[kept]
        return dtable.index_add_(0, ids, drows), None, None


def embed_tokens(embedding: nn.Embedding, ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token embeddings, and the table as the input of an output projection that is tied to it."""
    table = embedding.weight
    if inputs_embeds is not None:
        return inputs_embeds, table
    assert ids is not None  # inputs.check_tokens: exactly one of the two is given
    if (
        torch.is_grad_enabled()
        and table.requires_grad
        and table.is_cpu
        and not needs_custom_op(table, ids)
        and is_plain(embedding)
    ):
        return SharedTable.apply(table, ids, embedding.padding_idx)
    return embedding(ids), table


def is_plain(embedding: nn.Embedding) -> bool:
    """Whether calling the module only looks up rows: it has no hooks and its forward() has not been replaced."""
    attributes = vars(embedding)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(embedding) is Embedding
        and "forward" not in attributes
        and not any(attributes[registry] for registry in hooks)
    )


def embed(embedding: nn.Embedding, ids: Tensor | None, default: slice) -> Tensor:
    """Rows by ids; without ids, a slice of rows, which needs no gather and is broadcast over the batch."""
    return embedding.weight[default] if ids is None else embedding(ids)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(batch, tokens, num_heads · head_dim) → (batch, num_heads, tokens, head_dim), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of split_heads. A view if x has the layout that split_heads returns."""
    return x.transpose(1, 2).flatten(2)


def attention_packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """fastlm.attention within each sequence of packed rows.

    Args:
        query, key, value: (batch, heads, tokens, head_dim), as split_heads returns them.
        cu_seqlens: (sequences + 1,), int32: where the sequences end in batch · tokens.

    Returns:
        Like query, with the layout that split_heads returns.
    """
    batch = query.shape[0]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (rows, heads, head_dim)
    context: Tensor = attention_varlen(query, key, value, cu_seqlens, cu_seqlens, **options)
    return context.unflatten(0, (batch, -1)).transpose(1, 2)


def loss_and_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    training: bool,
    softcap: float | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The output projection, capped if softcap is given, and its mean cross-entropy over all labels other than -100.

    In training with labels, one operator computes the loss without materialising the logits, which are then None.
    """
    if labels is not None and training:
        rows = x.flatten(0, -2)
        return linear_cross_entropy(rows, weight, labels.flatten().long(), bias, softcap=softcap), None
    logits = linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if labels is None:
        return None, logits
    # At least float32, as in linear_cross_entropy.
    logits_fp32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits_fp32.flatten(0, -2), labels.flatten().long()), logits
