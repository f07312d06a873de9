"""Selects the device of the commands and of training. (Operators and models compute on the device of their tensors.)"""

import re

import torch

from fastlm.core.errors import did_you_mean, mismatch


def choose_device(name: str = "auto") -> torch.device:
    """The device for a name: auto, cpu, cuda or cuda:N.

    "auto" is a GPU if PyTorch finds one, else the CPU. "cuda" is PyTorch's current GPU. ROCm also names its GPUs cuda.

    Raises:
        ValueError: the name is invalid, or there is no such GPU.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", name)
    if found is None:
        meant = did_you_mean("cuda" if "gpu" in name.lower() else name, ("auto", "cpu", "cuda"))
        raise mismatch("device", "auto, cpu, cuda or cuda:N", f"{name!r}{meant}")
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not available:
        built = torch.version.cuda or torch.version.hip
        reason = f"PyTorch {torch.__version__} {'finds no GPU' if built else 'is built without GPU support'}"
        raise mismatch("device", f"auto or cpu, as {reason}", repr(name))
    count = torch.cuda.device_count()
    if found[1] is not None and int(found[1]) >= count:
        raise mismatch(
            "device", f"a GPU from cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0, the only GPU", repr(name)
        )
    return torch.device(name)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seeds the default generator of a CPU or GPU.

    torch.manual_seed, which seeds those of all devices, takes up to a third of a millisecond: it formats a stack trace
    for each kind of device that the process does not use.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)
