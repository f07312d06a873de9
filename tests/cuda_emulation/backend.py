"""Makes fastlm's cuda backend run on the CPU, on the emulated kernels."""

import ctypes
import importlib

import pytest

from fastlm.backends import cuda


def install() -> None:
    """Hands the emulated module to the backend. Each launch may then access the tensors of its arguments only."""
    try:
        module = importlib.import_module("fastlm._cuda_emulated")
    except ModuleNotFoundError:
        raise pytest.UsageError(
            "FASTLM_CUDA_EMULATION=1 needs fastlm/_cuda_emulated: run python -m tests.cuda_emulation"
        ) from None
    cuda.use_module(module, accepts="cpu")
    library = ctypes.CDLL(module.__file__)
    allow, forget = library.fastlm_emulation_allow, library.fastlm_emulation_forget
    launch = cuda.launch

    def address(tensor, writable=False):
        if tensor is None:
            return 0
        pointer = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = (last + 1) * tensor.element_size() if tensor.numel() else 0
        allow(ctypes.c_void_p(pointer), ctypes.c_size_t(extent), writable)
        return pointer

    def launch_once(*arguments):
        try:
            launch(*arguments)
        finally:
            forget()

    cuda.address, cuda.launch = address, launch_once
