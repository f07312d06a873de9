"""contrastive_loss by the kernels of linear_cross_entropy, which every backend has.

The loss is the linear cross-entropy of the normalised queries against a weight of the normalised documents and
negatives, with 1 / temperature as scale of the logits. B queries of width D against M documents take three products of
2 B M D FLOP, which the kernels do by chunks of rows, and some ten passes over the (B + M) D embeddings for their norms.
At B = M = 4096, D = 384 these are 39 GFLOP and 0.2 GB. So every backend shares the products' kernels, the passes are
PyTorch's operators, and there is no kernel of this operator's own.

The gradients by the normalised embeddings are computed in the forward, while a chunk of similarities exists. The
backward takes them through the normalisation, x̂ = x / n with n = max(‖x‖, ε):
dx = (g − (g · x̂) x̂) / n, or g / n where n = ε. It multiplies them there by the upstream gradient, in float32, so that
those of float16 may be scaled before they underflow.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.core.autocast import no_autocast
from fastlm.ops.contrastive_loss.spec import IGNORED, Backward, Forward
from fastlm.ops.linear_cross_entropy.autograd import divisor, reduce, total_weight
from fastlm.ops.linear_cross_entropy.spec import Forward as LossCall

EPS = 1e-12  # as torch.nn.functional.normalize
# Of one chunk of similarities, in float32. The loss of a vocabulary takes 64 MiB, which is 4096 × 4096.
SIMILARITY_BYTES = 16 << 20


def by(loss: Implementation[LossCall, Any]) -> Implementation[Forward, Backward]:
    """contrastive_loss on the backend of this implementation of linear_cross_entropy."""
    return Implementation(loss.backend, no_autocast(functools.partial(forward, loss)), backward)


def forward(loss: Implementation[LossCall, Any], call: Forward) -> Results:
    queries, query_norms = normalized(call.queries)
    documents, document_norms = normalized(call.documents, call.negatives)
    rows, count = queries.shape[0], documents.shape[0]
    # With multiples of 16 rows every chunk of a GPU is aligned alike.
    chunk = max(16, SIMILARITY_BYTES // (4 * max(1, count)) // 16 * 16)
    losses: list[Any] = []
    dqueries: list[Any] = []
    ddocuments: Any = None
    for begin in range(0, rows, chunk):
        labels = call.labels[begin : begin + chunk]
        row_scale = query_norms.new_full(labels.shape, call.temperature) if any(call.needed) else None
        tensors = queries[begin : begin + chunk], documents, None, labels, row_scale
        settings = IGNORED, 0.0, 1 / call.temperature, 0.0
        try:
            of_rows, dx, dweight, _ = loss.forward(LossCall(*tensors, *settings, rows > chunk, (*call.needed, False)))
        except ValueError:  # a label, which the kernel calls a target
            check_labels(call.labels, count)
            raise
        losses.append(of_rows)
        dqueries.append(dx)
        # Those of several chunks are summed in float32.
        if ddocuments is not None:
            ddocuments.add_(dweight)
        elif dweight is not None:
            ddocuments = dweight.to(query_norms.dtype) if rows > chunk else dweight
    if not rows:
        losses, dqueries = [query_norms.new_empty(0)], [queries] if call.needed[0] else [None]
        ddocuments = torch.zeros_like(documents) if call.needed[1] else None
    return (
        reduce(joined(losses), call.labels, None, IGNORED, "mean"),
        query_norms,
        document_norms,
        joined(dqueries),
        ddocuments if ddocuments is None else ddocuments.to(queries.dtype),
    )


def normalized(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the rows of all parts divided by their norms, the norms) in the dtype of the parts, and in float32 at least."""
    given = [x for x in parts if x is not None]
    dtype, counts = torch.promote_types(given[0].dtype, torch.float32), [x.shape[0] for x in given]
    norms = given[0].new_empty((sum(counts), 1), dtype=dtype)
    results = given[0].new_empty((sum(counts), given[0].shape[1]))
    for x, norm, result in zip(given, norms.split(counts), results.split(counts), strict=True):
        torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype, out=norm)
        torch.div(x, norm.clamp_min_(EPS), out=result)
    return results, norms


def joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def check_labels(labels: Tensor, count: int) -> None:
    """Check the values on a CPU. On a GPU, where this would synchronise, indexing with them is a device assert."""
    if labels.device.type != "cpu":
        return
    wrong = ((labels < 0) | (labels >= count)) & (labels != IGNORED)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels: expected values in [0, {count}), the documents and negatives, or {IGNORED}, "
            f"got {labels[at]} at [{at}]"
        )


@no_autocast
def backward(call: Backward) -> Results:
    """The same on every backend."""
    factor = call.dloss / divisor(total_weight(call.labels, None, IGNORED)) / call.temperature
    counts = [0 if x is None else x.shape[0] for x in (call.documents, call.negatives)]
    norms = call.query_norms, *call.document_norms.split(counts)
    gradients = call.dqueries, *((None, None) if call.ddocuments is None else call.ddocuments.split(counts))
    return tuple(
        through_norm(gradient, x, norm, factor) if need and x is not None else None
        for gradient, x, norm, need in zip(gradients, call[1:4], norms, call.needed, strict=True)
    )


def through_norm(gradient: Tensor, x: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
    """factor times the gradient of x, from that of x / norm."""
    gradient, direction = gradient.to(norm.dtype), x.to(norm.dtype) / norm
    # A norm that was replaced by ε is a constant.
    along = torch.where(norm > EPS, (gradient * direction).sum(1, keepdim=True), 0)
    result = torch.addcmul(gradient, along, direction, value=-1, out=direction).mul_(factor / norm)
    return result.to(x.dtype).contiguous()
