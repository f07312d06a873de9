"""Small calls run on the calling thread alone: waking another takes longer than the call."""

import subprocess
import sys

import pytest

from tests.support import BACKENDS

CODE = """
import os
import torch, fastlm
torch.set_num_threads(2)
started = lambda: len(os.listdir("/proc/self/task"))
x, w, wide, square = torch.randn(16, 64), torch.randn(64), torch.randn(64, 64), torch.randn(512, 512)
before = started()
for _ in range(3):
    fastlm.linear(x, wide, backend="cpu")
    fastlm.gelu_mlp(x, wide, None, wide, None, backend="cpu")
    fastlm.layernorm_residual(x, x, w, backend="cpu")
small = started()
fastlm.linear(square, square, backend="cpu")
print(small - before, started() - small)
"""


@pytest.mark.skipif(
    "cpu" not in BACKENDS or sys.platform != "linux",
    reason="backend cpu is not under test, or threads cannot be counted",
)
def test_small_calls_start_no_thread():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr
