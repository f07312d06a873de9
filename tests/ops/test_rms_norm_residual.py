import os

import pytest
import torch

import fastlm
from fastlm.core import layout
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
EPS = 1e-6

on_both_offsets = pytest.mark.parametrize("unit_offset", [False, True], ids=["llama", "gemma"])


def norm(s, w, unit_offset=False):
    """As transformers' LlamaRMSNorm and Gemma2RMSNorm round it, in float64 too."""
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (n * (1 + w.to(n.dtype))).to(s.dtype) if unit_offset else w * n.to(s.dtype)


def torch_own(unit_offset):
    def own(x, residual, w):
        s = residual + x
        return norm(s, w, unit_offset), s

    return own


@on_every_backend
@on_both_offsets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, dtype, unit_offset, backend):
    inputs = floats(*shape), floats(*shape, 1)[..., 0], floats(shape[-1])

    def ours(*t):
        return fastlm.rms_norm_residual(*t, unit_offset=unit_offset, backend=backend)

    assert_within_twice_torch(ours, torch_own(unit_offset), inputs, dtype)


@on_every_backend
@on_both_offsets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_modules_of_transformers(dtype, unit_offset, backend):
    """The same roundings: all but a few results, whose float32 value lies between two, have the same bits."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    module = gemma.Gemma2RMSNorm(320, EPS) if unit_offset else llama.LlamaRMSNorm(320, EPS)
    module.weight.data = floats(320) / 4 + (0 if unit_offset else 1)
    module = module.to(dtype)
    x, dy = floats(40, 320).to(dtype).requires_grad_(), floats(40, 320, 1)[..., 0].to(dtype)
    theirs = module(x)
    y, _ = fastlm.rms_norm_residual(x, None, module.weight, EPS, unit_offset=unit_offset, backend=backend)
    assert y.dtype == theirs.dtype
    if dtype == torch.float32:
        assert error(y.detach(), theirs.detach().double()) <= 2**-21
    else:
        assert (y == theirs).float().mean() >= 0.995
    leaves = x, module.weight
    ours = torch.autograd.grad(y, leaves, dy)
    bound = {torch.float32: 2**-20, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for a, b in zip(ours, torch.autograd.grad(theirs, leaves, dy), strict=True):
        assert a.dtype == b.dtype and error(a, b.double()) <= bound


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_residual_the_sum_is_x_itself(dtype, backend):
    x, w = floats(9, 50).to(dtype).requires_grad_(), floats(50).to(dtype)
    assert fastlm.rms_norm_residual(x, None, w, backend=backend)[1] is x
    assert_within_twice_torch(
        lambda x, w: fastlm.rms_norm_residual(x, None, w, backend=backend)[0], norm, (floats(9, 50), floats(50)), dtype
    )


def heads_first(x):
    return x.transpose(1, 2)


def one_of_three(x):
    """As queries in a projection that gives queries, keys and values."""
    return torch.stack([x, x + 1, x - 1], -3)[..., 1, :, :].transpose(1, 2)


def spread(x):
    return torch.stack([x, x + 1], 1)[:, 0].permute(2, 0, 1, 3)


@on_backends("cpu", "triton", "cuda")
@on_both_offsets
@pytest.mark.parametrize("view", [heads_first, one_of_three, spread])
def test_heads_with_any_strides_without_a_copy(view, unit_offset, backend):
    """Queries and keys are normalized where they are: (batch, heads, tokens, head_dim) views of a projection."""
    x, w = floats(2, 5, 3, 8), floats(8)
    x = view(x)
    assert not x.is_contiguous()
    dy = view(floats(2, 5, 3, 8) * 2)
    results = []
    for inputs, upstream in (((x, w), dy), ((x.contiguous(), w), dy.contiguous())):
        leaves = [t.detach().requires_grad_() for t in inputs]
        before = sum(layout.copies.values())
        y, _ = fastlm.rms_norm_residual(leaves[0], None, leaves[1], unit_offset=unit_offset, backend=backend)
        gradients = torch.autograd.grad(y, leaves, upstream)
        assert sum(layout.copies.values()) == before
        assert y.is_contiguous()
        results.append((y, *gradients))
    assert_same_bits(*results)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, r, w = floats(6, 20), floats(20, 6).t().contiguous(), floats(20)
    variants = [
        (floats(6, 60)[:, 5:25], floats(6, 44)[:, 1:21], w),
        (x[:1].expand(6, 20), r, w[:1].expand(20)),
        (x, r[:1].expand(6, 20), floats(40)[::2]),
        (floats(20, 6).t(), floats(6, 40)[:, ::2], w),
        (floats(3, 6, 20)[:, ::2].transpose(0, 1), floats(3, 3, 20), w),
        (floats(2, 3, 2, 3, 20).permute(3, 1, 0, 2, 4), floats(3, 3, 2, 2, 20).transpose(0, 1), w),
    ]
    for variant in variants:
        results = []
        dy, ds = floats(*variant[0].shape), floats(1, 20).expand(variant[0].shape)
        for inputs, upstream in ((variant, (dy, ds)), ([t.contiguous() for t in variant], (dy, ds.contiguous()))):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y, s = fastlm.rms_norm_residual(*leaves, backend=backend)
            assert y.is_contiguous() and s.is_contiguous()
            results.append((y, s, *torch.autograd.grad((y, s), leaves, upstream)))
        assert_same_bits(*results)


@on_every_backend
@on_both_offsets
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_residual_and_float32_weights_in_a_16_bit_model(
    dtype, residual_dtype, weight_dtype, unit_offset, backend
):
    residual_dtype, weight_dtype = residual_dtype or dtype, weight_dtype or dtype
    inputs = [floats(4, 70).to(dtype), floats(70, 4).t().to(residual_dtype), floats(70).to(weight_dtype)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, s = fastlm.rms_norm_residual(*leaves, unit_offset=unit_offset, backend=backend)
    assert (y.dtype, s.dtype) == (dtype, residual_dtype)
    assert torch.equal(s, (inputs[0].float() + inputs[1].float()).to(residual_dtype))
    dy, ds = floats(4, 70, 1)[..., 0].to(dtype), floats(4, 70).to(residual_dtype)
    got = torch.autograd.grad((y, s), leaves, (dy, ds))
    assert [g.dtype for g in got] == [dtype, residual_dtype, weight_dtype]

    # The norm reads the sum as it is stored, so the true results start from the rounded sum.
    stored, w = (t.detach().double().requires_grad_() for t in (s, leaves[2]))
    true_y = norm(stored, w, unit_offset)
    through, true_dw = torch.autograd.grad(true_y, (stored, w), dy.double())
    truths = true_y.detach(), through + ds, through + ds, true_dw
    # One rounding of a result, two of y as Llama rounds it; in float32 a few of them, in the sums.
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for i, (a, truth) in enumerate(zip((y.detach(), *got), truths, strict=True)):
        assert error(a, truth) < rounding[a.dtype] * (2 if i == 0 and not unit_offset else 1)


@on_every_backend
def test_upstream_gradient_of_one_result_only(backend):
    def gradients(which):
        leaves = [floats(4, 30).requires_grad_(), floats(30, 4).t().requires_grad_(), floats(30).requires_grad_()]
        results = fastlm.rms_norm_residual(*leaves, backend=backend)
        chosen = [results[i] for i in which]
        return torch.autograd.grad(
            chosen, leaves, [floats(4, 30) * (i + 1) for i in which], allow_unused=True, materialize_grads=True
        )

    both, first, second = gradients((0, 1)), gradients((0,)), gradients((1,))
    assert all(torch.equal(d, floats(4, 30) * 2) for d in second[:2]) and not second[2].any()
    for a, b, c in zip(both, first, second, strict=True):
        torch.testing.assert_close(a, b + c)


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = floats(6, 10), floats(10, 6).t(), floats(10)

    def gradients(asked):
        leaves = [t.clone().requires_grad_(i in asked) for i, t in enumerate(inputs)]
        y, s = fastlm.rms_norm_residual(*leaves, backend=backend)
        torch.autograd.backward(
            [t for t in (y, s) if t.requires_grad], [floats(6, 10)] * (y.requires_grad + s.requires_grad)
        )
        return [t.grad for t in leaves]

    whole = gradients((0, 1, 2))
    for i in range(3):
        alone = gradients((i,))
        torch.testing.assert_close(alone[i], whole[i])
        assert all(g is None for j, g in enumerate(alone) if j != i)


@on_every_backend
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_eps(eps, backend):
    x, w = floats(5, 40) * 1e-3, floats(40)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w
    torch.testing.assert_close(fastlm.rms_norm_residual(x, None, w, eps, backend=backend)[0], expected)


@on_every_backend
def test_rows_of_zeros_and_nan_rows(backend):
    x, w = floats(4, 16), floats(16)
    x[1] = 0
    x[2, 5] = torch.nan
    y, _ = fastlm.rms_norm_residual(x, None, w, backend=backend)
    assert not y[1].any() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 45, 9000])
@pytest.mark.parametrize("size", [1e17, 1e20, 1e38])
def test_a_sum_of_squares_that_overflows_is_not_hidden(size, width, dtype, backend):
    """The row and its gradients are NaN. A factor of 0 would give results and gradients of 0."""
    x, w = floats(3, width), floats(width)
    x[1] *= size
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    y, _ = fastlm.rms_norm_residual(leaves[0], None, leaves[1], backend=backend)
    dx, dw = torch.autograd.grad(y, leaves, floats(3, width, 1)[..., 0].to(dtype))
    if size >= 1e20:
        assert y[1].isnan().all() and dx[1].isnan().all() and dw.isnan().all()
        y, dx = y[[0, 2]], dx[[0, 2]]
    else:
        assert dw.isfinite().all()
    assert y.isfinite().all() and dx.isfinite().all()


@on_backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [24, 100])
def test_dropout_follows_the_definition(width, residual_dtype, backend):
    inputs = [floats(7, width).bfloat16(), floats(width, 7).t().to(residual_dtype), floats(width)]

    def seeded(name):
        def operator(*t):
            torch.manual_seed(3)
            return fastlm.rms_norm_residual(*t, dropout_p=0.3, backend=name)

        leaves = [t.clone().requires_grad_() for t in inputs]
        y, s = operator(*leaves)
        return y.detach(), s.detach(), *torch.autograd.grad((y, s), leaves, (inputs[0], inputs[1]))

    ours, expected = seeded(backend), seeded("reference")
    assert torch.equal(ours[1], expected[1]) and torch.equal(ours[2] == 0, expected[2] == 0)
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b.double()) <= (2**-20 if a.dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_eps_beyond_float32_leaves_nothing(dtype, backend):
    y, _ = fastlm.rms_norm_residual(floats(3, 45).to(dtype), None, floats(45).to(dtype), 1e300, backend=backend)
    assert not y.any()


def call(**changed):
    arguments = {"x": floats(2, 5), "residual": floats(2, 5), "weight": floats(5)} | changed
    return fastlm.rms_norm_residual(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.empty(3, 0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(3, 0\)"),
        ({"residual": floats(5)}, r"residual: expected shape \(2, 5\), as x, got \(5,\)"),
        (
            {"residual": floats(2, 5).half()},
            r"residual: expected torch.float32, as x, on cpu, got torch.float16 on cpu",
        ),
        ({"weight": floats(4)}, r"weight: expected shape \(5,\), the last dimension of x, got \(4,\)"),
        ({"weight": floats(5).double()}, r"weight: expected torch.float32, as x, on cpu, got torch.float64 on cpu"),
        ({"eps": 0.0}, r"eps: expected a finite number above 0, got 0.0"),
        ({"unit_offset": 1}, r"unit_offset: expected True or False, got 1"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


@on_backends("cpu")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 63, 700])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(rows, backend):
    """The backward sums over several rows at a time."""
    x, w, dy = floats(701, 72), floats(72), floats(701, 72, 1)[..., 0]

    def results(some):
        leaf = x[some].clone().requires_grad_()
        y, _ = fastlm.rms_norm_residual(leaf, None, w, backend=backend)
        return y.detach(), torch.autograd.grad(y, leaf, dy[some])[0]

    whole = results(slice(None))
    assert_same_bits(results(slice(1, 1 + rows)), [t[1 : 1 + rows] for t in whole])


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
        y, s = fastlm.rms_norm_residual(x, residual, weight, dropout_p=0.1, backend=backend)
        return y.detach(), s.detach(), *torch.autograd.grad((y, s), (x, residual), (dy.detach(), ds.detach()))

    whole = floats(512, width).to(dtype).repeat(rows // 512 + 1, 1)[:rows]
    weight = floats(width).to(dtype)
    large, small = results(slice(None)), results(slice(0, 700))
    assert_same_bits([result[:700] for result in large], small)
