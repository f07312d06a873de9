import contextlib
import json
import os
import resource

import pytest
import torch

from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.training import checkpoint
from fastlm.training.models import build
from fastlm.training.settings import Settings


@pytest.fixture
def model(corpus):
    return build(Settings(layers=1, heads=2, width=32, context=16), corpus.tokenizer)


def save(out, model, corpus):
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer)
        checkpoint.write_json(folder / "summary.json", {"val_loss": 1.5})


def test_what_is_saved_loads(tmp_path, model, corpus):
    save(tmp_path / "new" / "out", model, corpus)
    out = tmp_path / "new" / "out"
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "summary.json", "tokenizer.json"]
    loaded = load_model(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert load_tokenizer(out).encode("if 1\n") == corpus.tokenizer.encode("if 1\n").ids
    assert json.loads((out / "summary.json").read_text()) == {"val_loss": 1.5}


def test_saving_again_replaces_its_own_files_alone(tmp_path, model, corpus):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "summary.json").write_text("old")
    save(tmp_path, model, corpus)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "val_loss" in (tmp_path / "summary.json").read_text()


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 10 kB, which the model's does; the system says so as it says that a disk is full, with an error from write.

    Around the save alone: pytest's own output may be such a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_new_folder(tmp_path, model, corpus):
    with (
        full_disk(),
        pytest.raises(OSError, match=r"^out: could not save into '.*out', nothing was kept there: [^\n]*$"),
    ):
        save(tmp_path / "out", model, corpus)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, model, corpus):
    (tmp_path / "config.json").write_text("old")
    with full_disk(), pytest.raises(OSError, match="out: could not save into"):
        save(tmp_path, model, corpus)
    assert os.listdir(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_an_interrupt_while_saving_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint.staged(tmp_path / "out") as folder:
        (folder / "half").write_text("…")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "out, message",
    [
        ("file", r"out: expected a folder, or a name for a new one, got the file '.*file'"),
        ("file/x", r"out: expected a folder that can be written, got '.*file/x'"),
    ],
)
def test_a_place_that_cannot_be_is_noticed_before_the_training(tmp_path, out, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=message):
        checkpoint.prepare(tmp_path / out)
    assert checkpoint.prepare(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert os.listdir(tmp_path) == ["file"]
