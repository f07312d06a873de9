"""Whole decoding steps on the GPU kernels as CUDA graphs run them: the number of filled keys is not known in Python."""

import importlib
from types import SimpleNamespace

import torch

import fastlm
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.models.decoding import graphs
from tests.support import on_backends


@on_backends("triton", "cuda")
def test_the_tokens_of_the_reference(backend, monkeypatch):
    name = "fastlm.kernels.attention_decode" if backend == "triton" else "fastlm.ops.attention.cuda"
    # In keys. The second split has none at first.
    monkeypatch.setattr(importlib.import_module(name), "MIN_SPLIT_SIZE", 32)
    monkeypatch.setattr(graphs, "STEPS_PER_GRAPH", 20)
    monkeypatch.setattr(graphs, "can_capture", lambda model, device: True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs, "capture", lambda step, generator: SimpleNamespace(replay=step))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=2, initializer_range=0.5)
    )
    ids = torch.randint(61, (2, 29))
    mask = (torch.arange(29) >= torch.tensor([[0], [6]])).long()
    with fastlm.use_backend("reference"):
        expected = model.generate(ids, 14, attention_mask=mask, eos_token_id=(), cuda_graphs=False)
    with fastlm.use_backend(backend):
        assert torch.equal(model.generate(ids, 14, attention_mask=mask, eos_token_id=()), expected)
    assert expected[:, 29:].unique().numel() > 8  # not a single token repeated
