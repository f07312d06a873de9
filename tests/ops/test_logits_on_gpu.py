"""The chunks of logits of the GPU backends: their sizes by the memory of the card, and who adds their products."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.ops.linear_cross_entropy import gpu


@pytest.fixture
def card(monkeypatch):
    """A GPU with some memory."""
    card = types.SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    gpu.logits_bytes.cache_clear()
    yield card
    gpu.logits_bytes.cache_clear()


@pytest.mark.parametrize("gib, mib", [(6, 96), (2, 64), (16, 256), (39.5, 512), (141, 512)])
def test_a_chunk_takes_a_64th_of_the_memory(card, gib, mib):
    card.total_memory = int(gib * 2**30)
    assert gpu.logits_bytes(0) == mib << 20
    assert gpu.logits_bytes(None) == 64 << 20


def test_gpt2s_loss_takes_few_chunks_of_whole_tiles(card):
    x, weight = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta") for n in (16384, 50257))
    sizes = [logits.shape[0] for _, logits in gpu.chunks_of_logits(x, weight, None, gpu.logits_bytes(0))]
    assert sizes == [4096] * 4


def test_chunks_are_equal_and_cover_all_rows():
    for rows in (0, 1, 15, 17, 256, 1000, 1031, 16384):
        for most in (0, 1, 5, 16, 100, 256, 5336, 20000):
            chunk = gpu.chunk_of(rows, most)
            assert chunk == rows if rows <= most else chunk <= max(1, most)
            if chunk < rows:
                assert chunk % (256 if most >= 256 else 16 if most >= 16 else 1) == 0
                assert (-(-rows // chunk) - 1) * chunk < rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_chunks_are_added_by_the_product_itself(dtype, monkeypatch):
    """The gradient of the weight takes no pass of its own per chunk; 16-bit products are added in float32."""
    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            called.append(str(function))
            if function is torch.ops.aten.mm.dtype:  # PyTorch for a CPU has neither of these two
                return torch.empty(16, 8, device="meta")
            if function is torch.ops.aten.addmm.dtype_out:
                return arguments[0]
            return function(*arguments, **(options or {}))

    monkeypatch.setattr(gpu, "accumulates_in_float32", lambda device, dtype: True)
    a, b = torch.empty(16, 32, dtype=dtype, device="meta"), torch.empty(32, 8, dtype=dtype, device="meta")
    with Recorded():
        total = None
        for chunk in range(3):
            total = gpu.add_product(total, a, b, chunk == 2)
    assert total.dtype == dtype
    if dtype == torch.float32:
        assert called == ["aten.mm.default", "aten.addmm_.default", "aten.addmm_.default"]
    else:
        assert called == ["aten.mm.dtype", "aten.addmm.dtype_out", "aten.addmm.dtype_out", "aten._to_copy.default"]
