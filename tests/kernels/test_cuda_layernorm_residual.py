"""Paths of the CUDA LayerNorm kernels that the operator tests do not reach.

Teams of every size, several teams in a block with several rows each, rows that are not aligned. They run on a GPU, or
in the emulator, which checks every access.
"""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from tests.support import assert_same_bits, assert_within_twice_torch, error, floats, on_backends, outputs_and_gradients

only_cuda = on_backends("cuda")


def torch_own(x, residual, w, b):
    s = residual + x
    return F.layer_norm(s, w.shape, w, b), s


def inputs_of(rows, width):
    return floats(rows, width), floats(width, rows).t().contiguous(), floats(width), floats(1, width)[0]


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, width", [(37, 8), (9, 256), (5, 264), (3, 1032), (6, 2048), (2, 4096), (2, 8192), (2, 8200), (1, 8999)]
)
def test_teams_of_every_size(rows, width, dtype, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.layernorm_residual(*t, backend=backend), torch_own, inputs_of(rows, width), dtype
    )


@only_cuda
@pytest.mark.parametrize("rows, width", [(9000, 8), (2200, 24), (600, 7), (300, 4104)])
def test_several_rows_per_team(rows, width, backend):
    """More rows than two blocks per multiprocessor have teams: each processes several, and the last block fewer."""
    assert_within_twice_torch(
        lambda *t: fastlm.layernorm_residual(*t, backend=backend), torch_own, inputs_of(rows, width), torch.float32
    )


@only_cuda
@pytest.mark.parametrize("width", [64, 72, 1088, 4160, 8192, 8200])
def test_dropout_with_the_columns_of_a_thread_spread(width, backend):
    """Each random word belongs to its column, forward and backward, with vectors and column by column."""

    def seeded(name):
        def operator(*t):
            torch.manual_seed(3)
            return fastlm.layernorm_residual(*t, dropout_p=0.3, backend=name)

        return operator

    inputs = inputs_of(3, width)
    ours, expected = (outputs_and_gradients(seeded(name), inputs, torch.float32) for name in (backend, "reference"))
    assert torch.equal(ours[1], expected[1]) and torch.equal(ours[2] == 0, expected[2] == 0)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 2**-20 * max(1.0, b.abs().max())


@only_cuda
@pytest.mark.parametrize("begin, stride", [(0, 300), (1, 300), (8, 304), (4, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_not_aligned(dtype, begin, stride, backend):
    """Rows are read as vectors if aligned, otherwise by columns, which changes the order of the sums only."""
    x, weight = (
        floats(6, 320).to(dtype).as_strided((3, 256), (stride, 1), begin),
        floats(300).to(dtype)[begin : begin + 256],
    )
    residual, bias = floats(3, 256).to(dtype), floats(1, 256)[0].to(dtype)

    def gradients(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = fastlm.layernorm_residual(*leaves, backend=backend)
        return (*results, *torch.autograd.grad(results, leaves, (residual, x)))

    for ours, theirs in zip(
        gradients(x, residual, weight, bias), gradients(x.contiguous(), residual, weight.clone(), bias), strict=True
    ):
        assert error(ours, theirs.double()) <= {torch.float32: 2**-20, torch.bfloat16: 2**-8}[dtype]


@only_cuda
def test_the_same_bits_every_time(backend):
    inputs = inputs_of(700, 40)
    first = outputs_and_gradients(lambda *t: fastlm.layernorm_residual(*t, backend=backend), inputs, torch.bfloat16)
    for _ in range(3):
        assert_same_bits(
            first,
            outputs_and_gradients(lambda *t: fastlm.layernorm_residual(*t, backend=backend), inputs, torch.bfloat16),
        )
