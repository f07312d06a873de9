"""Where fastlm's own commands compute. (Everything below them computes where its tensors are.)"""

import re

import torch

from fastlm.ops.boundary import mismatch


def choose_device(name: str = "auto") -> torch.device:
    """auto: the GPU, where PyTorch finds one, else the CPU; cpu, cuda (PyTorch's current GPU) and cuda:1 are what they say. ROCm's GPUs are cuda too.

    Raises:
        ValueError: another name, or a GPU that is not there.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", name)
    if found is None:
        raise mismatch("device", "auto, cpu, cuda or one of several GPUs as cuda:1", repr(name))
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not available:
        built = torch.version.cuda or torch.version.hip
        why = f"PyTorch {torch.__version__} {'finds no GPU' if built else 'is built for CPUs alone'}"
        raise mismatch("device", f"auto or cpu, as {why}", repr(name))
    count = torch.cuda.device_count()
    if found[1] is not None and int(found[1]) >= count:
        raise mismatch(
            "device", f"a GPU from cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0, the only GPU", repr(name)
        )
    return torch.device(name)
