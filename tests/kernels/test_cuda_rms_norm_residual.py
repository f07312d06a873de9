"""Paths of the CUDA RMSNorm kernels that the operator tests do not reach.

Teams of every size, several teams in a block with several rows each, rows that are not aligned, and rows with three
strides. They run on a GPU, or in the emulator, which checks every access.
"""

import pytest
import torch

import fastlm
from tests.support import assert_within_twice_torch, error, floats, on_backends, outputs_and_gradients

only_cuda = on_backends("cuda")


def torch_own(x, residual, w):
    s = residual + x
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(s.dtype), s


def inputs_of(rows, width):
    return floats(rows, width), floats(width, rows).t().contiguous(), floats(width)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, width", [(37, 8), (9, 256), (5, 264), (3, 1032), (6, 2048), (2, 4096), (2, 8192), (2, 8200), (1, 8999)]
)
def test_teams_of_every_size(rows, width, dtype, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.rms_norm_residual(*t, backend=backend), torch_own, inputs_of(rows, width), dtype
    )


@only_cuda
@pytest.mark.parametrize("rows, width", [(9000, 8), (2200, 24), (600, 7), (300, 4104)])
def test_several_rows_per_team(rows, width, backend):
    """More rows than two blocks per multiprocessor have teams: each processes several, and the last block fewer."""
    assert_within_twice_torch(
        lambda *t: fastlm.rms_norm_residual(*t, backend=backend), torch_own, inputs_of(rows, width), torch.float32
    )


@only_cuda
@pytest.mark.parametrize("width", [64, 72, 4160, 8200])
def test_dropout_with_the_columns_of_a_thread_spread(width, backend):
    def seeded(name):
        def operator(*t):
            torch.manual_seed(3)
            return fastlm.rms_norm_residual(*t, dropout_p=0.3, backend=name)

        return operator

    inputs = inputs_of(3, width)
    ours, expected = (outputs_and_gradients(seeded(name), inputs, torch.float32) for name in (backend, "reference"))
    assert torch.equal(ours[1], expected[1]) and torch.equal(ours[2] == 0, expected[2] == 0)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 2**-20 * max(1.0, b.abs().max())


@only_cuda
@pytest.mark.parametrize("begin, strides", [(0, (160, 32, 8)), (1, (160, 32, 8)), (8, (161, 32, 8)), (0, (160, 33, 9))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_three_strides(begin, strides, dtype, backend):
    """Rows are read as vectors if all of them are aligned, otherwise by columns, which changes the sums' order only."""
    x = floats(700).to(dtype).as_strided((3, 4, 5, 8), (*strides, 1), begin)
    weight, dy = floats(8).to(dtype), floats(3, 5, 4, 8).to(dtype).transpose(1, 2)

    def gradients(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y, _ = fastlm.rms_norm_residual(leaves[0], None, leaves[1], backend=backend)
        return (y, *torch.autograd.grad(y, leaves, dy))

    for ours, theirs in zip(gradients(x, weight), gradients(x.contiguous(), weight), strict=True):
        assert error(ours, theirs.double()) <= {torch.float32: 2**-20, torch.bfloat16: 2**-8}[dtype]
