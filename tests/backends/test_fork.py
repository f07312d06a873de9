"""A worker that was forked, as DataLoader's are: libgomp cannot start threads there, and the kernels must not ask it to."""

import subprocess
import sys

import pytest

from tests.support import BACKENDS

CODE = """
import os, signal, sys
import torch, fastlm
torch.set_num_threads(2)
x = torch.randn(600, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) / 16
heads = x.view(1, 600, 4, 64).transpose(1, 2)

def everything():
    y, _ = fastlm.layernorm_residual(x, x, w[0], backend="cpu")
    y = fastlm.gelu_mlp(fastlm.linear(y, w, backend="cpu"), w, None, w, None, backend="cpu")
    loss = fastlm.linear_cross_entropy(y, w, torch.arange(600) % 256, backend="cpu")
    attended = fastlm.attention(heads, heads, heads, causal=True, backend="cpu")
    return loss.detach(), attended.detach(), torch.autograd.grad(loss + attended.sum(), x)[0]

before = everything()  # the parent's threads exist now
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang is a failure
    same = all(torch.equal(a, b) for a, b in zip(before, everything()))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
again = all(torch.equal(a, b) for a, b in zip(before, everything()))
print(os.waitstatus_to_exitcode(status), again)
"""


@pytest.mark.skipif("cpu" not in BACKENDS or sys.platform == "win32", reason="the kernels are not under test here")
def test_the_kernels_work_in_a_forked_child_and_give_the_same_bits():
    done = subprocess.run([sys.executable, "-c", CODE], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr
