import pytest
import torch
import torch.nn.functional as F

import fastlm
from tests.support import (
    DTYPES,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    on_every_backend,
    outputs_and_gradients,
)

# (shape of x, output width): single elements, odd sizes around those of vectors and tiles, no rows, a vector.
SHAPES = [
    ((1, 1), 1),
    ((3, 7), 5),
    ((2, 5, 64), 96),
    ((1, 768), 33),
    ((257, 129), 65),
    ((0, 8), 4),
    ((5,), 3),
    ((70, 1), 17),
    ((31, 300), 1),
]

# (rows, input width, output width): both sides of every number of rows at which the kernels change their algorithm.
FEW_ROWS = [
    (1, 1000, 65),
    (2, 63, 17),
    (3, 1, 1000),
    (4, 1000, 3),
    (7, 65, 63),
    (8, 64, 1000),
    (9, 17, 1),
    (10, 33, 100),
    (12, 200, 35),
    (14, 1537, 50),
    (16, 1000, 33),
    (17, 250, 61),
    (24, 65, 1000),
    (25, 1000, 63),
    (5, 60000, 3),
    (24, 11000, 3),
    (27, 390, 16),
    (32, 1000, 17),
    (33, 63, 65),
    (44, 64, 31),
    (48, 65, 17),
    (49, 17, 130),
    (56, 200, 35),
    (64, 1000, 3),
    (65, 63, 1000),
    (72, 390, 50),
    (73, 65, 48),
]


def weight_for(x_shape, out, layout):
    return floats(out, x_shape[-1]) if layout == "linear" else floats(x_shape[-1], out)


def torch_own(layout):
    return F.linear if layout == "linear" else lambda x, w, b=None: F.linear(x, w.t(), b)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("shape, out", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, out, layout, dtype, backend):
    inputs = floats(*shape), weight_for(shape, out, layout), floats(out)
    assert_within_twice_torch(
        lambda x, w, b: fastlm.linear(x, w, b, layout=layout, backend=backend), torch_own(layout), inputs, dtype
    )


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("rows, width, out", FEW_ROWS, ids=str)
def test_few_rows_are_as_close_to_float64_as_torch(rows, width, out, layout, dtype, backend):
    inputs = floats(rows, width), weight_for((rows, width), out, layout), floats(out)
    assert_within_twice_torch(
        lambda x, w, b: fastlm.linear(x, w, b, layout=layout, backend=backend), torch_own(layout), inputs, dtype
    )


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "few, width, out",
    [
        ((1, 3, 4, 8, 9, 11, 12, 13, 14, 16, 17, 18, 24, 25, 32, 33, 36, 44, 48, 49, 65, 72, 73), 422, 300),
        ((1, 8, 16, 24), 421, 37),
        ((23, 24), 11000, 3),
        ((40, 64), 2100, 31),
    ],
    ids=["rows", "odd", "depth", "groups"],
)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(few, width, out, layout, dtype, backend):
    """Small-M products have another algorithm with the same sums.

    For the gradient of the weight, rows whose upstream gradient is 0 stand for missing rows.
    """
    x, w, b, dy = (
        t.to(dtype) for t in (floats(100, width), weight_for((100, width), out, layout), floats(out), floats(100, out))
    )
    y, dx, *_ = gradients((x, w, b), dy, backend, layout)
    for rows in few:
        some, dsome, *dparameters = gradients((x[:rows], w, b), dy[:rows], backend, layout)
        padded = torch.cat([dy[:rows], torch.zeros_like(dy[rows:])])
        assert_same_bits(
            (some, dsome, *dparameters), (y[:rows], dx[:rows], *gradients((x, w, b), padded, backend, layout)[2:])
        )


@on_backends("cpu")
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("rows", [1, 16, 30, 60])
def test_same_bits_of_few_rows_on_every_number_of_threads(rows, layout, backend):
    x, w, b, dy = floats(rows, 300), weight_for((rows, 300), 1111, layout), floats(1111), floats(rows, 1111)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            outcomes.append(gradients((x, w, b), dy, backend, layout))
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert_same_bits(outcome, outcomes[0])


