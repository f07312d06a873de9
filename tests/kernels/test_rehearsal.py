"""rehearsal.py: kernels are compiled and launched on the stub, and the time is reported, though no test can pass."""

import platform
import shutil

import pytest
import torch

from tests.kernels import rehearsal
from tests.support import WITH_TRITON


@pytest.mark.slow
@pytest.mark.skipif(not WITH_TRITON, reason="needs Triton")
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("gcc") is None, reason="needs gcc, on Linux")
@pytest.mark.skipif(torch.version.hip is not None, reason="PyTorch for ROCm launches another way")
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing needs a rehearsal")
def test_what_it_reports(tmp_path):
    tests = "tests/ops/test_rotary.py::test_as_transformers_rotates[torch.float32-triton]"
    found = rehearsal.main(tmp_path / "out.json", tmp_path, tests)
    assert found["kernels"] > 0 and 0 < found["processor_seconds"] and found["seconds"] < 500
    assert found["tests"] == 1
