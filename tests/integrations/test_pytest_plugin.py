"""The pytest plugin that accelerates models at construction."""

import subprocess
import sys

import pytest

TEST = """
import torch, transformers, fastlm

def test_models_are_accelerated():
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    config = transformers.BertConfig(**sizes)
    for kind in (transformers.BertModel, transformers.BertForMaskedLM, transformers.BertForSequenceClassification):
        model = kind(config)
        assert bool(fastlm.report(model).replaced) is WANTED
        model(torch.ones(1, 3, dtype=torch.int64))
    assert config._attn_implementation in (None, "sdpa")
    unsupported = transformers.GemmaModel(transformers.GemmaConfig(**sizes))
    assert not fastlm.report(unsupported).entries
"""


@pytest.mark.slow
@pytest.mark.parametrize("on", ["0", "1"])
def test_on_request_only(on, tmp_path, monkeypatch):
    (tmp_path / "test_models.py").write_text(TEST.replace("WANTED", str(on == "1")))
    monkeypatch.setenv("FASTLM_ACCELERATE", on)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "fastlm.integrations.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
