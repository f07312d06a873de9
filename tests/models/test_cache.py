import pytest
import torch

from fastlm.models.cache import KVCache


def rows(tokens, batch=2):
    return torch.randn(batch, 3, tokens, 4)


@torch.no_grad()
def test_updates_are_written_in_place():
    cache, keys, values = KVCache(1, 10), rows(7), rows(7)
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        key, value = cache.update(0, keys[:, :, begin:end], values[:, :, begin:end])
        cache.length = end
        assert torch.equal(key, keys[:, :, :end]) and torch.equal(value, values[:, :, :end])
        if begin:
            assert key.data_ptr() == cache.keys[0].data_ptr()  # a view: only new rows are copied


@torch.no_grad()
def test_layers_are_separate():
    cache, first, second = KVCache(2, 5), rows(3), rows(3)
    cache.update(0, first, first), cache.update(1, second, second)
    assert torch.equal(cache.keys[0][:, :, :3], first) and torch.equal(cache.values[1][:, :, :3], second)


def test_gradients_flow_through_the_first_call_only():
    cache, key = KVCache(1, 10), rows(3).requires_grad_()
    seen, _ = cache.update(0, key, key)
    seen.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key)) and not cache.keys[0].requires_grad
    cache.length = 3
    with pytest.raises(
        ValueError,
        match=r"past_key_values: expected a call under torch.no_grad\(\) or torch.inference_mode\(\)",
    ):
        cache.update(0, key, key)


@torch.no_grad()
def test_full_cache_and_batch_size_mismatch_are_errors():
    cache = KVCache(1, 4)
    cache.update(0, rows(3), rows(3))
    cache.length = 3
    with pytest.raises(ValueError, match="past_key_values: expected capacity for 5 tokens, got a cache of 4"):
        cache.update(0, rows(2), rows(2))
    with pytest.raises(ValueError, match="past_key_values: expected a cache of 5 sequences, as the input, got 2"):
        cache.update(0, rows(1, batch=5), rows(1, batch=5))
