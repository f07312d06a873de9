"""The CUDA C++ kernels: tensors become addresses, sizes and strides here, and nowhere else.

Under FASTLM_CUDA_EMULATION=1 the same sources, compiled for the CPU (`python -m tests.cuda_emulation`), serve CPU tensors: that is how they are tested
where there is no GPU, and there every access is checked against the extents of the tensors of a call.
"""

import functools
import importlib
import os
from types import ModuleType

import torch

from fastlm.backends import isa
from fastlm.backends import torch as native
from fastlm.backends.gpu import DTYPES, FURTHEST

EMULATED = os.environ.get("FASTLM_CUDA_EMULATION") == "1"
LOGITS_BYTES = 64 << 20  # of one chunk


def find() -> tuple[ModuleType | None, str]:
    """(module, why there is none)."""
    try:
        return importlib.import_module("fastlm._cuda_emulated" if EMULATED else "fastlm._cuda"), ""
    except ModuleNotFoundError:
        if EMULATED:
            return None, "is not built for the CPU: run python -m tests.cuda_emulation in a checkout"
        return None, f"is not compiled here: {isa.report().get('cuda', {}).get('reason') or 'the extension was not built'}"
    except ImportError as broken:  # built, but for another Python or with a library that is missing
        return None, f"does not load ({broken})"


kernels, missing = find()
LAUNCHED_AS = {dtype: getattr(kernels.dtype, str(dtype).removeprefix("torch.")) for dtype in DTYPES} if kernels else {}


def version(number: int) -> str:
    """13.0 of CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def unavailable():
    if kernels is None:
        return [missing]
    if EMULATED:
        return []
    if torch.version.hip:
        return ["serves NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]
    runtime, driver = kernels.runtime_version(), kernels.driver_version()
    if not driver:
        return ["finds no NVIDIA driver"]
    if driver // 1000 < runtime // 1000:  # of one major version, older drivers run what newer compilers made
        return [f"needs a driver for CUDA {runtime // 1000}.0 or later, and this one serves up to {version(driver)}"]
    return [] if torch.cuda.is_available() else ["finds no GPU (torch.cuda.is_available() is false)"]


def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Code runs on its own architecture and on later minor ones of the same major; the PTX of the last becomes code for whatever is later still."""
    built = [int(arch) for arch in archs.split(",")]
    major, minor = capability
    return any(arch // 10 == major and arch % 10 <= minor for arch in built) or major * 10 + minor >= built[-1]


@functools.cache
def unfit(index):
    """Why a GPU cannot run the kernels."""
    capability = torch.cuda.get_device_capability(index)
    if runs_on(capability, kernels.archs):
        return []
    return [f"is compiled for sm_{kernels.archs.replace(',', ', sm_')}, and {torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}"]


def refuses(operator, device, dtype, **features):
    reasons = list(unavailable())
    if reasons:
        return reasons
    # One launcher for batches of every kind; linear is the vendor's.
    if operator != "linear" and not hasattr(kernels, f"{operator.removesuffix('_varlen')}_forward"):
        reasons.append(f"has no {operator}")
    if device.type != ("cpu" if EMULATED else "cuda"):
        reasons.append(f"serves CPU tensors under FASTLM_CUDA_EMULATION=1, not {device}" if EMULATED else f"serves CUDA tensors, not {device}")
    elif device.type == "cuda":
        reasons += unfit(torch.cuda.current_device() if device.index is None else device.index)
    if dtype not in DTYPES:
        reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    if operator == "attention" and max(features["query_len"], features["key_len"]) > FURTHEST:
        reasons.append(f"counts up to {FURTHEST} queries and keys, not {max(features['query_len'], features['key_len'])}")
    if operator == "attention_varlen" and features["query_tokens"] > FURTHEST:
        reasons.append(f"counts up to {FURTHEST} tokens, not {features['query_tokens']}")
    return reasons


def address(tensor, writable=False):
    """The address of a tensor that a launch reads, 0 for none. In the emulator it also permits what the next launch may touch: these elements alone."""
    if tensor is None:
        return 0
    pointer = tensor.data_ptr()
    if EMULATED:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        kernels.allow(pointer, (last + 1) * tensor.element_size() if tensor.numel() else 0, writable)
    return pointer


def written(tensor):
    """The address of a tensor that a launch writes, 0 for none."""
    return address(tensor, writable=True)


def queue(x):
    """(device, stream): where the launches of a call on x go, which is where PyTorch's own would."""
    if EMULATED:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


# linear: the vendor's GEMM


linear_forward, linear_backward = native.linear_forward, native.linear_backward


# layernorm_residual


# gelu_mlp


# linear_cross_entropy


# attention
