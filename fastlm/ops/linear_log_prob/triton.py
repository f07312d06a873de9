"""linear_log_prob by the Triton kernels (kernels/linear_log_prob.py) and the vendor's GEMM."""

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device
from fastlm.core.autocast import no_autocast
from fastlm.kernels import linear_log_prob as kernels
from fastlm.ops.linear_cross_entropy.gpu import logits_bytes
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_log_prob import gpu
from fastlm.ops.linear_log_prob.spec import Backward, Forward


@no_autocast
def forward(call: Forward):
    check_targets(call.target, call.weight.shape[0], call.ignore_index)  # on a GPU the kernel asserts

    def statistics(logits, target, results):
        with on_device(call.x):
            kernels.linear_log_prob_forward(logits, target, *results.values(), *call.settings(), call.x.device.index)

    return gpu.forward(call, logits_bytes(call.x.device.index), statistics)


@no_autocast
def backward(call: Backward):
    def gradient(logits, target, given, partials):
        with on_device(call.x):
            kernels.linear_log_prob_backward(
                logits, target, *given.values(), partials, *call.settings(), call.x.device.index
            )

    return gpu.backward(call, logits_bytes(call.x.device.index), kernels.num_partials, gradient)


implementation = Implementation(triton.backend, forward, backward)
