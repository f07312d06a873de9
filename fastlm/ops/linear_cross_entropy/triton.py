"""linear_cross_entropy by the Triton kernel (kernels/linear_cross_entropy.py) and the vendor's GEMM."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import as_rows
from fastlm.kernels import linear_cross_entropy as kernels
from fastlm.ops.linear_cross_entropy.gpu import (
    gradients_of_product,
    logits_bytes,
    row_scales,
    rows_of,
    workspace,
)
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_cross_entropy.spec import Forward


@no_autocast
def forward(call: Forward):
    x, target = call.x, call.target
    check_targets(target, call.weight.shape[0], call.ignore_index)  # on a GPU the kernel asserts
    targets, row_scale = target.reshape(-1), row_scales(call)
    loss = x.new_empty(targets.shape, dtype=torch.float32)

    def gradient(rows, logits, partials):
        scale = None if row_scale is None else rows_of(row_scale, rows)
        parts = rows_of(targets, rows), scale, rows_of(loss, rows)
        arguments = logits, *parts, workspace(logits, partials), partials
        with on_device(x):
            kernels.linear_cross_entropy(*arguments, *call.settings(), x.device.index)

    dx, dweight, dbias = gradients_of_product(
        as_rows(x), call.weight, call.bias, call.needed, logits_bytes(x.device.index), kernels.num_partials, gradient
    )
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


implementation = Implementation(triton.backend, forward)
