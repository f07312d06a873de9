"""fastlm's contrastive loss as one of sentence-transformers' losses, which need not be installed to import this."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastlm.core.errors import check_float32, check_integer, mismatch
from fastlm.integrations.api import check_module
from fastlm.ops.contrastive_loss import contrastive_loss

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(nn.Module):
    """InfoNCE with in-batch negatives for `SentenceTransformerTrainer`, by `fastlm.contrastive_loss`.

    It is sentence-transformers' `MultipleNegativesRankingLoss` with scale = 1 / temperature, without the similarity
    matrix. With mini_batch_size it is its `CachedMultipleNegativesRankingLoss`: texts are embedded by mini-batches that
    keep no activations, and the backward embeds each mini-batch once more, with the same dropout masks. The negatives
    are those of the whole batch all the same, and the gradients are those without mini-batches, so memory is that of a
    mini-batch at a third more arithmetic.

    A loss that replaces the model's forward for a time (`MatryoshkaLoss`, `AdaptiveLayerLoss`) takes this one without
    mini-batches. Embeddings are not gathered across devices.

    Columns of a dataset: anchor, positive, and any number of columns of negatives. All positives and negatives of the
    batch are compared with every anchor; labels are not used.

    Args:
        model: a SentenceTransformer, or any module that adds "sentence_embedding" (batch, width) to a dict of features.
        temperature: positive: cosine similarities are divided by it.
        mini_batch_size: texts embedded at once, or None for all of a column.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. Mini-batches need features that are
            padded tensors (batch, …).
        RuntimeError: in the backward, if the model's forward was replaced since.
    """

    def __init__(self, model: nn.Module, temperature: float = 0.05, *, mini_batch_size: int | None = None) -> None:
        super().__init__()
        check_module(model)
        if mini_batch_size is not None:
            expected = "an integer of 1 or more, or None"
            mini_batch_size = check_integer("mini_batch_size", mini_batch_size, expected, range(1, 2**63))
        self.model = model
        self.temperature = check_float32("temperature", temperature)
        self.mini_batch_size = mini_batch_size

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one dict of features per column."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise mismatch("sentence_features", "two columns or more: anchors, positives, negatives", len(columns))
        anchors, positives, *others = [self.embed(features) for features in columns]
        negatives = torch.cat(others) if others else None
        return contrastive_loss(anchors, positives, temperature=self.temperature, negatives=negatives)

    def embed(self, features: dict[str, Any]) -> Tensor:
        """The embeddings of a column."""
        if self.mini_batch_size is None:
            return self.model(features)["sentence_embedding"]
        parts = mini_batches(features, self.mini_batch_size)
        # Activation checkpointing of each mini-batch: the loss's gradient of its embeddings starts the backward of one
        # mini-batch after another. It replays the random state and autocast, and whatever multiplies the loss later
        # (a gradient scaler, accumulation) reaches the gradients as in any other graph.
        return torch.cat([checkpoint(embedder(self.model), part, use_reentrant=False) for part in parts])

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card of sentence-transformers says about the loss."""
        return {"temperature": self.temperature, "mini_batch_size": self.mini_batch_size}


def embedder(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    """A function that embeds a mini-batch, and again in the backward.

    There it calls the module inside a DistributedDataParallel: the wrapper's forward prepares for a backward, which
    must not happen in the middle of one.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    models, forward = itertools.chain([model], itertools.repeat(module)), model.forward

    def embed(features: dict[str, Any]) -> Tensor:
        if model.forward != forward:
            raise RuntimeError(
                "model: expected the forward with which the loss was computed, got another; "
                "a loss that replaces it for a time, such as MatryoshkaLoss, needs mini_batch_size=None"
            )
        return next(models)(dict(features))["sentence_embedding"]  # modules add to the dict

    return embed


def mini_batches(features: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Slices of the features of a column; what is no tensor belongs to all of them."""
    tensors = {name: x for name, x in features.items() if isinstance(x, Tensor)}
    counts = {x.shape[0] for x in tensors.values()} if all(x.dim() > 1 for x in tensors.values()) else set()
    if len(counts) != 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise mismatch("sentence_features", "padded tensors (batch, …), to make mini-batches of", shapes or "none")
    slices = [slice(begin, begin + size) for begin in range(0, max(1, counts.pop()), size)]
    return [features | {name: x[rows] for name, x in tensors.items()} for rows in slices]
