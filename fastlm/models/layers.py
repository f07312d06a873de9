"""The parts that both models are made of. Parameters are named and shaped as Hugging Face's; the arithmetic is fastlm's operators."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm


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


def embed(table: nn.Embedding, ids: Tensor | None, default: slice) -> Tensor:
    """Rows of the table by ids; without ids the rows of a slice, which need no gather and broadcast over the batch."""
    return table.weight[default] if ids is None else table(ids)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · head_dim) as (batch, heads, tokens, head_dim): a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The way back. A view where the attention wrote its result token by token, as it does for queries that lie so."""
    return x.transpose(1, 2).flatten(2)


def loss_and_logits(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, training: bool) -> tuple[Tensor | None, Tensor | None]:
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
