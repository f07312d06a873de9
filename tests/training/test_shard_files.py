import importlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from fastlm.training import shard_files
from fastlm.training.checkpoints import Saved
from fastlm.training.distributed import Group

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "step": torch.tensor(7),
    "losses": torch.tensor([0.5, 0.25], dtype=torch.float64),
    "half": torch.ones(2, 0, 3, dtype=torch.bfloat16),
}


@pytest.fixture
def folder(tmp_path):
    shard_files.write(tmp_path, TENSORS, Group())
    return tmp_path


class Runs:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refusal(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError) as error:
        Saved(folder, 1, 0.0, [], {}).tensors()
    assert "\n" not in str(error.value) and str(folder / ".metadata") in str(error.value)
    return str(error.value)


def test_what_was_written_is_read(folder):
    found = shard_files.read(folder, {})
    assert set(found) == set(TENSORS)
    for name, x in TENSORS.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype


@pytest.mark.parametrize("place", ["whole", "entry"])
def test_code_in_the_index_is_not_run(folder, tmp_path, place):
    created = tmp_path / "created"
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Runs(created)
    content = pickle.dumps(index if place == "entry" else Runs(created))
    pickle.loads(content)
    assert created.exists()  # so it works
    created.unlink()
    message = refusal(folder, content)
    expected = f"resume: expected in {folder / '.metadata'} the places of tensors and nothing else, as code in a "
    expected += "checkpoint is never run, got the Python object "
    assert message.startswith(expected) and message != expected
    assert not created.exists()


@pytest.mark.parametrize("place", ["torch.Size", "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"])
def test_attributes_of_classes_are_not_set(folder, place):
    module, _, name = place.rpartition(".")
    # GLOBAL class, MARK None {"changed": 1} TUPLE, BUILD: a state for the slots of the class itself
    content = b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"(N}\x8c\x07changedK\x01st" + b"b."
    message = refusal(folder, content)
    assert "the state of an object of type " in message
    assert not hasattr(getattr(importlib.import_module(module), name), "changed")


def test_an_index_of_other_files_is_an_error(folder, tmp_path):
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "../other"
    assert refusal(folder, pickle.dumps(index)).endswith("got the file '../other'")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(os.sep)])
def test_a_damaged_index(folder, content):
    assert refusal(folder, content).startswith("resume: expected ")


def test_members_of_enumerations_by_name():
    """As Python 3.11.0 pickles them; no other attribute is read."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as Encoding

    assert shard_files.member(Encoding, "TORCH_CHANNELS_LAST") is Encoding.TORCH_CHANNELS_LAST
    with pytest.raises(shard_files.Refused):
        shard_files.member(torch.Size, "__init__")
