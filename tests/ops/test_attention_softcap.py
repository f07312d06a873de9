"""Scores of attention capped to ±softcap by tanh."""

import pytest
import torch

import fastlm
from tests.ops.attention import MASK_SHAPES, NON_FINITE, SIZES, bool_mask, capped_own, qkv, seen
from tests.support import DTYPES, SLOW, assert_same_bits, assert_within_twice_torch, error, floats, on_backends


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_capped_scores(sizes, causal, dtype, backend):
    q, k, v = qkv(*sizes)
    if causal and sizes[3] > sizes[4]:
        q = q[:, :, : sizes[4]]
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, causal=causal, softcap=1.0, backend=backend),
        capped_own(1.0, seen(q.shape[2], sizes[4], causal) if causal else None),
        (q, k, v),
        dtype,
    )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_come_after_the_cap(shape, dtype, backend):
    """The gradient of an additive mask has no derivative of the cap."""
    inputs = qkv(2, 3, 3, 9, 21, 16)
    assert_within_twice_torch(
        lambda q, k, v, m: fastlm.attention(q, k, v, mask=m, softcap=1.0, scale=-0.7, backend=backend),
        capped_own(1.0, scale=-0.7),
        (*inputs, floats(*shape)),
        dtype,
    )
    visible = bool_mask(shape)
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, mask=visible, softcap=1.0, backend=backend),
        capped_own(1.0, visible),
        inputs,
        dtype,
    )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("scale, softcap", [(None, 50.0), (1.0, 0.7), (0.0, 0.7), (-0.3, 0.7)])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 9, 9, 16), (2, 4, 1, 1, 300, 64)], ids=str)
def test_scale_and_cap(sizes, scale, softcap, backend):
    ours = lambda *t: fastlm.attention(*t, scale=scale, softcap=softcap, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, capped_own(softcap, scale=scale), qkv(*sizes), torch.float32)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("softcap", [1e-30, 0.03, 30.0, 1e30])
def test_the_cap_is_accurate_at_every_size(softcap, backend):
    """The log-sum-exp of one key is its capped score. Ratios of score and cap below 2⁻¹²⁶ underflow."""
    scores = torch.cat([sign * torch.logspace(-30, 30, 999) for sign in (1, -1)])[None, None, :, None]
    one = torch.ones(1, 1, 1, 1)
    lse = fastlm.attention(scores, one, one, scale=1.0, softcap=softcap, return_lse=True, backend=backend)[1]
    exact = softcap * torch.tanh(scores[..., 0].double() / softcap)
    assert ((lse.double() - exact).abs() <= 2**-21 * exact.abs() + max(1, softcap) * 2**-125).all()


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_beyond_the_cap_are_equal_and_have_no_gradient(dtype, backend):
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 2, 5, 40, 16))
    q, k = q.abs() * 100, k.abs() * 100
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fastlm.attention(*leaves, softcap=0.5, backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape), rtol=2e-2, atol=1e-2)
    dq, dk, dv = torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype))
    assert not dq.any() and not dk.any() and dv.any()


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_only_visible_key_has_a_weight_of_one_with_a_cap(dtype, backend):
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 2, 30, 30, 16))
    out = fastlm.attention(q * 9e3, k, v, window=(0, 0), softcap=3e3, backend=backend)
    assert error(out, v.double()) <= 2**-20  # the product with v in three tf32 products; a score is rounded to 2⁻¹³


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("where", ["key", "value"])
def test_masked_values_never_reach_a_capped_result(where, backend):
    hidden = torch.zeros(1, 24, dtype=torch.bool)
    hidden[:, 20:] = hidden[0, 3] = True
    visible = ~hidden[:, None, None]
    for arguments in ({"key_padding": ~hidden}, {"mask": torch.where(visible, 0.5, -torch.inf), "causal": True}):
        results = []
        for masked_value in (0.0, *NON_FINITE):
            q, k, v = qkv(1, 2, 1, 24, 24, 8)
            (k if where == "key" else v).masked_fill_(hidden[:, None, :, None], masked_value)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = fastlm.attention(*leaves, softcap=1.0, backend=backend, **arguments)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                torch.testing.assert_close(a, b)


@on_backends("reference", "cpu", "triton", "cuda")
def test_a_visible_nan_is_not_capped(backend):
    q, k, v = qkv(1, 1, 1, 6, 6, 8)
    k[0, 0, 2, 3] = torch.nan
    out = fastlm.attention(q, k, v, causal=True, softcap=1.0, backend=backend)
    assert out[:, :, 2:].isnan().all() and out[:, :, :2].isfinite().all()


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_dropout_of_capped_scores(dtype, backend):
    """In the results and in the gradients, which are those of a float64 reference with the same mask."""
    q, k, v = qkv(1, 2, 1, 40, 70, 16)

    def run(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        torch.manual_seed(3)
        out = fastlm.attention(*leaves, causal=True, dropout_p=0.3, softcap=1.0, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype))]

    ours, exact = run(backend, dtype), run("reference", torch.float64)
    for a, truth in zip(ours, exact, strict=True):
        assert error(a, truth) <= (2**-6 if dtype == torch.bfloat16 else 2**-18)


@on_backends("cpu", "cuda")
def test_second_derivatives_of_capped_scores(backend):
    """More keys than one tile holds, and gradients that are differentiated by the formula."""
    length = 40 if backend in SLOW else 600
    inputs = qkv(1, 2, 1, length, length, 16)

    def twice(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = fastlm.attention(*leaves, causal=True, softcap=1.0, backend=backend)
        gradients = torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype), create_graph=True)
        return [*gradients, *torch.autograd.grad(gradients, leaves, [floats(*g.shape).to(dtype) for g in gradients])]

    for a, truth in zip(twice(backend, torch.float32), twice("reference", torch.float64), strict=True):
        assert error(a, truth) <= 2**-15


@on_backends("cpu")
def test_capped_scores_have_the_same_bits_on_every_thread_count(backend):
    inputs, threads, results = qkv(2, 4, 2, 300, 300, 32), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = fastlm.attention(*leaves, causal=True, softcap=2.0, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))])
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_pytorchs_kernel_is_not_selected_for_capped_scores():
    q, k, v = (x.double() for x in qkv(1, 2, 2, 5, 7, 8))
    with pytest.raises(fastlm.Unsupported, match="torch has no cap of the scores"):
        fastlm.attention(q, k, v, softcap=1.0, backend="torch")
    torch.testing.assert_close(fastlm.attention(q, k, v, softcap=1.0), capped_own(1.0)(q, k, v))