@on_every_backend
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_without_bias(layout, backend):
    inputs = floats(9, 33), weight_for((9, 33), 20, layout)
    assert_within_twice_torch(
        lambda x, w: fastlm.linear(x, w, layout=layout, backend=backend), torch_own(layout), inputs, torch.float32
    )


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = floats(6, 10), floats(4, 10), floats(4)
    whole = outputs_and_gradients(lambda *t: fastlm.linear(*t, backend=backend), inputs, torch.float32)[1:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fastlm.linear(*leaves, backend=backend).backward(floats(6, 4))
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs_give_the_same_results(dtype, backend):
    """Strided and expanded rows, a strided last dimension, sliced and transposed weights, against contiguous copies.

    On backend cpu the results are bit-identical.
    """
    x, w, b = floats(8, 24).to(dtype), floats(20, 24).to(dtype), floats(20).to(dtype)
    wide = floats(8, 60).to(dtype)
    variants = [
        (wide[:, 5:29], w, b),
        (x[:1].expand(8, 24), w, b),
        (wide[:, ::2][:, :24], w, b),
        (floats(24, 8).to(dtype).t(), w, b),
        (floats(4, 6, 24).to(dtype).transpose(0, 1), w, b),
        (x, floats(20, 70).to(dtype)[:, 3:27], b),
        (x, floats(24, 20).to(dtype).t(), b),
        (x, floats(20, 48).to(dtype)[:, ::2], floats(40).to(dtype)[::2]),
        (x, w[:1].expand(20, 24), b[:1].expand(20)),
    ]
    for variant in variants:
        for leading in (lambda t: t, lambda t: t.unsqueeze(1)):
            inputs = (leading(variant[0]), *variant[1:])
            dy = floats(*inputs[0].shape[:-1], 20).to(dtype)
            got = gradients(inputs, dy, backend)
            contiguous = gradients([t.contiguous() for t in inputs], dy, backend)
            if backend == "cpu":
                assert_same_bits(got, contiguous)
            for a, b in zip(got, contiguous, strict=True):
                assert error(a, b.double()) <= {torch.float32: 2**-21, torch.bfloat16: 2**-7}[dtype]


def gradients(inputs, dy, backend, layout="linear"):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = fastlm.linear(*leaves, layout=layout, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@on_every_backend
def test_a_transposed_weight_is_the_other_layout(backend):
    x, w, b = floats(8, 24), floats(20, 24), floats(20)
    other = gradients((x, w.t().contiguous(), b), floats(8, 20), backend, "conv1d")
    for a, c in zip(gradients((x, w, b), floats(8, 20), backend), (*other[:2], other[2].t(), other[3]), strict=True):
        torch.testing.assert_close(a, c)


@on_every_backend
def test_nan_stays_in_its_row_and_column(backend):
    x, w = floats(5, 16), floats(7, 16)
    x[2, 3] = torch.nan
    w[4, 0] = torch.inf
    y = fastlm.linear(x, w, backend=backend)
    clean = torch.ones(5, 7, dtype=torch.bool)
    clean[2] = clean[:, 4] = False
    assert y[2].isnan().all() and not y[:, 4].isfinite().any() and y[clean].isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fastlm.linear(torch.tensor(1.0), floats(4, 5)),
            r"x: expected at least one dimension, the last of size 1 or more, got \(\)",
        ),
        (
            lambda: fastlm.linear(floats(2, 5).long(), floats(4, 5)),
            r"x: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(5, 4)),
            r"weight: expected shape \(out, 5\) with layout='linear'.*, got \(5, 4\)",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5), layout="conv1d"),
            r"weight: expected shape \(5, out\) with layout='conv1d'.*, got \(4, 5\)",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5).bfloat16()),
            r"weight: expected torch.float32 on cpu, as x, got torch.bfloat16 on cpu",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5), floats(5)),
            r"bias: expected shape \(4,\), the output width of weight, got \(5,\)",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5), floats(4).half()),
            r"bias: expected torch.float32 on cpu, as x, got torch.float16 on cpu",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5), layout="conv"),
            r"layout: expected one of 'linear', 'conv1d', got 'conv'",
        ),
        (
            lambda: fastlm.linear(floats(2, 5), floats(4, 5), backend="cdua"),
            r"backend: expected one of cpu, triton, cuda, torch, reference, got 'cdua'",
        ),
        (lambda: fastlm.linear(floats(2, 5), torch.empty(0, 5)), r"weight: expected shape \(out, 5\).*, got \(0, 5\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@on_backends("triton", "cuda")
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_gpu_backends_use_pytorchs_own_autograd_node(layout, backend):
    """There linear is PyTorch's product, and an autograd.Function would cost the host more than a launch."""
    y = fastlm.linear(floats(2, 9, 8).requires_grad_(), floats(8, 8), floats(8), layout=layout, backend=backend)
    assert y.requires_grad and not isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    assert isinstance(
        fastlm.linear(floats(2, 8).requires_grad_(), floats(8, 8), backend="reference").grad_fn,
        torch.autograd.function.BackwardCFunction,
    )
