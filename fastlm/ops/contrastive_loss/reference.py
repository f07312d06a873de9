"""contrastive_loss in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.contrastive_loss.composition import EPS, backward, check_labels
from fastlm.ops.contrastive_loss.spec import IGNORED, Forward


def norms_of(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)


def similarity_rows(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    return queries @ documents.t() / temperature


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the rows that count; NaN if there are none."""
    ignored = labels == IGNORED
    log_p = torch.log_softmax(logits, -1)
    picked = log_p.gather(-1, torch.where(ignored, 0, labels)[:, None])[:, 0]
    return torch.where(ignored, 0, -picked).sum() / (~ignored).sum()


@no_autocast
def contrastive_loss(
    queries: Tensor, documents: Tensor, negatives: Tensor | None, labels: Tensor, temperature: float
) -> Tensor:
    """In float32, or float64 for float64 inputs."""
    queries, documents, negatives = widen(queries, documents, negatives)
    compared = documents if negatives is None else torch.cat([documents, negatives])
    normalized = (x / norms_of(x) for x in (queries, compared))
    return mean_loss(similarity_rows(*normalized, temperature), labels)


@no_autocast
def forward(call: Forward):
    queries, documents, negatives = widen(*call[:3])
    compared = documents if negatives is None else torch.cat([documents, negatives])
    check_labels(call.labels, compared.shape[0])
    query_norms, document_norms = norms_of(queries), norms_of(compared)
    queries, compared = queries / query_norms, compared / document_norms
    logits = similarity_rows(queries, compared, call.temperature)
    loss = mean_loss(logits, call.labels)
    ignored = (call.labels == IGNORED)[:, None]
    dlogits = torch.softmax(logits, -1)
    dlogits.scatter_add_(-1, torch.where(ignored, 0, call.labels[:, None]), dlogits.new_full((len(dlogits), 1), -1))
    dlogits = torch.where(ignored, 0, dlogits)
    products = (
        dlogits @ compared if call.needed[0] else None,
        dlogits.t() @ queries if call.needed[1] else None,
    )
    return loss, query_norms, document_norms, *narrow(call.queries.dtype, *products)


implementation = Implementation(reference.backend, forward, backward)
