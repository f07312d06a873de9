"""Results of an interrupted `fastlm encode`: beside the output, bound to the model, the options and the texts.

The directory has the rows computed so far and the number of batches that they come from, which is replaced by a rename
after the rows were written. A process that is killed loses what it computed since.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from fastlm.core.locks import locked
from fastlm.training.checkpoint import is_writable

STATE, ROWS, COMPLETE = "state.json", "rows.npy", "complete.safetensors"


class Partial:
    """The results of one run.

    Attributes:
        batches, texts: how many are computed.
        rows: (number of texts, width), float32, a memory-mapped file.
    """

    def __init__(self, folder: Path, key: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder, self.key = folder, key
        state = read_state(folder)
        self.batches: int = 0 if state is None else state["batches"]
        self.texts: int = 0 if state is None else state["texts"]
        if state is None:
            self.rows = numpy.lib.format.open_memmap(folder / ROWS, "w+", numpy.float32, shape)
        else:
            self.rows = numpy.lib.format.open_memmap(folder / ROWS, "r+")

    def add(self, indices: list[int], embeddings: torch.Tensor) -> None:
        self.rows[indices] = embeddings.numpy()
        self.batches, self.texts = self.batches + 1, self.texts + len(indices)

    def save(self) -> None:
        self.rows.flush()
        state = self.folder / f"{STATE}.new"
        state.write_text(json.dumps({"key": self.key, "batches": self.batches, "texts": self.texts}), encoding="utf-8")
        os.replace(state, self.folder / STATE)

    def finish(self, out: Path) -> None:
        """Write the output, by one rename, and remove the partial results."""
        file = self.folder / COMPLETE
        save_file({"embeddings": torch.from_numpy(self.rows)}, file, {"fastlm": json.dumps(self.key)})
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(file, out)
        shutil.rmtree(self.folder, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if isinstance(state["key"], dict) and isinstance(state["batches"], int) and isinstance(state["texts"], int):
            return state
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{folder / STATE}: damaged; --overwrite starts again")


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def check(out: Path, *, overwrite: bool) -> None:
    """Checks, before the model is loaded, that the output can be written."""
    if out.is_dir():
        raise IsADirectoryError(f"out: expected a file, got the directory {str(out)!r}")
    if not is_writable(out.absolute().parent):
        raise PermissionError(f"out: expected a file in a writable directory, got {str(out)!r}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"out: expected a new file, got {str(out)!r}, which exists; --overwrite replaces it")


@contextlib.contextmanager
def opened(out: Path, key: dict[str, Any], shape: tuple[int, int], *, overwrite: bool) -> Iterator[Partial]:
    """The partial results of this key, which one process at a time may have. Those of another key are an error.

    overwrite: those of another key are removed.
    """
    folder = folder_of(out)
    folder.mkdir(exist_ok=True)
    with locked(folder, wait=False) as held:
        if held is False:
            raise ValueError(f"out: expected no other process that writes {str(out)!r}, got one")
        try:
            try:
                state = read_state(folder)
                other = None if state is None else difference(state["key"], key)
                if other is not None:
                    raise ValueError(f"out: {folder}: {other}; --overwrite starts again")
            except ValueError:
                if not overwrite:
                    raise
                (folder / STATE).unlink()
            yield Partial(folder, key, shape)
        finally:
            with contextlib.suppress(OSError):  # it has results
                if not (folder / STATE).exists():
                    shutil.rmtree(folder)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How the key of stored results differs, in words; None if it does not."""
    for name in wanted:
        if found.get(name) != wanted[name]:
            return f"expected partial results of {name} {wanted[name]}, got those of {found.get(name)}"
    return None
