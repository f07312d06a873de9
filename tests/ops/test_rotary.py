import pytest
import torch

import fastlm
from fastlm.core import layout
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

SIZES = [  # batch, heads, key heads, tokens, head_dim, rotary_dim, batch of the tables
    (2, 4, 2, 7, 64, 64, 1),
    (2, 3, 1, 5, 80, 32, 2),
    (1, 1, 1, 1, 2, 2, 1),
    (3, 2, 2, 4, 7, 6, 3),
    (2, 2, 1, 300, 34, 34, 1),
    (0, 2, 1, 3, 8, 8, 1),
    (2, 2, 1, 0, 8, 8, 2),
    (1, 6, 2, 3, 256, 64, 1),
]


def tables(batch, tokens, rotary_dim, dtype=torch.float32):
    """Not those of one angle per pair: each channel has its own cosine and sine."""
    return floats(batch, tokens, rotary_dim, dtype=dtype), floats(batch, tokens, rotary_dim, 1, dtype=dtype)[..., 0]


def rotate(x, cos, sin):
    """As transformers' models do."""
    cos, sin, dim = cos[:, None], sin[:, None], cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    swapped = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
    return torch.cat((turned * cos + swapped * sin, rest), -1)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_close_to_float64_as_torch(size, dtype, backend):
    batch, heads, key_heads, tokens, head_dim, rotary_dim, table_batch = size
    inputs = floats(batch, heads, tokens, head_dim), floats(batch, key_heads, tokens, head_dim)
    cos, sin = tables(table_batch, tokens, rotary_dim)

    def ours(q, k):
        return fastlm.rotary(q, k, cos, sin, backend=backend)

    def torch_own(q, k):
        # Tables in the model's dtype, as transformers has them; in float64 those of `ours`.
        both = [t.to(q.dtype) for t in (cos, sin)]
        return rotate(q, *both), rotate(k, *both)

    assert_within_twice_torch(ours, torch_own, inputs, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_transformers_rotates(dtype, backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    query, key = floats(2, 4, 9, 16).to(dtype), floats(2, 2, 9, 16).to(dtype)
    angles = torch.arange(9)[:, None] / 10 ** torch.arange(8)
    angles = torch.cat((angles, angles), -1)[None]
    cos, sin = angles.cos(), angles.sin()
    expected = llama.apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
    for a, b in zip(fastlm.rotary(query, key, cos, sin, backend=backend), expected, strict=True):
        bound = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert a.dtype == dtype and error(a, b.double()) <= bound


@on_every_backend
def test_the_gradient_rotates_back(backend):
    angles = floats(1, 5, 8)
    angles = torch.cat((angles, angles), -1)
    query, key = floats(2, 3, 5, 16).requires_grad_(), floats(2, 1, 5, 16).requires_grad_()
    turned = fastlm.rotary(query, key, angles.cos(), angles.sin(), backend=backend)
    gradients = torch.autograd.grad(turned, (query, key), [t.detach() for t in turned])
    for a, b in zip(gradients, (query, key), strict=True):
        assert error(a, b.detach().double()) <= 2**-21


@on_every_backend
def test_upstream_gradient_of_one_result_only(backend):
    cos, sin = tables(1, 5, 8)
    inputs = floats(2, 3, 5, 8), floats(2, 1, 5, 8)

    def gradients(which):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results = fastlm.rotary(*leaves, cos, sin, backend=backend)
        return torch.autograd.grad([results[i] for i in which], leaves, [inputs[i] for i in which], allow_unused=True)

    both, query, key = gradients((0, 1)), gradients((0,)), gradients((1,))
    assert torch.equal(both[0], query[0]) and torch.equal(both[1], key[1]) and query[1] is None and key[0] is None


@on_backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("view", ["heads", "packed", "expanded"])
def test_any_strides_without_a_copy(view, backend):
    query, key = floats(2, 5, 4, 8), floats(2, 5, 2, 8)
    if view == "packed":
        packed = floats(2, 5, 8, 8)
        query, key = packed[:, :, :4], packed[:, :, 4:6]
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if view == "expanded":
        query, key = query[:, :1].expand(-1, 4, -1, -1), key[:1].expand(2, -1, -1, -1)
    cos, sin = (t[..., 1:7] for t in tables(2, 5, 8))

    def results(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        turned = fastlm.rotary(*leaves, *inputs[2:], backend=backend)
        upstream = [floats(*t.shape[:1], 5, t.shape[1], 8).transpose(1, 2) for t in turned]
        return *turned, *torch.autograd.grad(turned, leaves, upstream)

    before = layout.copies.total()
    strided = results(query, key, cos, sin)
    assert layout.copies.total() == before and all(t.is_contiguous() for t in strided[:2])
    assert_same_bits(strided, results(*(t.contiguous() for t in (query, key, cos, sin))))


@on_every_backend
def test_nan_stays_in_its_pair(backend):
    query = floats(1, 1, 2, 8)
    query[0, 0, 1, 5] = torch.nan
    turned, _ = fastlm.rotary(query, query, *tables(1, 2, 8), backend=backend)
    assert {tuple(at) for at in turned.isnan().nonzero().tolist()} == {(0, 0, 1, 1), (0, 0, 1, 5)}


def test_results_do_not_depend_on_the_backend():
    """Each is one rounding of the same float32 products."""
    inputs = floats(2, 3, 5, 16), floats(2, 1, 5, 16)
    cos, sin = tables(1, 5, 12)
    expected = outputs_and_gradients(
        lambda q, k: fastlm.rotary(q, k, cos, sin, backend="reference"), inputs, torch.bfloat16
    )
    got = outputs_and_gradients(lambda q, k: fastlm.rotary(q, k, cos, sin), inputs, torch.bfloat16)
    assert all((a == b).float().mean() > 0.98 for a, b in zip(got, expected, strict=True))


def call(**changed):
    arguments = {"query": floats(2, 4, 5, 8), "key": floats(2, 2, 5, 8), "cos": floats(1, 5, 6), "sin": floats(1, 5, 6)}
    return fastlm.rotary(**(arguments | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"query": floats(5, 8)}, r"query: expected shape \(batch, heads, tokens, head_dim\), .*, got \(5, 8\)"),
        ({"key": floats(2, 2, 4, 8)}, r"key: expected shape \(2, key heads, 5, 8\), as query, got \(2, 2, 4, 8\)"),
        ({"key": floats(2, 2, 5, 8).half()}, r"key: expected torch.float32 on cpu, as query, got torch.float16 on cpu"),
        ({"cos": floats(1, 5, 5)}, r"cos: expected an even last dimension \(rotary_dim\) of 2 to 8, .*, got 5"),
        ({"cos": floats(1, 5, 10)}, r"cos: expected an even last dimension \(rotary_dim\) of 2 to 8, .*, got 10"),
        ({"cos": floats(1, 5, 0)}, r"cos: expected an even last dimension \(rotary_dim\) of 2 to 8, .*, got 0"),
        ({"cos": floats(1, 4, 6)}, r"cos: expected shape \(2 or 1, 5, rotary_dim\), got \(1, 4, 6\)"),
        ({"cos": floats(3, 5, 6)}, r"cos: expected shape \(2 or 1, 5, rotary_dim\), got \(3, 5, 6\)"),
        ({"sin": floats(5, 6)}, r"sin: expected shape \(2 or 1, 5, rotary_dim\), got \(5, 6\)"),
        ({"sin": floats(1, 5, 4)}, r"sin: expected shape \(1, 5, 6\), as cos, got \(1, 5, 4\)"),
        ({"cos": floats(1, 5, 6).half()}, r"cos: expected torch.float32 on cpu, got torch.float16 on cpu"),
        ({"sin": floats(1, 5, 6).requires_grad_()}, r"sin: expected a table that requires no gradient, got one that"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
