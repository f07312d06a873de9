"""Paths of the CUDA matrix products that the operator tests do not reach.

Both tile sizes, more than one group of tiles, operands that are not aligned, long sums, tf32. They run on a GPU, or in
the emulator, which checks every access.
"""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.backends import cuda
from fastlm.ops.gelu_mlp.cuda import hidden_and_activated
from fastlm.ops.gelu_mlp.spec import Forward
from tests.support import DTYPES, assert_within_twice_torch, error, floats, on_backends, targets

only_cuda = on_backends("cuda")


def call_of(x, w1, b1, approximate="none"):
    return Forward(x, w1, b1, w1, None, approximate, "linear", 0)


def product(x, w1, b1):
    """x W1ᵀ + b1 by the kernel."""
    return hidden_and_activated(call_of(x, w1, b1), True, False)[0]


def torch_mlp(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def mlp_inputs(rows, width, hidden, out):
    return (
        floats(rows, width),
        floats(hidden, width) / width**0.5,
        floats(hidden),
        floats(out, hidden) / hidden**0.5,
        floats(out),
    )


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "sizes", [(1100, 40, 152, 24), (130, 33, 261, 17), (70, 72, 296, 8), (257, 9, 129, 129)], ids=str
)
def test_many_tiles(sizes, layout, dtype, backend):
    def ours(x, w1, b1, w2, b2):
        w1, w2 = (w1, w2) if layout == "linear" else (w1.t().contiguous(), w2.t().contiguous())
        return fastlm.gelu_mlp(x, w1, b1, w2, b2, layout=layout, recompute=2, backend=backend)

    assert_within_twice_torch(ours, torch_mlp, mlp_inputs(*sizes), dtype)


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rows, hidden", [(1, 40), (5, 1), (1, 1)])
def test_one_row_with_a_row_stride_that_is_not_aligned(rows, hidden, dtype, backend):
    """The row is aligned. The rows of the tile beyond it are not read, but their addresses must be aligned too."""
    x, w1, b1 = (
        floats(rows, 65 if rows == 1 else 64).to(dtype),
        floats(hidden, 65 if hidden == 1 else 64).to(dtype) / 8,
        floats(hidden).to(dtype),
    )
    x, w1 = x[:, :64], w1[:, :64]
    hidden = product(x, w1, b1)
    assert (
        error(hidden, F.linear(x.double(), w1.double(), b1.double()))
        <= {torch.float32: 2**-21, torch.bfloat16: 2**-8}[dtype]
    )


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_the_tile(dtype, backend):
    """Few rows take small tiles, many rows large ones. Both sum in the same order."""
    x, w1, b1, _, _ = (t.to(dtype) for t in mlp_inputs(600, 88, 264, 8))
    few, many = (hidden_and_activated(call_of(rows, w1, b1, "tanh"), True, True) for rows in (x[-7:], x))
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[-7:])


@only_cuda
def test_float32_is_as_accurate_on_a_long_sum(backend):
    """The error of three tf32 products must not grow faster than that of a sum in float32."""
    assert_within_twice_torch(
        lambda *t: fastlm.gelu_mlp(*t, backend=backend), torch_mlp, mlp_inputs(9, 3072, 40, 3072), torch.float32
    )


@only_cuda
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 3e38], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_values_that_are_not_finite_propagate_as_in_pytorch(dtype, value, backend):
    """An infinity has no low part in tf32, and 3e38 overflows in the product. Other rows keep their bits."""
    x, w1, b1, _, _ = (t.to(dtype) for t in mlp_inputs(80, 64, 40, 8))
    w1[3] = 2.0  # its low part in tf32 is 0
    multiply = lambda x: product(x, w1, b1)  # noqa: E731
    finite = multiply(x)
    x[5, 7], x[70, 2], w1[9, 7] = value, -value, 0.0
    found, expected = multiply(x), F.linear(x, w1, b1)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()], expected[expected.isinf()])
    others = [i for i in range(80) if i not in (5, 70)]
    assert torch.equal(found[others][:, :9], finite[others][:, :9])


