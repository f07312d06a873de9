"""The backend `triton`: the Triton kernels (kernels/), for NVIDIA and AMD GPUs."""

import functools
import importlib.util
import os
import pathlib
import sys

import torch

from fastlm.backends.gpu import DTYPES

# What PyTorch 2.10 brings. Triton 3.5 does not compile the gradients of packed attention, whose asynchronous copies are
# of less than 4 bytes.
MIN_VERSION = (3, 6)
MIN_SHARED_MEMORY = 64 << 10  # bytes of a program: no tile of the tables takes less

INTERPRETED = ("1", "true", "yes", "on", "y")  # what Triton takes for yes in TRITON_INTERPRET

device_type = "cuda"  # of the tensors that the kernels accept


def accept(other: str) -> None:
    """Launch the kernels on tensors of another device type, with the configurations of that name."""
    global device_type
    device_type = other
    architecture.cache_clear()


def find_kernels_in_checkout() -> None:
    """In a checkout that is not installed the kernels are beside the package: let fastlm.kernels find them there."""
    root = pathlib.Path(__file__).parents[2]
    if importlib.util.find_spec("fastlm.kernels") is None and (root / "kernels").exists() and (root / "csrc").exists():
        sys.modules["fastlm"].__path__.append(str(root))


find_kernels_in_checkout()


@functools.cache
def missing() -> str:
    """Why there is no usable Triton, or ""."""
    try:
        import triton
    except ImportError as error:
        return (
            f"needs Triton, which cannot be imported ({error}); PyTorch for CUDA or ROCm brings it, else: "
            "pip install triton"
        )
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_VERSION:
        oldest = ".".join(map(str, MIN_VERSION))
        return f"needs Triton {oldest} or later, not {triton.__version__}; a newer PyTorch brings it"
    return ""


@functools.cache
def architecture(index: int | None) -> str:
    """sm_80, gfx942, … of a GPU; the device type for None, a device without an index."""
    if index is None:
        return device_type
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@functools.cache
def gpu_refusals(index: int) -> list[str]:
    """Why a GPU cannot run the kernels."""
    reasons, name = [], torch.cuda.get_device_name(index)
    if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        arch = architecture(index)
        reasons.append(f"needs an architecture of sm_80 or later, and {name} is {arch} (auto takes another backend)")
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    shared = shared or getattr(properties, "shared_memory_per_block", MIN_SHARED_MEMORY)
    if shared < MIN_SHARED_MEMORY:
        needed, has = MIN_SHARED_MEMORY >> 10, shared >> 10
        reasons.append(f"needs {needed} KiB of shared memory, and {name} has {has} (auto takes another backend)")
    return reasons


def unfenced(architecture: str, version: str) -> str:
    """Why attention's matrix products may read stale copies on an architecture, or "".

    Matrix instructions of sm_90 to sm_110 read shared memory through another proxy than asynchronous copies write it.
    Before version 3.7.1 Triton leaves out the fence between the two (triton-lang/triton#9610), in 3.8 still in one
    kernel for tcgen05.mma.
    """
    if architecture[:4] not in ("sm_9", "sm_1") or architecture.startswith("sm_12"):
        return ""
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:3])
    if parts >= (3, 7, 1) and (parts[:2] != (3, 8) or architecture.startswith("sm_9")):
        return ""
    needed = "3.7.1 or later" if architecture.startswith("sm_9") else "3.7.1, 3.9 or later"
    return (
        f"needs Triton {needed} on {architecture}, not {version}, which leaves out a fence between a copy and a matrix "
        "product; a newer PyTorch brings it"
    )


@functools.cache
def race_refusals(index: int) -> list[str]:
    """`unfenced` of a GPU and the installed Triton."""
    import triton

    reason = "" if torch.version.hip else unfenced(architecture(index), triton.__version__)
    return [reason] if reason else []


class Triton:
    name = "triton"
    description = "Triton kernels for NVIDIA and AMD GPUs"

    def unavailable(self) -> list[str]:
        if missing():
            return [missing()]
        if device_type != "cuda":
            return []
        if not torch.cuda.is_available():
            return ["finds no GPU (torch.cuda.is_available() is false)"]
        if os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED:
            return ["does not run in Triton's interpreter (unset TRITON_INTERPRET)"]
        return []

    def refuses(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        reasons = []
        if device.type != device_type:
            supported = "CUDA and ROCm" if device_type == "cuda" else device_type.upper()
            reasons.append(f"supports {supported} tensors, not {device} (.to('{device_type}') moves them)")
        elif device.type == "cuda":
            reasons += gpu_refusals(torch.cuda.current_device() if device.index is None else device.index)
        if dtype not in DTYPES:
            reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
        return reasons


backend = Triton()
