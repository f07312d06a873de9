import inspect

import pytest
import torch
import torch.nn.functional as F

import fastlm
from tests.support import DTYPES, assert_within_twice_torch, floats, on_every_backend


def compare(shapes, backend, dtype=torch.float32, **arguments):
    inputs = [floats(*shape, i + 1)[..., 0] for i, shape in enumerate(shapes)]
    ours = lambda *t: fastlm.scaled_dot_product_attention(*t, backend=backend, **arguments)  # noqa: E731
    assert_within_twice_torch(ours, lambda *t: F.scaled_dot_product_attention(*t, **arguments), inputs, dtype)


def test_the_arguments_are_pytorchs():
    ours = list(inspect.signature(fastlm.scaled_dot_product_attention).parameters)
    assert ours == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "backend"]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 20), (20, 9)], ids=str)
def test_causal_is_aligned_top_left(lengths, is_causal, dtype, backend):
    query_len, key_len = lengths
    compare([(2, 3, query_len, 16), *[(2, 3, key_len, 16)] * 2], backend, dtype, is_causal=is_causal)


@on_every_backend
@pytest.mark.parametrize(
    "shapes",
    [
        [(7, 16), (9, 16), (9, 16)],
        [(3, 7, 16), (3, 9, 16), (3, 9, 16)],
        [(2, 5, 3, 7, 16), (2, 5, 3, 9, 16), (2, 5, 3, 9, 16)],
        [(2, 3, 7, 16), (1, 3, 9, 16), (1, 3, 9, 16)],
        [(2, 3, 7, 16), (3, 9, 16), (2, 3, 9, 16)],
        [(2, 3, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)],
        [(2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 24)],
        [(2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 5)],
    ],
    ids=str,
)
def test_leading_dimensions_and_widths_of_values(shapes, backend):
    compare(shapes, backend)


@on_every_backend
def test_grouped_queries(backend):
    compare([(2, 6, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16)], backend, enable_gqa=True)


@on_every_backend
@pytest.mark.parametrize("mask_shape", [(7, 9), (1, 9), (3, 7, 9), (2, 1, 1, 9), (2, 3, 7, 9)], ids=str)
@pytest.mark.parametrize("bool_mask", [False, True])
def test_masks_broadcast(mask_shape, bool_mask, backend):
    mask = floats(*mask_shape)
    compare([(2, 3, 7, 16), *[(2, 3, 9, 16)] * 2], backend, attn_mask=mask > -0.7 if bool_mask else mask, scale=0.3)
    compare([(5, 2, 3, 7, 16), *[(5, 2, 3, 9, 16)] * 2], backend, attn_mask=mask > -0.7 if bool_mask else mask)


def call(**changed):
    q = floats(2, 4, 7, 8)
    return fastlm.scaled_dot_product_attention(**({"query": q, "key": q, "value": q} | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"is_causal": True, "attn_mask": torch.zeros(7, 7)},
            r"attn_mask: expected None together with is_causal=True, as in PyTorch, got a mask of shape \(7, 7\)",
        ),
        (
            {"key": floats(2, 2, 7, 8), "value": floats(2, 2, 7, 8)},
            r"key: expected query's number of heads, 4, without enable_gqa=True, got 2",
        ),
        ({"query": floats(8)}, r"query: expected at least two dimensions, \(..., length, head_dim\).*, got \(8,\)"),
        (
            {"key": floats(2, 4, 7, 9)},
            r"key: expected shape \(2, num_kv_heads, key_len, 8\), as query, got \(2, 4, 7, 9\)",
        ),
        (
            {"attn_mask": torch.zeros(6, 7)},
            r"attn_mask: expected 4 dimensions, each 1 or that of \(2, 4, 7, 7\), as query and key, got \(1, 1, 6, 7\)",
        ),
        ({"dropout_p": 2}, r"dropout_p: expected a probability in \[0, 1\), got 2"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
