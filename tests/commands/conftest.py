import dataclasses

import pytest
import torch

from fastlm.commands import demo
from tests.commands.support import TEXT, TINY, run


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    """Hides GPUs: output is compared with results computed on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gpt"
    return out, run("train", "--data", text_file, *TINY, "--out", out, "--threads", 1)


@pytest.fixture(scope="module")
def trained_bert(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bert"
    return out, run(
        "train", "--data", text_file, *TINY, "--out", out, "--objective", "masked-token", "--tokenizer", "char"
    )


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(
        demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, layers=1, heads=2, width=32, context=64, batch=4)
    )
    monkeypatch.setattr(demo, "CORPUS_BYTES", 100_000)
    monkeypatch.setattr(demo, "PAIRS", 6)
