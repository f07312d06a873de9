"""One thread pool: the kernels use the OpenMP runtime that torch has loaded, whatever its file name."""

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

# Loads modules without the Python package, which would import torch; shows the runtimes that the process has mapped.
TOOLS = f"""
import ctypes, glob, importlib.util

def load(*names):
    for name in names:
        (path,) = glob.glob({str(PACKAGE)!r} + f"/_cpu_{{name}}.*.so")
        spec = importlib.util.spec_from_file_location(f"_cpu_{{name}}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

def show_runtimes():
    with open("/proc/self/maps") as maps:
        files = {{line.split()[-1] for line in maps}}
    print(*(file for file in files if any(name in file for name in ("libgom", "libomp", "libiomp"))), sep="\\n")
"""
ISA = fastlm.info().isa


def runtimes_of(code):
    done = subprocess.run([sys.executable, "-c", f"{TOOLS}\n{code}\nshow_runtimes()"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_torch_and_the_kernels_share_one_runtime():
    code = """
import torch, fastlm
torch.set_num_threads(2)
x = torch.randn(4096, 256)
fastlm.layernorm_residual(x, x, torch.ones(256), backend="cpu")
x @ x.T
"""
    (runtime,) = runtimes_of(code)
    assert Path(runtime).is_relative_to(Path(torch.__file__).resolve().parents[1])


@pytest.fixture
def renamed(tmp_path):
    torch_own = [*(Path(torch.__file__).parent / "lib").glob("libgomp*"), ctypes.util.find_library("gomp")]
    path = tmp_path / "libgomX.so.1"
    path.write_bytes(Path(torch_own[0]).read_bytes().replace(b"libgomp.so.1\0", b"libgomX.so.1\0"))
    return str(path)


def test_a_runtime_under_another_name_is_the_one_used(renamed):
    """PyTorch's CUDA wheels contain a renamed libgomp. No second one may be loaded."""
    assert runtimes_of(f"ctypes.CDLL({renamed!r}, mode=ctypes.RTLD_GLOBAL); load('features', {ISA!r})") == [renamed]


def test_a_runtime_whose_symbols_are_not_global_is_the_one_used(renamed):
    """PyTorch's wheels for Arm load libgomp for their own libraries only."""
    code = f"""
ctypes.CDLL({renamed!r})
share = importlib.util.spec_from_file_location("openmp", {str(PACKAGE / "backends/openmp.py")!r})
openmp = importlib.util.module_from_spec(share)
share.loader.exec_module(openmp)
openmp.share({renamed!r})
load('features', {ISA!r})
"""
    assert runtimes_of(code) == [renamed]


def test_a_torch_without_any_runtime_gets_the_compilers():
    assert len(runtimes_of(f"load('features', {ISA!r})")) == 1
