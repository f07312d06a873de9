"""Scores from 10⁴ to infinity, where the rounding of one score is larger than the differences that softmax needs."""

import math
import platform

import pytest
import torch

import fastlm
from fastlm.backends import isa
from tests.ops.attention import seen, torch_own
from tests.support import DTYPES, FLOOR, error, floats, on_backends, on_every_backend, outputs_and_gradients

HEAD_DIMS = [8, 32, 48, 64, 128]  # only that of 64 has a scale by which products are exact
SCALES = [None, 0.3, -0.3]
SIZES = [2.0, 2.0**13, 2.0**46]  # of the inputs: scores up to 10⁴, 10¹¹ and 10³¹
CASES = [(dtype, size) for dtype in DTYPES for size in SIZES if dtype != torch.float16 or size == 2]


def inputs(head_dim, size=1.0, query_len=5, key_len=5, heads=2):
    """Small integers times size: their products have no rounding error, in any order, before they are scaled.

    Neighbouring keys are nearly equal, but no two scores of a row are equal: a log-sum-exp in float32 has no room for
    log 2 beside such scores.
    """
    query = (floats(1, heads, query_len, head_dim) * 2).round() * 8
    key = (floats(1, heads, key_len, head_dim + 1)[..., 1:] * 2).round() * 8
    key[:, :, 1::2] = key[:, :, : key_len // 2 * 2 : 2]
    query[..., 0], key[..., 0] = 1, torch.arange(key_len)
    return query * size, key * size, floats(1, heads, key_len, head_dim + 2)[..., 2:].contiguous()


def formula(q, k, v, bias=0.0, scale=None):
    """The operator in plain PyTorch: in float64 PyTorch's own kernel loses a log-sum-exp beside such scores too."""
    return torch.softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias, -1) @ v


def rounded_products(query, key, scale, backend):
    """The rounding of scaled scores before a bias is added, where no fused multiply-add exists: SSE2."""
    if backend != "cpu" or isa.name != "baseline" or platform.machine() != "x86_64":
        return 0.0
    return (query @ key.mT).abs().max().item() * (query.shape[-1] ** -0.5 if scale is None else abs(scale)) * 2**-24


def assert_as_close_as_torch(inputs, dtype, size, scale, backend, bias=0.0):
    """assert_within_twice_torch with `formula` as the truth.

    Where one key has all the weight, the gradient of a score is the rounding of two sums over head_dim that cancel.
    Times the size of the inputs it is the floor of the gradients of query and key.
    """
    wide = [x.to(dtype).double() for x in inputs]
    mask = bias if torch.is_tensor(bias) else None
    truths = outputs_and_gradients(lambda *t: formula(*t, bias, scale), wide, torch.float64, dtype)
    theirs = outputs_and_gradients(lambda *t: torch_own(mask, scale)(*t), inputs, dtype)
    attend = lambda *t: fastlm.attention(*t, mask=mask, scale=scale, backend=backend)  # noqa: E731
    ours = outputs_and_gradients(attend, inputs, dtype)
    of_scores = rounded_products(*inputs[:2], scale, backend) if mask is not None else 0.0
    for i, (a, b, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        largest = 16 * inputs[0].shape[-1] * size if i in (1, 2) else truth.abs().max().item()
        floor = FLOOR[dtype] * largest + min(of_scores, 1.0) * truth.abs().max().item()
        worst, allowed = ((x.double() - truth).abs().max().item() for x in (a, b))
        # PyTorch's gradients are not finite where the products of its forward and backward pass round differently.
        if backend == "torch" and not math.isfinite(allowed):
            continue
        close = math.isfinite(worst) and (math.isnan(allowed) or worst <= 2 * allowed + floor)
        assert close, f"result {i}: {worst:.2e} against torch's {allowed:.2e}"


@on_every_backend
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype, size", CASES, ids=str)
def test_as_close_to_float64_as_torch(dtype, size, head_dim, scale, backend):
    assert_as_close_as_torch(inputs(head_dim, size, 24, 24), dtype, size, scale, backend)


@on_every_backend
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [150.0, 1e5, 1e15])
def test_products_that_are_rounded(size, head_dim, backend):
    q, k, v = floats(1, 2, 4, head_dim) * size, floats(2, 1, 4, head_dim).transpose(0, 1) * size, floats(1, 2, 4, 8)
    k = k.flip(2)
    v = torch.nn.functional.pad(v, (0, head_dim - 8))
    truth = torch_own()(q.double(), k.double(), v.double())
    assert error(fastlm.attention(q, k, v, backend=backend), truth) <= 2 * error(torch_own()(q, k, v), truth) + 2**-21


@on_backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", SIZES)
def test_biases_of_the_size_of_the_scores(size, head_dim, scale, backend):
    bias = floats(1, 2, 24, 24) * size**2
    assert_as_close_as_torch(inputs(head_dim, size, 24, 24), torch.float32, size, scale, backend, bias)


def one_visible_key(kind):
    """Arguments with which query i attends to key i only."""
    eye = torch.eye(5, dtype=torch.bool)
    if kind == "window":
        return {"window": (0, 0)}
    if kind == "bool mask":
        return {"mask": eye[None, None]}
    return {"mask": torch.where(eye, floats(5, 5) * 1e4, -torch.inf)[None, None]}


