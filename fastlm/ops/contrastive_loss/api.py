"""The public function: checks and documentation."""

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast
from fastlm.core.errors import check_float32, check_floating, check_like, check_tensor, mismatch
from fastlm.ops.contrastive_loss.autograd import operator
from fastlm.ops.contrastive_loss.spec import Forward
from fastlm.ops.operator import check_memory


def contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float = 0.05,
    negatives: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE: each query against all documents and negatives by cosine similarity, without the similarity matrix.

    With L2-normalised rows q̂, d̂ of the queries and of [documents; negatives], it is the mean over the queries i of
    −log softmax(q̂ᵢ · d̂ / temperature) at labels[i] (van den Oord et al., 2018, arXiv:1807.03748): each query's own
    document should be more similar to it than the documents of the other queries and the negatives. Similarities exist
    for one chunk of queries at a time (16 MiB), and gradients are computed while they do.

    Args:
        queries: (batch, width), floating point, any strides. Under autocast queries, documents and negatives are cast
            as for a matrix product.
        documents: (batch, width): the document of each query; dtype and device of queries.
        temperature: positive: the similarities are divided by it. sentence-transformers' `scale` is 1 / temperature.
        negatives: (any number, width): more documents, which all queries share, or None.
        labels: (batch,), int64: the row of [documents; negatives] that belongs to each query, or None for its own
            document. A query with label −100 has no loss and no gradient, and the mean does not count it; its document
            is still one that the others are compared with.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        The loss, a scalar in float32 (float64 for float64) whatever the dtype of the embeddings; NaN if no query
        counts. Gradients of queries, documents and negatives flow through their normalisation. An embedding of norm
        below 1e-12 is divided by 1e-12, as in `torch.nn.functional.normalize`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. A label out of range is named with
            its value and position (on a GPU it is a device assert).
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensor("queries", queries)
    check_tensor("documents", documents)
    if negatives is not None:
        check_tensor("negatives", negatives)
    if autocast_enabled(queries):
        check_memory(("queries", "documents", "negatives"), queries, documents, negatives)
        queries, documents, negatives = cast_for_autocast(queries, documents, negatives)
    check_embeddings(queries, documents, negatives)
    if labels is None:
        labels = torch.arange(queries.shape[0], device=queries.device)
    else:
        check_labels(labels, queries)
    temperature = check_float32("temperature", temperature)
    others = documents.requires_grad or (negatives is not None and negatives.requires_grad)
    call = Forward(queries, documents, negatives, labels, temperature, (queries.requires_grad, others))
    return operator(call, backend)


def check_embeddings(queries: Tensor, documents: Tensor, negatives: Tensor | None) -> None:
    if queries.dim() != 2 or queries.shape[1] == 0:
        raise mismatch("queries", "shape (batch, width) with a width of 1 or more", tuple(queries.shape))
    check_floating("queries", queries)
    if documents.shape != queries.shape:
        raise mismatch("documents", f"shape {tuple(queries.shape)}, that of queries", tuple(documents.shape))
    check_like("documents", documents, queries, "queries")
    if negatives is None:
        return
    if negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]:
        raise mismatch("negatives", f"shape (any, {queries.shape[1]}), the width of queries", tuple(negatives.shape))
    check_like("negatives", negatives, queries, "queries")


def check_labels(labels: Tensor, queries: Tensor) -> None:
    check_tensor("labels", labels)
    if labels.dtype != torch.int64 or labels.device != queries.device:
        raise mismatch("labels", f"torch.int64 on {queries.device}", f"{labels.dtype} on {labels.device}")
    if labels.shape != queries.shape[:1]:
        raise mismatch("labels", f"shape ({queries.shape[0]},), one for each query", tuple(labels.shape))
