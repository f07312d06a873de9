import os

import pytest
import torch
import torch.nn.functional as F

import fastlm
from tests.support import (
    BACKENDS,
    DTYPES,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    on_every_backend,
)

SHAPES = [(1, 2), (3, 7), (2, 5, 768), (1, 1023), (0, 64), (300, 500), (33,), (40, 1), (5, 17)]


def torch_own(x, residual, w, b):
    s = residual + x
    return F.layer_norm(s, w.shape, w, b), s


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, dtype, backend):
    inputs = floats(*shape), floats(*shape, 1)[..., 0], floats(shape[-1]), floats(shape[-1], 1)[:, 0]
    assert_within_twice_torch(lambda *t: fastlm.layernorm_residual(*t, backend=backend), torch_own, inputs, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_residual_the_sum_is_x_itself(dtype, backend):
    x, w = floats(9, 50).to(dtype).requires_grad_(), floats(50).to(dtype)
    assert fastlm.layernorm_residual(x, None, w, backend=backend)[1] is x
    assert_within_twice_torch(
        lambda x, w: fastlm.layernorm_residual(x, None, w, backend=backend)[0],
        lambda x, w: F.layer_norm(x, w.shape, w),
        (floats(9, 50), floats(50)),
        dtype,
    )


@on_every_backend
def test_rows_of_large_mean_keep_their_variance(backend):
    """The variance as E[x²] − mean² would have no correct digit."""
    x, w, b = floats(6, 300) + 3000, floats(300), floats(1, 300)[0]
    assert_within_twice_torch(
        lambda x, w, b: fastlm.layernorm_residual(x, None, w, b, backend=backend)[0],
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        (x, w, b),
        torch.float32,
    )


@on_every_backend
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_residual_and_float32_weights_in_a_16_bit_model(dtype, residual_dtype, weight_dtype, backend):
    residual_dtype, weight_dtype = residual_dtype or dtype, weight_dtype or dtype
    inputs = [
        floats(4, 70).to(dtype),
        floats(70, 4).t().to(residual_dtype),
        floats(70).to(weight_dtype),
        floats(70, 1)[:, 0].to(weight_dtype),
    ]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, s = fastlm.layernorm_residual(*leaves, backend=backend)
    assert (y.dtype, s.dtype) == (dtype, residual_dtype)
    assert torch.equal(s, (inputs[0].float() + inputs[1].float()).to(residual_dtype))
    dy, ds = floats(4, 70, 1)[..., 0].to(dtype), floats(4, 70).to(residual_dtype)
    got = torch.autograd.grad((y, s), leaves, (dy, ds))
    assert [g.dtype for g in got] == [dtype, residual_dtype, weight_dtype, weight_dtype]

    # LayerNorm reads the sum as it is stored, so the true results start from the rounded sum.
    def from_stored(dtype, w_dtype):
        stored, w, b = (
            t.detach().to(d).requires_grad_() for t, d in ((s, dtype), (leaves[2], w_dtype), (leaves[3], w_dtype))
        )
        normalised = F.layer_norm(stored, (70,), w, b)
        through, dw, db = torch.autograd.grad(normalised, (stored, w, b), dy.to(normalised.dtype))
        return normalised.detach(), through + ds, through + ds, dw, db

    truths, theirs = (
        from_stored(torch.float64, torch.float64),
        from_stored(residual_dtype, residual_dtype if residual_dtype == torch.float32 else weight_dtype),
    )
    # One rounding; in float32 a few of them, in the sums.
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for a, b, truth in zip((y.detach(), *got), theirs, truths, strict=True):
        # PyTorch's own gradients have 16 bits here even for float32 weights, so backend torch may have twice its error.
        assert error(a, truth) < (2 * error(b, truth) + rounding[a.dtype] if backend == "torch" else rounding[a.dtype])


@on_every_backend
def test_upstream_gradient_of_one_result_only(backend):
    def gradients(which):
        leaves = [
            floats(4, 30).requires_grad_(),
            floats(30, 4).t().requires_grad_(),
            floats(30).requires_grad_(),
            floats(1, 30)[0].requires_grad_(),
        ]
        results = fastlm.layernorm_residual(*leaves, backend=backend)
        chosen = [results[i] for i in which]
        return torch.autograd.grad(
            chosen, leaves, [floats(4, 30) * (i + 1) for i in which], allow_unused=True, materialize_grads=True
        )

    both, first, second = gradients((0, 1)), gradients((0,)), gradients((1,))
    assert all(torch.equal(d, floats(4, 30) * 2) for d in second[:2]) and not any(d.any() for d in second[2:])
    for a, b, c in zip(both, first, second, strict=True):
        torch.testing.assert_close(a, b + c)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, r, w, b = floats(6, 20), floats(20, 6).t().contiguous(), floats(20), floats(1, 20)[0]
    variants = [
        (floats(6, 60)[:, 5:25], floats(6, 44)[:, 1:21], w, b),
        (x[:1].expand(6, 20), r, w[:1].expand(20), b),
        (x, r[:1].expand(6, 20), floats(40)[::2], floats(60)[::3]),
        (floats(20, 6).t(), floats(6, 40)[:, ::2], w, b),
        (floats(3, 6, 20)[:, ::2].transpose(0, 1), floats(3, 3, 20), w, b),
    ]
    for variant in variants:
        results = []
        dy, ds = floats(*variant[0].shape), floats(1, 20).expand(variant[0].shape)
        for inputs, upstream in ((variant, (dy, ds)), ([t.contiguous() for t in variant], (dy, ds.contiguous()))):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y, s = fastlm.layernorm_residual(*leaves, backend=backend)
            assert y.is_contiguous() and s.is_contiguous()
            results.append((y, s, *torch.autograd.grad((y, s), leaves, upstream)))
        assert_same_bits(*results)


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = floats(6, 10), floats(10, 6).t(), floats(10), floats(1, 10)[0]

    def gradients(asked):
        leaves = [t.clone().requires_grad_(i in asked) for i, t in enumerate(inputs)]
        y, s = fastlm.layernorm_residual(*leaves, backend=backend)
        torch.autograd.backward(
            [t for t in (y, s) if t.requires_grad],
            [u for u, t in ((floats(6, 10), y), (floats(6, 10), s)) if t.requires_grad],
        )
        return [t.grad for t in leaves]

    whole = gradients((0, 1, 2, 3))
    for i in range(4):
        alone = gradients((i,))
        torch.testing.assert_close(alone[i], whole[i])
        assert all(g is None for j, g in enumerate(alone) if j != i)


@on_every_backend
def test_gradients_of_x_and_residual_share_no_memory(backend):
    """Without dropout and in one dtype the gradients are equal. Autograd must not return one tensor for both."""
    x, r, w = floats(4, 8).requires_grad_(), floats(8, 4).t().contiguous().requires_grad_(), floats(8)
    fastlm.layernorm_residual(x, r, w, backend=backend)[0].sum().backward()
    before = r.grad.clone()
    x.grad.zero_()
    assert torch.equal(r.grad, before)


@on_every_backend
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_eps(eps, backend):
    x, w = floats(5, 40) * 1e-3, floats(40)
    torch.testing.assert_close(
        fastlm.layernorm_residual(x, None, w, None, eps, backend=backend)[0], F.layer_norm(x, (40,), w, None, eps)
    )


@on_every_backend
def test_constant_rows_and_nan_rows(backend):
    x, w, b = floats(4, 16), torch.ones(16), floats(16)
    x[1] = 7.25
    x[2, 5] = torch.nan
    y, _ = fastlm.layernorm_residual(x, None, w, b, backend=backend)
    assert torch.equal(y[1], b) and y[2].isnan().all() and y[[0, 3]].isfinite().all()


@on_backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("width", [9, 300, 1023, 10000])
@pytest.mark.parametrize("value", [12345.678, -7e6, 1e-3])
def test_rows_of_equal_elements_are_the_bias(value, width, backend):
    """The mean must be exact: divided by √eps, its rounding error would be as large as the bias."""
    x, b = torch.full((3, width), value), floats(width)
    y, _ = fastlm.layernorm_residual(x, None, torch.ones(width), b, 1e-12, backend=backend)
    assert torch.equal(y, b.expand(3, width))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 45, 9000])
