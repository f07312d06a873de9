"""The stub of the CUDA driver (stub_libcuda.c), and PyTorch without a GPU as if it had one H100."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
CARD = "an H100 that is a stub"


def compile_stub(folder: Path) -> dict[str, str]:
    """Compiles the stub into a folder; the environment of a process that uses it."""
    nvidia = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia"
    command = ["gcc", "-shared", "-fPIC", f"-I{nvidia / 'include'}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(HERE / "stub_libcuda.c"), "-o", str(folder / "libcuda.so.1")], check=True)
    return {
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),  # a launcher linked with the stub must not be used on a GPU later
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
    }


def pretend() -> None:
    """Makes the backend triton take CPU tensors as if they were on an H100, and the stub its launches."""
    import torch

    from tests.kernels import launches

    launches.drive(Path(os.environ["TRITON_LIBCUDA_PATH"]), count=False)
    properties = types.SimpleNamespace(
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=227 << 10,
        total_memory=80 << 30,
    )
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda index=None: CARD
    torch.cuda.get_device_properties = lambda index=None: properties
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *arguments: None

    from fastlm.backends import cuda, triton
    from tests.kernels.support import set_architecture

    triton.Triton.unavailable = lambda self: []
    triton.Triton.refuses = lambda self, device, dtype: []
    triton.gpu_refusals = lambda index: []
    cuda.Cuda.unavailable = lambda self: ["does not run on a stub of the driver"]
    set_architecture(setattr, "sm_90")
