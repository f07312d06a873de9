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


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 0, 1, 3, 20])
def test_a_reserved_slot_follows_what_update_returns(window):
    """Token by token, by update in one cache and by writing to the slots of the other."""
    cache, other = KVCache(1, 16, [window]), KVCache(1, 16, [window])
    keys, values = rows(16), rows(16)
    for each in (cache, other):
        each.update(0, keys[:, :, :2], values[:, :, :2])
        each.length = 2
    for token in range(2, 16):
        new = slice(token, token + 1)
        expected = cache.update(0, keys[:, :, new], values[:, :, new])
        *buffers, slot = other.reserve(0)
        for buffer, source in zip(buffers, (keys, values), strict=True):
            buffer[:, :, slot] = source[:, :, token]
        for buffer, whole in zip(buffers, expected, strict=True):
            assert torch.equal(buffer[:, :, : slot + 1], whole)
        cache.length = other.length = token + 1
