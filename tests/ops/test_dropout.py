"""Dropout inside operators: masks are bit-identical on every backend and in backward, and drop the right share."""

import math

import pytest
import torch

import fastlm
from fastlm.core import philox
from fastlm.ops.attention.spec import UNLIMITED
from tests.support import DTYPES, error, floats, on_backends

WIDTHS = [1, 15, 16, 17, 63, 64, 65, 200]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822]


def kept_by_layernorm(backend, rows, width, p, seed, dtype=torch.float32):
    """Which elements the operator keeps of an input of ones."""
    x = torch.ones(rows, width, dtype=dtype)
    summed = torch.ops.fastlm.layernorm_residual_forward(
        x, None, torch.ones(width), None, torch.tensor(seed), 1e-5, p, backend
    )[1]
    scaled = torch.tensor(1 / (1 - p), dtype=torch.float32).to(dtype)
    assert set(summed.unique().tolist()) <= {0.0, scaled.item()}
    return summed != 0


def kept_by_attention(backend, batch, heads, query_len, key_len, p, seed):
    """Which weights the operator keeps: all are equal, and the values are one-hot in the position of the key."""
    q, k = torch.zeros(batch, heads, query_len, key_len), torch.zeros(batch, heads, key_len, key_len)
    one_hot = torch.eye(key_len).expand(batch, heads, key_len, key_len)
    masks, band = (None, None, None, None), (-UNLIMITED, UNLIMITED)
    tensors = q, k, one_hot, *masks, torch.tensor(seed)
    out = torch.ops.fastlm.attention_forward(*tensors, 1.0, 0.0, *band, p, False, False, backend)[0]
    return out != 0


@on_backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("seed", SEEDS)
def test_layernorm_dropout_masks_follow_the_definition(seed, backend):
    for width in WIDTHS:
        expected = philox.dropout_mask(torch.tensor(seed), 9, width, torch.tensor(0), 0.37)
        assert torch.equal(kept_by_layernorm(backend, 9, width, 0.37, seed), expected)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("seed", SEEDS[-2:])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 64), (9, 70), (70, 9), (3, 200)], ids=str)
def test_attention_dropout_masks_follow_the_definition(lengths, seed, backend):
    """Rows and columns count from the start of each sequence, and every batch and head has its own counters."""
    third = torch.arange(6).view(2, 3)
    expected = philox.dropout_mask(torch.tensor(seed), *lengths, third, 0.37)
    assert torch.equal(kept_by_attention(backend, 2, 3, *lengths, 0.37, seed), expected)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.999])
