"""The operator that CONTRIBUTING.md adds works as it stands there, in Python and in C++."""

import shutil
import subprocess
import sys
import sysconfig

import pytest

from fastlm.backends import isa
from tests.snippets import CONTRIBUTING, ROOT, blocks

PACKAGE = "ops/relu_squared"
MATRIX = "tests/ops/matrix/relu_squared.py"
PYTHON_FILES = (
    *(f"{PACKAGE}/{name}.py" for name in ("spec", "reference", "autograd", "api")),
    MATRIX,
    *(f"{PACKAGE}/{name}.py" for name in ("cpu", "bench")),
)
CPP_FILES = ("cpu/relu_squared.h", "bindings/relu_squared.cpp")
INIT = "from fastlm.ops.relu_squared.api import relu_squared\n"

# Makes the operator of a folder part of the package, as if its files were in the tree.
ADD = """
import sys
folder, backend = sys.argv[1:]
sys.path.append(folder)
import torch, fastlm, fastlm.ops
fastlm.ops.__path__.append(folder + "/ops")
if backend == "cpu":
    import _cpu_example
    from fastlm.backends import cpu
    for name in ("relu_squared_forward", "relu_squared_backward"):
        setattr(cpu.kernels, name, getattr(_cpu_example, name))
fastlm.ops.discover()
from fastlm.ops.relu_squared import relu_squared
"""

COMPUTE = """
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(relu_squared, x) and torch.autograd.gradgradcheck(relu_squared, x)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    whole = torch.randn(33, 70).to(dtype)
    for x in (whole, whole[:, 1:40], whole.T, whole[:0], torch.full((3,), float("nan"), dtype=dtype)):
        x = x.detach().requires_grad_()
        results = []
        for name in ("reference", backend):
            y = relu_squared(x, backend=name)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        for expected, got in zip(*results):
            torch.testing.assert_close(got, expected, equal_nan=True)
compiled = torch.compile(relu_squared, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(whole), relu_squared(whole))
"""


def write(folder):
    """The files of the guide, in the folders that it names."""
    python, cpp = blocks(CONTRIBUTING, "python"), blocks(CONTRIBUTING, "cpp")
    package = folder / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(INIT)
    (folder / MATRIX).parent.mkdir(parents=True)
    for name, text in zip(PYTHON_FILES, python, strict=True):
        (folder / name).write_text(text)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, text in zip(CPP_FILES, cpp, strict=True):
        (folder / "csrc" / name).write_text(text)
    return package


# What finds it without being told: the report, backend selection, the test matrix and the benchmark.
REPORT = """
implemented = fastlm.info().operators["relu_squared"]
assert implemented == (["cpu"] if backend == "cpu" else []) + ["reference"], implemented
y = relu_squared(torch.ones(3, requires_grad=True))
assert y.grad_fn.backend.backend.name == backend
try:
    relu_squared(torch.ones(3), backend="torch")
except fastlm.Unsupported as refused:
    assert "torch does not implement relu_squared" in str(refused)
"""

MATRIX_RUN = """
import pytest
import tests.ops.matrix.relu_squared  # of the folder; pytest itself looks below the project only
tests = ["tests/ops/test_every_operator.py", "-k", "relu_squared and not triton", "-p", "no:cacheprovider", "-n", "0"]
assert pytest.main(["-q", *tests]) == 0
"""

BENCHMARK = """
from fastlm.cli import main
sys.argv = ["fastlm", "bench", "--operators", "relu_squared", "--seconds", "0.1"]
main()
"""


def run(folder, backend, code):
    command = [sys.executable, "-W", "ignore", "-c", ADD + code, folder, backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder, backend):
    run(folder, backend, COMPUTE)
    run(folder, backend, REPORT)
    assert " passed" in run(folder, backend, MATRIX_RUN)
    assert "relu_squared" in run(folder, backend, BENCHMARK)


@pytest.mark.slow
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
