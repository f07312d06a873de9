"""Makes fastlm's cuda backend run on the CPU, on the emulated kernels."""

import ctypes
import importlib

import pytest
import torch

from fastlm.backends import cuda

# The arguments that each function writes. It may read the others only.
WRITTEN = {
    "attention_forward": {"out", "lse"},
    "attention_decode": {"out", "lse", "partial_out", "partial_max", "partial_sum"},
    "attention_backward": {"delta", "dquery", "dkey", "dvalue", "dmask"},
    "gelu_mlp_forward": {"hidden", "activated"},
    "gelu_mlp_backward": {"dhidden", "activated"},
    "glu_mlp_forward": {"up", "activated"},
    "glu_mlp_backward": {"dgate", "dup", "activated"},
    "layernorm_residual_forward": {"y", "summed", "mean", "rstd"},
    "layernorm_residual_backward": {"dx", "dresidual", "dweight", "dbias", "partials"},
    "rms_norm_residual_forward": {"y", "summed", "rstd"},
    "rotary": {"out"},
    "rms_norm_residual_backward": {"dx", "dresidual", "dweight", "partials"},
    "linear_cross_entropy_forward": {"loss", "partials", "shifted_sums", "target_logits"},
    "linear_cross_entropy_gradient": {"logits", "loss", "statistics", "dbias_partials"},
    "linear_log_prob_forward": {"log_prob", "entropy", "row_max", "row_sum"},
    "linear_log_prob_backward": {"logits", "dbias_partials"},
}


def extent(tensor: torch.Tensor) -> int:
    """The bytes from the tensor's first to its last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Emulated:
    """The functions of the emulated module. Each call may access the elements of its own tensors only."""

    def __init__(self, module):
        self.module, library = module, ctypes.CDLL(module.__file__)
        self.allow, self.forget = library.fastlm_emulation_allow, library.fastlm_emulation_forget

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in WRITTEN:
            return function

        def checked(**arguments):
            try:
                for key, value in arguments.items():
                    if torch.is_tensor(value):
                        pointer, size = ctypes.c_void_p(value.data_ptr()), ctypes.c_size_t(extent(value))
                        self.allow(pointer, size, key in WRITTEN[name])
                return function(**arguments)
            finally:
                self.forget()

        return checked


def install() -> None:
    """Hands the emulated module to the backend."""
    try:
        module = importlib.import_module("fastlm._cuda_emulated")
    except ModuleNotFoundError:
        raise pytest.UsageError(
            "FASTLM_CUDA_EMULATION=1 needs fastlm/_cuda_emulated: run python -m tests.cuda_emulation"
        ) from None
    cuda.use_module(Emulated(module), accepts="cpu")