def test_the_share_of_kept_elements(p, backend):
    """It is within five standard deviations of 1 − p, over all elements and in each of 64 columns."""
    kept = kept_by_layernorm(backend, 2000, 64, p, 1234)
    for share, n in ((kept.float().mean(), kept.numel()), *((column, 2000) for column in kept.float().mean(0))):
        assert abs(share - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-7


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, "x", torch.float32], ids=str)
def test_layernorm_with_dropout_matches_layernorm_of_masked_inputs(residual_dtype, dtype, backend):
    x, w, b = floats(7, 50).to(dtype), floats(50).to(dtype), floats(1, 50)[0].to(dtype)
    residual = None
    if residual_dtype is not None:
        residual = floats(50, 7).t().contiguous().to(dtype if residual_dtype == "x" else residual_dtype)
    p = 0.4
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, residual, w, b)]
    torch.manual_seed(5)
    y, s = fastlm.layernorm_residual(*leaves, dropout_p=p, backend=backend)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    keep = philox.dropout_mask(seed, 7, 50, torch.tensor(0), p)

    wide = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    dropped = torch.where(keep, wide[0] / (1 - p), 0)
    truth = dropped if residual is None else dropped + wide[1]
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    assert error(s.detach(), truth.detach()) <= rounding[s.dtype]
    stored = truth + (s.detach().double() - truth.detach())  # LayerNorm reads the sum as it is stored
    normalised = torch.nn.functional.layer_norm(stored, (50,), wide[2], wide[3])
    dy, ds = floats(7, 50, 1)[..., 0].to(dtype), floats(1, 7, 50)[0].to(s.dtype)
    given = [i for i, t in enumerate(leaves) if t is not None]
    got = torch.autograd.grad((y, s), [leaves[i] for i in given], (dy, ds))
    expected = torch.autograd.grad((normalised, stored), [wide[i] for i in given], (dy.double(), ds.double()))
    assert error(y.detach(), normalised.detach()) <= rounding[dtype]
    for a, e in zip(got, expected, strict=True):
        assert error(a, e) <= rounding[a.dtype]
    assert not got[0][~keep].any()


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout_matches_attention_with_masked_weights(dtype, backend):
    """With grouped queries, causal, an additive mask and the log-sum-exp, and the gradients of all of them.

    Dropout does not change the log-sum-exp.
    """
    p, sizes = 0.3, (2, 4, 40, 40, 16)
    inputs = [floats(2, 4, 40, 16), floats(2, 2, 40, 16), floats(16, 2, 40, 2).transpose(0, 3), floats(1, 4, 40, 40)]
    leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
    torch.manual_seed(5)
    out, lse = fastlm.attention(*leaves[:3], mask=leaves[3], causal=True, dropout_p=p, return_lse=True, backend=backend)
    torch.manual_seed(5)
    keep = philox.dropout_mask(torch.randint(-(2**63), 2**63 - 1, ()), 40, 40, torch.arange(8).view(2, 4), p)

    def plain(q, k, v, mask):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT / 4 + mask).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
        weights = torch.where(keep, torch.softmax(scores, -1) / (1 - p), 0).to(q.dtype)
        return weights @ v, scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)

    upstream = floats(*sizes[:3], 16).to(dtype), floats(*sizes[:3])

    def gradients(function, dtype):
        own = [t.detach().to(dtype).requires_grad_() for t in leaves]
        results = function(*own)
        return [
            *(y.detach() for y in results),
            *torch.autograd.grad(results, own, [u.to(y.dtype) for u, y in zip(upstream, results, strict=True)]),
        ]

    got = [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, upstream)]
    floor = {torch.float32: 2**-21, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    for a, b, truth in zip(got, gradients(plain, dtype), gradients(plain, torch.float64), strict=True):
        assert error(a, truth) <= 2 * error(b, truth) + floor


@on_backends("reference", "cpu", "triton", "cuda")
def test_calls_differ_and_manual_seed_repeats(backend):
    def draw():
        ln = fastlm.layernorm_residual(torch.ones(4, 40), None, torch.ones(40), dropout_p=0.5, backend=backend)[1]
        return ln, fastlm.attention(*[floats(1, 2, 9, 8)] * 3, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    again = draw()
    for a, b, c in zip(first, second, again, strict=True):
        assert not torch.equal(a, b) and torch.equal(a, c)


def test_backends_draw_the_same_masks():
    results = []
    for backend in ("reference", None):  # None selects the compiled kernels, if there are any, and never `torch`
        torch.manual_seed(3)
        results.append(fastlm.attention(*[floats(1, 2, 9, 8)] * 3, dropout_p=0.5, backend=backend))
    torch.testing.assert_close(*results)


def test_philox_matches_known_answers():
    """The known answers of Random123 (Salmon et al., 2011) for philox4x32-10."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        words = philox.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
        assert tuple(int(word) for word in words) == expected


def test_the_counter_and_word_of_a_column():
    """Column c of row r: word (c // 16) % 4 of counter ((c // 64)·16 + c % 16, r, third, 0), key the seed."""
    seed, p = 0x299F31D0A4093822, 0.5
    kept = philox.dropout_mask(torch.tensor(seed), 3, 150, torch.tensor(6), p)
    for row, column in ((0, 0), (2, 17), (1, 63), (1, 64), (2, 149)):
        counter = (column // 64 * 16 + column % 16, row, 6, 0)
        words = philox.philox(
            tuple(torch.tensor(c) for c in counter), (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
        )
        assert kept[row, column] == (int(words[column // 16 % 4]) >= 2**31)