@pytest.mark.parametrize("size", [1e17, 1e20, 1e38])
def test_a_sum_of_squares_that_overflows_is_not_hidden(size, width, dtype, backend):
    """The row and its gradients are NaN. A factor of 0 would give the bias and gradients of 0."""
    x, w, b = floats(3, width), floats(width), floats(1, width)[0]
    x[1] *= size

    def run(dtype, **backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y, _ = fastlm.layernorm_residual(leaves[0], None, *leaves[1:], **backend)
        dx, dw, db = torch.autograd.grad(y, leaves, floats(3, width, 1)[..., 0].to(dtype))
        return y.detach(), dx, dw, db

    y, dx, dw, db = run(dtype, backend=backend)
    if size >= 1e20:
        assert y[1].isnan().all() and dx[1].isnan().all() and dw.isnan().all()
        y, dx = y[[0, 2]], dx[[0, 2]]
    else:
        assert dw.isfinite().all()
    assert y.isfinite().all() and dx.isfinite().all() and db.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_an_overflow_is_not_hidden_by_a_nan_in_another_row(backend):
    x = floats(3, 45)
    x[0, 0], x[1] = torch.nan, x[1] * 1e20
    y, _ = fastlm.layernorm_residual(x, None, floats(45), floats(1, 45)[0], backend=backend)
    assert y[:2].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_eps_beyond_float32_leaves_the_bias(dtype, backend):
    x, b = floats(3, 45).to(dtype), floats(1, 45)[0].to(dtype)
    y, _ = fastlm.layernorm_residual(x, None, floats(45).to(dtype), b, 1e300, backend=backend)
    assert torch.equal(y, b.expand(3, 45))


def call(**changed):
    arguments = {"x": floats(2, 5), "residual": floats(2, 5), "weight": floats(5), "bias": floats(5)} | changed
    return fastlm.layernorm_residual(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.empty(3, 0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(3, 0\)"),
        ({"residual": floats(5)}, r"residual: expected shape \(2, 5\), as x, got \(5,\)"),
        (
            {"residual": floats(2, 5).half()},
            r"residual: expected torch.float32, as x, on cpu, got torch.float16 on cpu",
        ),
        (
            {"x": floats(2, 5).half(), "residual": floats(2, 5).bfloat16()},
            r"residual: expected torch.float16, as x, or torch.float32 on cpu, got torch.bfloat16 on cpu",
        ),
        ({"weight": floats(4)}, r"weight: expected shape \(5,\), the last dimension of x, got \(4,\)"),
        ({"weight": floats(5).double()}, r"weight: expected torch.float32, as x, on cpu, got torch.float64 on cpu"),
        ({"bias": floats(1, 5)}, r"bias: expected shape \(5,\), the last dimension of x, got \(1, 5\)"),
        ({"bias": floats(5).half()}, r"bias: expected torch.float32 on cpu, as weight, got torch.float16 on cpu"),
        ({"eps": 0.0}, r"eps: expected a finite number above 0, got 0.0"),
        ({"eps": float("nan")}, r"eps: expected a finite number above 0, got nan"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p: expected a probability in \[0, 1\), got -0.1"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


@on_backends("cpu")
@pytest.mark.parametrize("width", [1021, 768], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_larger_than_the_cache_have_the_same_bits(dtype, width, backend):
    """They are written by non-temporal stores. Rows of width 1021 begin and end within cache lines."""
    cache = max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0) if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    rows = (cache or 32 << 20) // (width * dtype.itemsize) + 100  # each of the four tensors is larger than the cache

    def results(some):
        x, residual, dy, ds = (t[some].detach().requires_grad_() for t in (whole, whole.flip(1), whole * 2, whole + 1))
        torch.manual_seed(3)  # the same dropout mask
        y, s = fastlm.layernorm_residual(x, residual, weight, bias, dropout_p=0.1, backend=backend)
        return y.detach(), s.detach(), *torch.autograd.grad((y, s), (x, residual), (dy.detach(), ds.detach()))

    whole = floats(512, width).to(dtype).repeat(rows // 512 + 1, 1)[:rows]
    weight, bias = floats(width).to(dtype), floats(1, width)[0].to(dtype)
    large, small = results(slice(None)), results(slice(0, 700))
    assert_same_bits([result[:700] for result in large], small)
    last = slice(rows - 700, rows)  # without dropout: the mask of these rows differs
    large, small = (
        fastlm.layernorm_residual(whole[some], whole[some], weight, backend=backend)[0] for some in (slice(None), last)
    )
    assert torch.equal(large[last], small)
