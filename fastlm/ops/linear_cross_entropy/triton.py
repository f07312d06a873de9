"""linear_cross_entropy by the Triton kernel (kernels/linear_cross_entropy.py) and the vendor's GEMM."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import as_rows
from fastlm.kernels import linear_cross_entropy as kernels
from fastlm.ops.linear_cross_entropy.gpu import losses_and_gradients
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_cross_entropy.spec import Forward

LOGITS_BYTES = 64 << 20  # of one chunk


@no_autocast
def forward(call: Forward):
    x, target = call.x, call.target
    check_targets(target, call.weight.shape[0], call.ignore_index)  # on a GPU the kernel asserts
    loss = x.new_empty(target.numel(), dtype=torch.float32)

    def gradient(logits, targets, row_scale, losses, statistics, partials):
        arguments = logits, targets, row_scale, losses, statistics, partials
        with on_device(x):
            kernels.linear_cross_entropy(*arguments, *call.settings, x.device.index)

    dx, dweight, dbias = losses_and_gradients(
        call, as_rows(x), target.reshape(-1), loss, LOGITS_BYTES, kernels.num_partials, gradient
    )
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


implementation = Implementation(triton.backend, forward)