def assert_products_with_1(product, factor, backend):
    """A float32 product of a GPU is one of two parts of 11 bits."""
    if backend in ("triton", "cuda") and factor.dtype == torch.float32:
        torch.testing.assert_close(product, factor, rtol=2**-21, atol=0)
    else:
        assert torch.equal(product, factor)


def assert_negligible(dquery, dkey, size, head_dim, backend):
    """The gradients of the only visible score are 0, on a GPU up to the order of the sums over head_dim."""
    rounding = 0 if backend in ("reference", "cpu") else 2**-17 * head_dim * size
    assert max(dquery.abs().max(), dkey.abs().max()) <= rounding


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("kind", ["window", "bool mask", "additive mask"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype, size", CASES, ids=str)
def test_one_visible_key_has_a_weight_of_exactly_1(dtype, size, head_dim, scale, kind, backend):
    attend = lambda *t: fastlm.attention(*t, scale=scale, **one_visible_key(kind), backend=backend)  # noqa: E731
    q, k, v = inputs(head_dim, size)
    out, dquery, dkey, dvalue = outputs_and_gradients(attend, (q, k, v), dtype)
    assert_products_with_1(out, v.to(dtype), backend)
    assert_products_with_1(dvalue, floats(*out.shape).to(dtype), backend)
    assert_negligible(dquery, dkey, size, head_dim, backend)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("head_dim", [24, 48])
@pytest.mark.parametrize("size", SIZES)
def test_one_token_per_packed_sequence_has_a_weight_of_exactly_1(size, head_dim, backend):
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in inputs(head_dim, size))
    starts = torch.arange(6)
    attend = lambda *t: fastlm.attention_varlen(*t, starts, starts, backend=backend)  # noqa: E731
    out, dquery, dkey, dvalue = outputs_and_gradients(attend, (q, k, v), torch.float32)
    assert_products_with_1(out, v, backend)
    assert_products_with_1(dvalue, floats(*out.shape), backend)
    assert_negligible(dquery, dkey, size, head_dim, backend)


@on_every_backend
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("query_len", [1, 20], ids=["decode", "tiles"])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_key_twice_has_twice_the_same_weight(size, query_len, scale, backend):
    """Also where the two keys are in different tiles or splits, whose maxima are compared."""
    q, k, v = inputs(48, size, query_len, 700, 1)
    k[..., 0] = 0  # more keys than integers of 8 bits
    k[:, :, 350:] = k[:, :, :350]
    out = fastlm.attention(q, k, v, scale=scale, backend=backend)
    mean = (v[:, :, 350:].double() + v[:, :, :350].double()) / 2
    truth = torch_own(scale=scale)(q.double(), k[:, :, :350].double(), mean)
    theirs = torch_own(scale=scale)(q, k, v)
    assert error(out, truth) <= 2 * error(theirs, truth) + 2**-21


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("query_len", [1, 5], ids=str)
@pytest.mark.parametrize("key_len", [1, 5, 300])
def test_log_sum_exp_is_correctly_rounded_where_one_key_has_all_the_weight(key_len, query_len, backend):
    q, k, v = inputs(48, 2.0**15, query_len, key_len)
    _, lse = fastlm.attention(q, k, v, return_lse=True, backend=backend)
    truth = torch.logsumexp(q.double() @ k.double().mT * 48**-0.5, -1)
    assert error(lse, truth) <= 2**-21


@on_every_backend
@pytest.mark.parametrize("size", [1e18, 1e19, 1e25])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_overflow_are_nan_as_in_torch(size, causal, backend):
    q, k, v = inputs(48, size, 9, 9)
    # One product is a score: a sum of several that overflow is infinite or NaN by their order.
    k[:, :, :, 1:] = 0
    q[:, :, ::3, 0] = -size
    k[:, :, ::2, 0] *= -1
    mask = seen(9, 9, causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        scores = q @ k.mT * 48**-0.5
        theirs = torch.softmax(torch.where(mask, scores, -torch.inf), -1) @ v
    ours = fastlm.attention(q, k, v, causal=causal, backend=backend)
    some_visible = (torch.where(mask, scores, -torch.inf) != -torch.inf).any(-1)  # the others count as fully masked
    assert size < 1e20 or theirs[some_visible].isnan().any()
    assert torch.equal(ours[some_visible].isnan(), theirs[some_visible].isnan())
    torch.testing.assert_close(ours[some_visible], theirs[some_visible], equal_nan=True)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_values_give_the_scores_no_gradient(dtype, backend):
    """All keys have the same gradient dP then. Beside such scores float32 has no room for the log 2 of two equal keys:
    their weights, recomputed from the log-sum-exp, do not sum to 1."""
    query, key = floats(1, 2, 40, 32) * 300, floats(1, 2, 48, 33)[..., 1:] * 8
    key[:, :, 1::2] = key[:, :, ::2]
    value = torch.full((1, 2, 48, 32), 1.75)
    attend = lambda *t: fastlm.attention(*t, scale=1.0, backend=backend)  # noqa: E731
    out, dquery, dkey, _ = outputs_and_gradients(attend, (query, key, value), dtype)
    assert (out == 1.75).all()
    rounding = 2**-20 * 1.75 * 32  # of a dP, a sum over 32 channels
    assert dquery.abs().max() <= rounding * key.abs().max()
    assert dkey.abs().max() <= rounding * query.abs().max()