@pytest.fixture
def less_precision():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@only_cuda
def test_tf32_where_it_is_allowed_and_nowhere_else(backend, less_precision):
    x, w1, b1, _, _ = mlp_inputs(40, 256, 96, 8)
    truth = F.linear(x.double(), w1.double(), b1.double())
    allowed = product(x, w1, b1)
    assert 2**-16 < error(allowed, truth) < 2**-10
    torch.set_float32_matmul_precision("highest")
    exact = product(x, w1, b1)
    assert error(exact, truth) < 2**-21


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows, width, vocab", [(150, 40, 1200), (9, 33, 1300), (70, 16, 65)])
def test_losses_without_stored_logits(rows, width, vocab, label_smoothing, dtype, backend):
    """Several splits of the vocabulary and blocks of rows. Losses with gradients differ by rounded logits only."""
    x, w, b, target = (
        floats(rows, width),
        floats(vocab, width) / width**0.5,
        floats(vocab),
        targets(vocab, rows, ignored=[1, 5]),
    )
    for weight in (w, w.t().contiguous().t()):
        options = {"reduction": "none", "label_smoothing": label_smoothing, "backend": backend}
        ours = fastlm.linear_cross_entropy(x.to(dtype), weight.to(dtype), target, b.to(dtype), **options)
        logits = F.linear(x.to(dtype).double(), weight.to(dtype).double(), b.to(dtype).double())
        truth = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        assert error(ours, truth) < 2**-20  # in any dtype, because the logits are not rounded
        assert (ours[[1, 5]] == 0).all()


@only_cuda
def test_a_nan_reaches_the_loss_of_its_row_only(backend):
    x, w = floats(6, 16), floats(300, 16)
    x[2, 3] = torch.nan
    losses = fastlm.linear_cross_entropy(x, w, targets(300, 6), reduction="none", backend=backend)
    assert losses.isnan().tolist() == [i == 2 for i in range(6)]


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows, vocab", [(3, 9000), (200, 1100), (65, 8)])
def test_gradients_of_wide_and_of_many_rows(rows, vocab, label_smoothing, dtype, backend):
    """More groups of a row than threads, more rows than one partial sum, and idle threads."""
    target = targets(vocab, rows, ignored=[2])
    assert_within_twice_torch(
        lambda x, w, b: fastlm.linear_cross_entropy(x, w, target, b, label_smoothing=label_smoothing, backend=backend),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, label_smoothing=label_smoothing),
        (floats(rows, 8), floats(vocab, 8) / 3, floats(vocab)),
        dtype,
    )


@only_cuda
@pytest.mark.parametrize("rows, vocab", [(1, 2**30 + 1), (2**30 + 1, 1)])
def test_sizes_beyond_32_bits_are_refused_before_a_launch(rows, vocab, backend):
    """The tensors are not initialised, and take no memory on a CPU."""
    logits, target = torch.empty(rows, vocab, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64).expand(rows)
    row = torch.empty(rows)
    common = {"logits": logits, "target": target, "ignore_index": -100, "softcap": 0.0, "device": 0, "stream": 0}
    with pytest.raises(RuntimeError, match="linear_cross_entropy: sizes beyond the range of 32 bits"):
        cuda.kernels.linear_cross_entropy_gradient(
            **common,
            row_scale=row,
            loss=row.clone(),
            statistics=None,
            dbias_partials=None,
            label_smoothing=0.0,
            logit_scale=1.0,
        )
    common |= {"temperature": 1.0, "entropy": row, "row_max": row, "row_sum": row}
    with pytest.raises(RuntimeError, match="linear_log_prob: sizes beyond the range of 32 bits"):
        cuda.kernels.linear_log_prob_forward(**common, log_prob=row)
    with pytest.raises(RuntimeError, match="linear_log_prob: sizes beyond the range of 32 bits"):
        cuda.kernels.linear_log_prob_backward(**common, dlog_prob=None, dentropy=None, dbias_partials=None)
