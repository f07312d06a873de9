"""The backend `cuda`: the CUDA C++ kernels (csrc/cuda/), for NVIDIA GPUs."""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import isa
from fastlm.backends.gpu import DTYPES

MIN_ARCH = 80  # the kernels use mma.sync of bfloat16 and cp.async
MIN_DRIVERS = {12: "525", 13: "580"}  # what NVIDIA states for a major version of CUDA


def find() -> tuple[ModuleType | None, str]:
    """(module, why there is none)."""
    try:
        return importlib.import_module("fastlm._cuda"), ""
    except ModuleNotFoundError:
        reason = isa.report().get("cuda", {}).get("reason") or "the extension was not built"
        return None, f"is not compiled here: {reason}"
    except ImportError as error:  # built, but for another Python or with a missing library
        return None, f"does not load ({error})"


kernels: Any
kernels, missing = find()
device_type = "cuda"  # of the tensors that the kernels accept


def use_module(module: ModuleType, accepts: str = "cuda") -> None:
    """Launch the kernels of a module with the functions of fastlm._cuda that accepts tensors of another device type."""
    global kernels, device_type
    kernels, device_type = module, accepts
    unavailable.cache_clear()


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """Where PyTorch launches kernels on x: the index of the device and the address of its current stream."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def version(number: int) -> str:
    """13.0 of CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def summary() -> str:
    """One line for fastlm.info(): what the module was built for."""
    if kernels is None:
        return missing.removeprefix("is ")
    number = isa.report().get("cuda", {}).get("version", "") or version(kernels.runtime_version())
    major = number.partition(".")[0]
    driver = MIN_DRIVERS.get(int(major))
    needed = f"a driver for CUDA {major}{f' ({driver} or later)' if driver else ''}"
    archs = kernels.archs.replace(",", ", sm_")
    return f"CUDA {number}, code for sm_{archs} and PTX for later ones; needs {needed}"


@functools.cache
def unavailable() -> list[str]:
    if kernels is None:
        return [missing]
    if device_type != "cuda":  # neither a GPU nor a driver is needed
        return []
    if torch.version.hip:
        return ["supports NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]
    runtime, driver = kernels.runtime_version(), kernels.driver_version()
    if not driver:
        return ["finds no NVIDIA driver"]
    if driver // 1000 < runtime // 1000:  # drivers of one major version run what newer compilers of it produced
        return [f"needs a driver for CUDA {runtime // 1000}.0 or later, and this one supports up to {version(driver)}"]
    return [] if torch.cuda.is_available() else ["finds no GPU (torch.cuda.is_available() is false)"]


@functools.cache
def gpu_refusals(index: int) -> list[str]:
    """Why a GPU cannot run the kernels."""
    major, minor = torch.cuda.get_device_capability(index)
    arch, name = major * 10 + minor, torch.cuda.get_device_name(index)
    if arch < MIN_ARCH:
        needed = f"needs an architecture of sm_{MIN_ARCH} or later"
        return [f"{needed}, and {name} is sm_{arch} (auto takes another backend)"]
    if arch < int(kernels.archs.split(",")[0]):  # there is neither code nor PTX for it
        compiled = f"is compiled for sm_{kernels.archs.replace(',', ', sm_')} and later, and {name} is sm_{arch}"
        return [f"{compiled} (FASTLM_BUILD_CUDA=1 FASTLM_CUDA_ARCHS={arch} pip install builds it for that)"]
    return []


class Cuda:
    name = "cuda"
    description = "CUDA C++ kernels for NVIDIA GPUs"

    def unavailable(self) -> list[str]:
        return unavailable()

    def refuses(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        reasons = []
        if device.type != device_type:
            reasons.append(f"supports CUDA tensors, not {device} (.to('cuda') moves them)")
        elif device.type == "cuda":
            reasons += gpu_refusals(torch.cuda.current_device() if device.index is None else device.index)
        if dtype not in DTYPES:
            reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
        return reasons


backend = Cuda()
