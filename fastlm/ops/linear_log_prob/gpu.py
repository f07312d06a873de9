"""What triton and cuda share: the loop over chunks of logits around their kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.core.layout import as_rows
from fastlm.ops.linear_cross_entropy.gpu import chunks_of_logits, gradients_of_product, rows_of
from fastlm.ops.linear_log_prob.spec import Backward, Forward


def forward(call: Forward, chunk_bytes: int, statistics: Callable[[Tensor, Tensor, dict[str, Tensor]], None]):
    """The results of a call. statistics(logits, target, results) fills those of the rows of a chunk."""
    target = call.target.reshape(-1)
    names = "log_prob", "entropy", "row_max", "row_sum"
    results = {name: call.x.new_empty(target.shape, dtype=torch.float32) for name in names}
    for rows, logits in chunks_of_logits(as_rows(call.x), call.weight, call.bias, chunk_bytes):
        statistics(logits, rows_of(target, rows), {name: rows_of(result, rows) for name, result in results.items()})
    return tuple(result.view(call.target.shape) for result in results.values())


def backward(
    call: Backward,
    chunk_bytes: int,
    num_partials: Callable[[int], int],
    gradient: Callable[[Tensor, Tensor, dict[str, Tensor | None], Tensor | None], None],
):
    """The needed gradients of a call. gradient(logits, target, given, partials) is as in gradients_of_product."""
    target = call.target.reshape(-1)
    names = "dlog_prob", "dentropy", "entropy", "row_max", "row_sum"
    given = {name: d if (d := getattr(call, name)) is None else d.reshape(-1).contiguous() for name in names}

    def of_rows(rows: slice, logits: Tensor, partials: Tensor | None) -> None:
        parts = {name: d if d is None else rows_of(d, rows) for name, d in given.items()}
        gradient(logits, rows_of(target, rows), parts, partials)

    dx, dweight, dbias = gradients_of_product(
        as_rows(call.x), call.weight, call.bias, call.needed, chunk_bytes, num_partials, of_rows
    )
    return dx if dx is None else dx.view(call.x.shape), dweight, dbias
