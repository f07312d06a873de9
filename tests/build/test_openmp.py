"""One pool of threads: the kernels run on the OpenMP runtime that torch brought, whatever it is called."""

import ctypes.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm

if fastlm.info().build:
    pytest.skip(f"nothing is compiled here: {fastlm.info().build}", allow_module_level=True)
if sys.platform != "linux" or not fastlm.info().openmp:
    pytest.skip("built without OpenMP, or not for Linux", allow_module_level=True)

PACKAGE = Path(fastlm.__file__).parent
MAPPED = "{line.split()[-1] for line in open('/proc/self/maps') if any(name in line for name in ('libgomp', 'libgomX', 'libomp', 'libiomp'))}"

# The kernels without Python's side of the package, which would import torch. philox_keep fills (rows, cols) bytes with several threads.
LOAD = f"""
import ctypes, importlib.util, glob
def load(name):
    (path,) = glob.glob({str(PACKAGE)!r} + "/" + name + ".*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_torch_and_the_kernels_share_one_runtime():
    code = f"""
import torch, fastlm
torch.set_num_threads(2)
x = torch.randn(4096, 256)
fastlm.layernorm_residual(x, x, torch.ones(256), backend="cpu")
x @ x.T
print(*{MAPPED}, sep="\\n")
"""
    (runtime,) = run(code)
    assert Path(runtime).is_relative_to(Path(torch.__file__).resolve().parents[1])


def test_a_runtime_under_another_name_is_the_one_used(tmp_path):
    """PyTorch's wheels with CUDA carry a libgomp that was renamed. No second one may be loaded beside it."""
    original = ctypes.util.find_library("gomp")
    torch_own = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    renamed = tmp_path / "libgomX.so.1"
    renamed.write_bytes((torch_own or [Path(original)])[0].read_bytes().replace(b"libgomp.so.1\0", b"libgomX.so.1\0"))
    mapped = run(
        f"{LOAD}\nctypes.CDLL({str(renamed)!r}, mode=ctypes.RTLD_GLOBAL)\nload('_cpu_features'); load('_cpu_{fastlm.info().isa}')\nprint(*{MAPPED}, sep='\\n')"
    )
    assert mapped == [str(renamed)]


def test_a_torch_without_any_runtime_gets_the_compilers():
    assert len(run(f"{LOAD}\nload('_cpu_features'); load('_cpu_{fastlm.info().isa}')\nprint(*{MAPPED}, sep='\\n')")) == 1
