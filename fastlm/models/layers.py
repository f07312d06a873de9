"""The parts that both models are made of. Parameters are named and shaped as Hugging Face's; the arithmetic is fastlm's operators."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.ops.boundary import opaque

RECOMPUTE = 1  # the level of recomputation that models begin with


class Uninitialised:
    """Memory is left as it comes: the model sets every parameter once (base.py), and PyTorch's defaults would be drawn for nothing."""

    def reset_parameters(self) -> None:
        pass


class Linear(Uninitialised, nn.Linear):
    """x Wᵀ + b, weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return fastlm.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """x W + b, weight (in, out): GPT-2's layout."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, out_width))
        self.bias = nn.Parameter(torch.empty(out_width))

    def forward(self, x: Tensor) -> Tensor:
        return fastlm.linear(x, self.weight, self.bias, layout="conv1d")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Embedding(Uninitialised, nn.Embedding):
    """A row of the weight per id. The row `padding_idx` gets no gradient from here, as in PyTorch."""


class LayerNorm(Uninitialised, nn.LayerNorm):
    """Normalises residual + dropout(x); returns the result and the sum, which is what the next residual addition needs."""

    def forward(  # type: ignore[override]  # two results, not one
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return fastlm.layernorm_residual(x, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p)


class FeedForward(nn.Module):
    """The part of a layer with a GELU. recompute: what its backward computes again rather than keep, as fastlm.gelu_mlp takes it."""

    recompute = RECOMPUTE


class SharedTable(torch.autograd.Function):
    """Rows of a table by ids, and the table itself for an output projection that is tied to it.

    Here the two gradients of the table meet: the rows' are added into the projection's. Apart, backward would make a second table of zeros, add the rows to it,
    and the two to each other.
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
        if dtable is None or torch.is_grad_enabled():  # nothing to add to, or create_graph=True
            dense = torch.ops.aten.embedding_dense_backward(drows, ids, ctx.size, ctx.padding_idx, False)
            return dense if dtable is None else dtable + dense, None, None
        # The projection's backward made dtable for this node alone, which is all that takes it: the view is not given to anyone but an operator of ours.
        ids, drows = ids.flatten(), drows.flatten(0, -2)
        if ctx.padding_idx >= 0:
            kept = (ids != ctx.padding_idx).nonzero()[:, 0]
            ids, drows = ids[kept], drows[kept]
        return dtable.index_add_(0, ids, drows), None, None


def look_up(embedding: nn.Embedding, ids: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows by ids, where they are not given; the table as an output projection tied to it should take it)."""
    table = embedding.weight
    if rows is not None:
        return rows, table
    assert ids is not None  # one of the two: the model has checked
    if (
        torch.is_grad_enabled()
        and table.requires_grad
        and table.is_cpu
        and not opaque(table, ids)
        and unwatched(embedding)
    ):
        return SharedTable.apply(table, ids, embedding.padding_idx)
    return embedding(ids), table


def unwatched(embedding: nn.Embedding) -> bool:
    """Whether calling the module does no more than looking up: no hook of a user's, no other forward in its place."""
    own = vars(embedding)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(embedding) is Embedding and "forward" not in own and not any(own[kind] for kind in hooks)


def embed(table: nn.Embedding, ids: Tensor | None, default: slice) -> Tensor:
    """Rows of the table by ids; without ids the rows of a slice, which need no gather and broadcast over the batch."""
    return table.weight[default] if ids is None else table(ids)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · head_dim) as (batch, heads, tokens, head_dim): a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The way back. A view where the attention wrote its result token by token, as it does for queries that lie so."""
    return x.transpose(1, 2).flatten(2)


def loss_and_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The output projection and its mean cross-entropy over the labels that are not -100.

    In training with labels the two are one operator that never holds the logits, and None stands for them.
    """
    if labels is not None and training:
        return fastlm.linear_cross_entropy(x.flatten(0, -2), weight, labels.flatten().long(), bias), None
    logits = fastlm.linear(x, weight, bias)
    if labels is None:
        return None, logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten().long()), logits
