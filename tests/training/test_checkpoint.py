import contextlib
import json
import os
import resource
import sys

import pytest
import torch

from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.training import checkpoint, data
from fastlm.training.models import build
from fastlm.training.settings import Settings

FILES = ["config.json", "model.safetensors", "summary.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def model(corpus):
    return build(Settings(layers=1, heads=2, width=32, context=16), corpus.tokenizer)


def save(out, model, corpus):
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer)
        checkpoint.write_json(folder / "summary.json", {"val_loss": 1.5})


def test_saved_files_can_be_loaded(tmp_path, model, corpus):
    save(tmp_path / "new" / "out", model, corpus)
    out = tmp_path / "new" / "out"
    assert sorted(os.listdir(out)) == FILES
    loaded = load_model(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert load_tokenizer(out).encode("if 1\n") == corpus.tokenizer.encode("if 1\n").ids
    assert json.loads((out / "summary.json").read_text()) == {"val_loss": 1.5}


TEXTS = [
    "Hello world",
    "  def f(x):\n\treturn x  # naïve 東京 \U0001f600  \r\n",
    "I'm sure they've 1234 it's , . ! ? don't",
    "",
    " ",
    "\n\n",
    "a  b   c ",
    "é e\u0301 ﬁ \u00a0 \u200b \u2028x",
    "<|endoftext|> [UNK] [CLS]",
]


@pytest.mark.parametrize("objective", ["next-token", "masked-token"])
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_transformers_reads_the_tokenizer(tmp_path, tokenizer, objective):
    transformers = pytest.importorskip("transformers", reason="pip install 'fastlm[test]'")
    (tmp_path / "text.txt").write_text("".join(TEXTS), encoding="utf-8", newline="")
    masked = objective == "masked-token"
    corpus = data.load([tmp_path / "text.txt"], tokenizer=tokenizer, masked=masked)
    out = tmp_path / "out"
    save(out, build(Settings(objective, layers=1, heads=2, width=32, context=16), corpus.tokenizer), corpus)
    ours, theirs = load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    for text in [*TEXTS, *(["a[MASK] [PAD] b"] if masked else [])]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    assert theirs.mask_token_id == ours.mask_token_id and theirs.model_max_length == 16
    assert (theirs.pad_token == "[PAD]") == masked


def test_saving_again_keeps_other_files(tmp_path, model, corpus):
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "summary.json").write_text("old")
    save(tmp_path, model, corpus)
    assert (tmp_path / "notes.txt").read_text() == "my notes"
    assert "val_loss" in (tmp_path / "summary.json").read_text()


@contextlib.contextmanager
def full_disk():
    """Limits files to 10 kB, less than the model's size: write() fails, as on a full disk.

    To be used around the save only, as the limit also applies to pytest's own output.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_no_new_directory(tmp_path, model, corpus):
    with (
        full_disk(),
        pytest.raises(OSError, match=r"^out: could not save to '.*out'; no file was written: [^\n]*$"),
    ):
        save(tmp_path / "out", model, corpus)
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_existing_files_unchanged(tmp_path, model, corpus):
    (tmp_path / "config.json").write_text("old")
    with full_disk(), pytest.raises(OSError, match="out: could not save to"):
        save(tmp_path, model, corpus)
    assert os.listdir(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_interrupted_save_leaves_no_files(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint.staged(tmp_path / "out") as folder:
        (folder / "half").write_text("…")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "out, message",
    [
        ("file", r"out: expected a directory or a path for a new one, got the file '.*file'"),
        ("file/x", r"out: expected a writable directory, got '.*file/x'"),
        pytest.param(
            "/proc/x",
            r"out: expected a writable directory, got '/proc/x' in '/proc'",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="has no /proc"),
        ),
    ],
)
def test_prepare_rejects_invalid_directories(tmp_path, out, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=message):
        checkpoint.prepare(tmp_path / out)
    assert checkpoint.prepare(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert os.listdir(tmp_path) == ["file"]
