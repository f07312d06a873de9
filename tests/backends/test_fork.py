"""The kernels in a forked process, such as a DataLoader worker: libgomp cannot start threads there."""

import subprocess
import sys

import pytest

from tests.support import BACKENDS

# PyTorch's own operators would hang in the child once they use two threads, so the child runs only the kernels on large
# tensors.
CODE = """
import os, signal
import numpy
import torch, fastlm
torch.set_num_threads(2)
rows, width = 600, 256
def leaf(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
x, residual, mlp_input, lm_input = (leaf(rows, width, seed=i) for i in range(4))
weights = [(leaf(width, width, seed=5 + i).detach() / 16).requires_grad_() for i in range(4)]
mlp_weights = weights[1], None, weights[2], None
norm, heads, upstream = leaf(width, seed=9), leaf(1, 4, rows, 64, seed=10), torch.ones(rows, width)
target = torch.arange(rows) % width

def run_operators():
    results = []
    for y, inputs in (
        (fastlm.layernorm_residual(x, residual, norm, backend="cpu")[0], (x, norm)),
        (fastlm.linear(x, weights[0], backend="cpu"), (x, weights[0])),
        (fastlm.gelu_mlp(mlp_input, *mlp_weights, backend="cpu"), (mlp_input, *weights[1:3])),
        (fastlm.linear_cross_entropy(lm_input, weights[3], target, backend="cpu"), (lm_input, weights[3])),
        (fastlm.attention(heads, heads.detach(), heads.detach(), causal=True, backend="cpu"), (heads,)),
    ):
        dy = torch.ones(()) if y.dim() == 0 else upstream.view(y.shape)
        results += [t.detach().numpy() for t in (y, *torch.autograd.grad(y, inputs, dy))]
    return results

before = run_operators()  # this starts the parent's threads
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang is a failure
    os._exit(0 if all(map(numpy.array_equal, before, run_operators())) else 3)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), all(map(numpy.array_equal, before, run_operators())))
"""


@pytest.mark.skipif("cpu" not in BACKENDS or sys.platform == "win32", reason="backend cpu is not under test")
def test_the_kernels_work_in_a_forked_child_and_give_the_same_bits():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["0", "True"], done.stderr
