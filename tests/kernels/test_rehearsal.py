"""The rehearsal of `make gpu-test` and `make gpu-bench` (tests/kernels/rehearsal/); `make nightly` runs all of it."""

import json
import os
import platform
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from fastlm.benchmarking.gpu import plan
from tests.kernels.rehearsal import __main__ as rehearsal
from tests.kernels.rehearsal import measurements
from tests.support import WITH_TRITON

MAKEFILE = """
gpu-test:
\t$(PYTHON) -c 'print("first")' > $(OUT)/info.txt
\t$(PYTHON) -c 'import sys; sys.exit(sys.argv[1:] != ["an argument"])' 'an argument'
\techo '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="0"/></testsuites>' > $(OUT)/tests.xml
\t$(PYTHON) -c 'import sys; sys.exit(3)'
"""


@pytest.fixture
def rehearse(tmp_path):
    """Runs a small Makefile as the project's."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    python, paths = tmp_path / "python", os.pathsep.join(filter(None, [str(rehearsal.ROOT), *sys.path]))
    python.write_text(rehearsal.STAND_IN.format(paths=paths, python=sys.executable))
    python.chmod(0o755)
    return lambda: rehearsal.rehearse("gpu-test", tmp_path / "out", tmp_path, {}, python)


def test_each_step_of_a_target_is_timed(rehearse, tmp_path, monkeypatch):
    """What the recipe runs as Python, with its arguments and its exit status."""
    monkeypatch.setattr(rehearsal, "LIMIT", 0)
    outcome = rehearse()
    assert [step["step"] for step in outcome.steps] == [
        'python -c print("first")',
        'python -c import sys; sys.exit(sys.argv[1:] != ["an argument"])',
        "python -c import sys; sys.exit(3)",
    ]
    assert (tmp_path / "out" / "info.txt").read_text() == "first\n" and outcome.status != 0
    assert 0 < sum(step["seconds"] for step in outcome.steps) < outcome.seconds
    assert outcome.wrong == [f"{outcome.seconds:.0f} s, more than 0", "no tests.txt"]
    outcome.processes = [
        {"finished": n, "kernels": 3, "processor_seconds": 8.0, "all": 40, "chosen": 5, "errors": []} for n in (3, 1)
    ]
    lines = rehearsal.summary("gpu-test", tmp_path / "out", outcome)
    assert lines[0].startswith("gpu-test: ") and lines[1].endswith('  python -c print("first")')
    assert "  4 of the 5 tests of the sample: 16 s of a processor, 6 kernels" in lines
    assert "  at this rate all 40 tests take 20 s of 8 processes" in lines
    assert "  tests 3, failures 1, errors 0, skipped 0" in lines and "  wrong: no tests.txt" in lines


def test_the_measurements_are_those_of_a_gpu_at_small_sizes():
    kept = {"width", "heads", "num_kv_heads", "head_dim", "hidden", "layout", "causal", "vocab"}
    pairs = [pair for part in plan.planned() for pair in part]
    for case, _ in pairs:
        small = measurements.smaller(case)
        assert (small.name, small.make, small.directions) == (case.name, case.make, case.directions)
        for name, size in case.sizes.items():
            assert small.sizes[name] == size if name in kept else small.sizes[name] <= size
        assert small.sizes.get("rows", 0) <= 64 and small.sizes.get("batch", 0) <= 16
        assert small.sizes.get("tokens", 0) <= (4096 if case.name == "attention_decode" else 128)


@pytest.mark.skipif(not WITH_TRITON, reason="needs Triton")
def test_the_sample_has_cases_of_each_test():
    from tests.kernels.rehearsal.plugin import sample

    items = [Mock(nodeid=f"{name}[{i}]") for name, n in (("a", 1), ("b", 9)) for i in range(n)]
    chosen = sample(items, 4)
    assert [item.nodeid[0] for item in chosen] == ["a", "b", "b", "b"] and sample(items, 4) == chosen
    assert sample(items, 1) == items


@pytest.mark.slow
@pytest.mark.skipif(not WITH_TRITON, reason="needs Triton")
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("gcc") is None, reason="needs gcc, on Linux")
@pytest.mark.skipif(torch.version.hip is not None, reason="PyTorch for ROCm launches another way")
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing needs a rehearsal")
def test_tests_compile_their_kernels_and_pass(tmp_path):
    from tests.kernels.stub_driver import compile_stub

    notes, test = tmp_path / "notes", "tests/ops/test_rotary.py::test_as_transformers_rotates"
    environment = compile_stub(tmp_path) | {"FASTLM_REHEARSAL": str(notes), "FASTLM_REHEARSAL_SHARE": "1"}
    given = environment | {"FASTLM_TEST_BACKENDS": "triton", "FASTLM_TEST_DEVICE": "cuda"}
    command = [sys.executable, "-m", "tests.kernels.rehearsal.stand_in", "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "gpu", test], cwd=rehearsal.ROOT, env=os.environ | given, capture_output=True, text=True
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]
    (inside,) = (json.loads(file.read_text()) for file in tmp_path.glob("notes.*"))
    assert (inside["all"], inside["chosen"], inside["finished"]) == (3, 3, 3)
    assert inside["kernels"] == 3 and inside["errors"] == [] and 0 < inside["processor_seconds"]
    assert json.loads(notes.read_text())["step"].startswith("python -m pytest")
