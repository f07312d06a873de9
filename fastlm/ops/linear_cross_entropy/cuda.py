"""linear_cross_entropy by the CUDA kernels (csrc/cuda/linear_cross_entropy.cu) and the vendor's GEMM.

Without gradients the loss is the epilogue of one product, and no logits are stored.
"""

import torch
from torch import Tensor

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device, precision, vector
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import as_rows, unit_stride_matrix
from fastlm.ops.linear_cross_entropy.gpu import gradients_of_product, logits_bytes, row_scales, workspace
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_cross_entropy.spec import Forward


def num_partials(rows: int) -> int:
    return cuda.kernels.linear_cross_entropy_num_partials(rows=rows)


@no_autocast
def forward(call: Forward):
    x, target = call.x, call.target
    check_targets(target, call.weight.shape[0], call.ignore_index)  # on a GPU the kernels assert
    x_rows, targets, row_scale = as_rows(x), target.reshape(-1), row_scales(call)
    loss = x.new_empty(targets.shape, dtype=torch.float32)

    def gradient(rows, logits, partials):
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.linear_cross_entropy_gradient(
                logits=logits,
                target=targets[rows],
                row_scale=row_scale[rows],
                loss=loss[rows],
                statistics=workspace(logits, partials),
                dbias_partials=partials,
                ignore_index=call.ignore_index,
                label_smoothing=call.label_smoothing,
                logit_scale=call.logit_scale,
                softcap=call.softcap,
                device=device,
                stream=stream,
            )

    dx = dweight = dbias = None
    if any(call.needed):
        dx, dweight, dbias = gradients_of_product(
            x_rows, call.weight, call.bias, call.needed, logits_bytes(x.device.index), num_partials, gradient
        )
    else:
        losses(call, x_rows, targets, loss)
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


def losses(call: Forward, x: Tensor, targets: Tensor, loss: Tensor) -> None:
    """Fill loss (rows,) by chunks of rows."""
    weight, bias, rows = unit_stride_matrix(call.weight), vector(call.bias), x.shape[0]
    num_splits = cuda.kernels.linear_cross_entropy_num_splits(dtype=x.dtype, vocab=weight.shape[0])
    chunk = min(rows, max(1, logits_bytes(x.device.index) // (num_splits * 3 * 4)))
    for begin in range(0, rows, max(1, chunk)):
        x_chunk, target, result = (t[begin : begin + chunk] for t in (x, targets, loss))
        count = x_chunk.shape[0]
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.linear_cross_entropy_forward(
                x=x_chunk,
                weight=weight,
                bias=bias,
                target=target,
                loss=result,
                partials=loss.new_empty(num_splits, count, 2),
                shifted_sums=loss.new_empty(num_splits, count) if call.label_smoothing else None,
                target_logits=loss.new_empty(count),
                ignore_index=call.ignore_index,
                label_smoothing=call.label_smoothing,
                logit_scale=call.logit_scale,
                softcap=call.softcap,
                tf32=precision(x) == "tf32",
                device=device,
                stream=stream,
            )


implementation = Implementation(cuda.backend, forward)
