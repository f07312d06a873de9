"""The calls of contrastive_loss. The forward computes the gradients of the normalised embeddings."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the label of a row that does not count


class Sizes(NamedTuple):
    rows: int
    width: int
    documents: int  # with the negatives

    @property
    def multiply_adds(self) -> int:
        """Of the similarities."""
        return self.rows * self.width * self.documents


class Forward(NamedTuple):
    """Results: the mean loss (); the norms (rows, 1) of the queries, and of the documents and negatives; the gradients
    of temperature · Σ row losses by the normalised queries, and by the normalised documents and negatives.

    The loss and the norms are float32 (float64 for float64). With the temperature as a factor the gradients of a row's
    loss are at most 2 whatever the temperature: they fit into float16.
    """

    queries: Tensor
    documents: Tensor
    negatives: Tensor | None
    labels: Tensor
    temperature: float
    needed: tuple[bool, ...]  # of the two gradients

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.queries, self.queries.dtype, sizes(self.queries, self.documents, self.negatives)

    def results_present(self) -> tuple[bool, ...]:
        return True, True, True, *self.needed

    def empty_results(self) -> tuple[Tensor | None, ...]:
        queries, (rows, width, documents) = self.queries, sizes(self.queries, self.documents, self.negatives)
        wide = torch.promote_types(queries.dtype, torch.float32)
        shapes = zip((rows, documents), self.needed, strict=True)
        return (
            queries.new_empty((), dtype=wide),
            *(queries.new_empty((count, 1), dtype=wide) for count in (rows, documents)),
            *(queries.new_empty((count, width)) if need else None for count, need in shapes),
        )

    def flops(self) -> int:
        return 2 * sizes(self.queries, self.documents, self.negatives).multiply_adds * (1 + sum(self.needed))

    def bytes(self) -> int:
        """Read the embeddings, write the gradients. Chunks of similarities stay in the cache."""
        queries = self.queries.nbytes
        others = self.documents.nbytes + (0 if self.negatives is None else self.negatives.nbytes)
        return queries * (1 + self.needed[0]) + others * (1 + self.needed[1])


class Backward(NamedTuple):
    """Results: the gradients of queries, documents and negatives."""

    dloss: Tensor
    queries: Tensor
    documents: Tensor
    negatives: Tensor | None
    labels: Tensor
    query_norms: Tensor
    document_norms: Tensor
    dqueries: Tensor | None  # by the normalised ones, as Forward returns them
    ddocuments: Tensor | None
    temperature: float
    needed: tuple[bool, ...]

    def subject(self) -> tuple[Tensor, torch.dtype, Sizes]:
        return self.queries, self.queries.dtype, sizes(self.queries, self.documents, self.negatives)

    def empty_results(self) -> tuple[Tensor | None, ...]:
        inputs = self.queries, self.documents, self.negatives
        return tuple(
            x.new_empty(x.shape) if need and x is not None else None
            for x, need in zip(inputs, self.needed, strict=True)
        )

    def flops(self) -> int:
        return 0  # matrix products only

    def bytes(self) -> int:
        """Read each embedding and its gradient, write another."""
        inputs = zip((self.queries, self.documents, self.negatives), self.needed, strict=True)
        return sum(3 * x.nbytes for x, need in inputs if need and x is not None)


def sizes(queries: Tensor, documents: Tensor, negatives: Tensor | None) -> Sizes:
    rows, width = queries.shape
    return Sizes(rows, width, documents.shape[0] + (0 if negatives is None else negatives.shape[0]))
