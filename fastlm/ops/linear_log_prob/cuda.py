"""linear_log_prob by the CUDA kernels (csrc/cuda/linear_log_prob.cu) and the vendor's GEMM."""

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear_cross_entropy.cuda import num_partials
from fastlm.ops.linear_cross_entropy.gpu import logits_bytes
from fastlm.ops.linear_cross_entropy.reference import check_targets
from fastlm.ops.linear_log_prob import gpu
from fastlm.ops.linear_log_prob.spec import Backward, Forward


def arguments(call: Forward | Backward):
    """What both kernels take besides tensors."""
    device, stream = cuda.device_and_stream(call.x)
    return {**call.settings()._asdict(), "device": device, "stream": stream}


@no_autocast
def forward(call: Forward):
    check_targets(call.target, call.weight.shape[0], call.ignore_index)  # on a GPU the kernel asserts

    def statistics(logits, target, results):
        with on_device(call.x):
            cuda.kernels.linear_log_prob_forward(logits=logits, target=target, **results, **arguments(call))

    return gpu.forward(call, logits_bytes(call.x.device.index), statistics)


@no_autocast
def backward(call: Backward):
    def gradient(logits, target, given, partials):
        with on_device(call.x):
            cuda.kernels.linear_log_prob_backward(
                logits=logits, target=target, **given, dbias_partials=partials, **arguments(call)
            )

    return gpu.backward(call, logits_bytes(call.x.device.index), num_partials, gradient)


implementation = Implementation(cuda.backend, forward, backward)
