"""Which compiled module is used, and what happens without one. In subprocesses, as it is decided at import."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastlm
from fastlm.backends import isa

PACKAGE = Path(fastlm.__file__).parent
BUILT = [name for name in isa.ISAS if list(PACKAGE.glob(f"_cpu_{name}.*.so"))]
USABLE = [name for name in BUILT if name in isa.usable()]


def run(code, path=PACKAGE.parent, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTLM")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env=kept | {"PYTHONPATH": str(path)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", USABLE)
def test_each_module_can_be_selected(name):
    code = """
import torch
import fastlm
x = torch.eye(3)
assert torch.equal(fastlm.linear(x, x, backend="cpu"), x)
print(fastlm.info().isa)
"""
    done = run(code, FASTLM_ISA=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.skipif(not USABLE, reason="nothing is compiled here")
def test_the_fastest_usable_module_is_selected():
    assert (
        run("import fastlm; print(fastlm.info().isa)").stdout.strip()
        == isa.by_speed(USABLE, isa.features().vendor())[0]
    )


def test_modules_with_a_slow_bf16_dot_product_come_later():
    assert isa.by_speed(["avx512_bf16", "avx512", "avx2"], "GenuineIntel") == ["avx512", "avx512_bf16", "avx2"]
    assert isa.by_speed(["amx", "avx512_bf16", "avx512", "avx2"], "GenuineIntel") == [
        "amx",
        "avx512",
        "avx512_bf16",
        "avx2",
    ]
    assert isa.by_speed(["avx512_bf16", "avx512", "avx2"], "AuthenticAMD") == ["avx512_bf16", "avx512", "avx2"]
    assert isa.by_speed(["avx2", "baseline"], "GenuineIntel") == ["avx2", "baseline"]


def first_call(path=PACKAGE.parent, **environment):
    """What the import and the first call print on stderr, and what the report says of the compiled module."""
    code = """
import sys
import fastlm
import torch
for line in str(fastlm.info()).splitlines():
    if line.startswith(("compiled module", "forced", "  cpu")):
        print(line)
print("imported", file=sys.stderr)
try:
    fastlm.linear(torch.ones(2, 3), torch.ones(2, 3), backend="torch")
except ValueError as error:
    print(error, file=sys.stderr)
"""
    done = run(code, path, **environment)
    return done.stderr.splitlines(), done.stdout.strip()


def test_an_isa_that_does_not_exist_is_an_error():
    message = "FASTLM_ISA: expected one of amx, avx512_bf16, avx512, avx2, baseline, got 'sse9'"
    errors, report = first_call(FASTLM_ISA="sse9")
    assert errors == ["imported", message]
    assert report.splitlines() == [
        f"compiled module: none ({message})",
        f"forced: {message} (every call is this error)",
        f"  cpu        is not loaded: {message}",
    ]


def test_an_isa_that_does_not_exist_is_one_line_of_a_command():
    code = "import sys; sys.argv = ['fastlm', 'bench', '--operators', 'linear']; import fastlm.cli; fastlm.cli.main()"
    done = run(code, FASTLM_ISA="sse9")
    message = "error: FASTLM_ISA: expected one of amx, avx512_bf16, avx512, avx2, baseline, got 'sse9'"
    assert done.returncode == 1 and done.stderr.splitlines() == [message]


@pytest.fixture
def bare(tmp_path):
    """The package without compiled modules."""
    shutil.copytree(PACKAGE, tmp_path / "fastlm", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    # With an editable install, pip's import finder would find the modules of the checkout.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    )
    return tmp_path


def test_an_isa_that_was_not_built_is_an_error(bare):
    message = "FASTLM_ISA: expected an ISA that was built, got 'avx2' (no module for avx2 was built)"
    assert first_call(bare, FASTLM_ISA="avx2")[0] == ["imported", message]


def test_an_isa_that_this_cpu_lacks_is_an_error(bare):
    (bare / "fastlm" / "_cpu_features.py").write_text(
        "isas = lambda: ['baseline']\nvendor = brand = microarchitecture = lambda: ''\nhas_amx = lambda: False\n"
    )
    message = "FASTLM_ISA: expected one of baseline, which this CPU can run, got 'avx2'"
    assert first_call(bare, FASTLM_ISA="avx2")[0] == ["imported", message]


def test_without_compiled_modules_one_warning_says_so_and_everything_works(bare):
    (bare / "fastlm" / "_build.json").write_text(
        json.dumps({"modules": [], "openmp": False, "compiler": "", "reason": "no C++ compiler found"})
    )
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastlm
    import fastlm.models
print([str(w.message) for w in caught if "fastlm" in str(w.message)])
import torch
x = torch.randn(1, 2, 5, 8, requires_grad=True)
fastlm.attention(x, x, x, causal=True).sum().backward()
torch.manual_seed(0)
fastlm.attention(x, x, x, dropout_p=0.5)
print(fastlm.info().fallbacks)
print(fastlm.info())
try:
    fastlm.linear(x, x[0, 0], backend="cpu")
except fastlm.Unsupported as error:
    print(error)
"""
    done = run(code, bare)
    lines = done.stdout.splitlines()
    warning = (
        "fastlm: no compiled kernels (no C++ compiler found); PyTorch's own operators are used instead. "
        "See fastlm.info()."
    )
    assert lines[0] == str([warning]), done.stderr
    assert lines[1] == "{'attention: torch instead of cpu': 1, 'attention: reference instead of cpu': 1}"
    assert "compiled module: none (no C++ compiler found)" in lines
    assert "  cpu        is not compiled here: no C++ compiler found" in lines
    assert lines[-1].startswith(
        "linear on cpu in torch.float32 with backend='cpu': cpu is not compiled here: no C++ compiler found; triton"
    )


def test_without_a_report_the_reason_is_that_it_was_not_built(bare):
    done = run("import fastlm; print(fastlm.info().build, fastlm.info().isas)", bare)
    assert done.stdout.strip() == "the extension was not built []"


def test_a_module_that_does_not_load_is_named(bare):
    """A module for another Python, for example. The reason is the loader's."""
    (bare / "fastlm" / "_cpu_features.py").write_text(
        "def isas():\n    return ['avx2', 'baseline']\n\n\ndef vendor():\n    return ''\n\n\n"
        "brand = microarchitecture = vendor\n\n\ndef has_amx():\n    return False\n"
    )
    (bare / "fastlm" / f"_cpu_avx2{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    done = run("import fastlm; print(fastlm.info().build)", bare)
    assert done.stdout.startswith("the module for avx2 does not load (") and done.stdout.endswith(
        "no module for baseline was built\n"
    ), done.stderr
