"""The operator that CONTRIBUTING.md adds works as it stands there, in Python and in C++."""

import shutil
import subprocess
import sys
import sysconfig

from fastlm.backends import isa
from tests.snippets import CONTRIBUTING, ROOT, blocks

PYTHON_FILES = ("spec.py", "reference.py", "autograd.py", "api.py", "cpu.py")
CPP_FILES = ("cpu/relu_squared.h", "bindings/relu_squared.cpp")
INIT = "from fastlm.ops.relu_squared.api import relu_squared\n"

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, fastlm, fastlm.ops
fastlm.ops.__path__.append(sys.argv[1] + "/ops")
if sys.argv[2] == "cpu":
    import _cpu_example
    from fastlm.backends import cpu
    for name in ("relu_squared_forward", "relu_squared_backward"):
        setattr(cpu.kernels, name, getattr(_cpu_example, name))
fastlm.ops.discover()
from fastlm.ops.relu_squared import relu_squared

x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(relu_squared, x) and torch.autograd.gradgradcheck(relu_squared, x)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    whole = torch.randn(33, 70).to(dtype)
    for x in (whole, whole[:, 1:40], whole.T, whole[:0], torch.full((3,), float("nan"), dtype=dtype)):
        x = x.detach().requires_grad_()
        results = []
        for backend in ("reference", sys.argv[2]):
            y = relu_squared(x, backend=backend)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        for expected, got in zip(*results):
            torch.testing.assert_close(got, expected, equal_nan=True)
compiled = torch.compile(relu_squared, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(whole), relu_squared(whole))
"""


def write(folder):
    """The files of the guide, in the folders that it names."""
    python, cpp = blocks(CONTRIBUTING, "python"), blocks(CONTRIBUTING, "cpp")
    package = folder / "ops" / "relu_squared"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(INIT)
    for name, text in zip(PYTHON_FILES, python, strict=True):
        (package / name).write_text(text)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, text in zip(CPP_FILES, cpp, strict=True):
        (folder / "csrc" / name).write_text(text)
    return package


def check(folder, backend):
    done = subprocess.run([sys.executable, "-c", CHECK, folder, backend], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operator(tmp_path):
    package = write(tmp_path)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if isa.kernels is None or compiler is None:
        (package / "cpu.py").unlink()
        return check(tmp_path, "reference")
    bindings = tmp_path / "csrc" / "bindings"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fopenmp", "-DFASTLM_MODULE=_cpu_example", "-Wall", "-Werror"]
    module = tmp_path / f"_cpu_example{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [bindings / "relu_squared.cpp", bindings / "module.cpp"]
    subprocess.run([compiler, *flags, "-I", sysconfig.get_path("include"), *sources, "-o", module], check=True)
    check(tmp_path, "cpu")
