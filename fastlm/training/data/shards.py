"""Token ids on the disk: CACHE/KEY has manifest.json, tokenizer.json and, of each part of the text, these files:

training-00000.bin, …   the ids, uint8, uint16 or uint32 by the vocabulary, at most SHARD of them in each
training.ends.bin       where each document ends, int64

The manifest has the SHA-256 of the files, of the sources and of the tokenizer. KEY depends on all that the ids depend
on, so that a change of it is another directory. A directory is written beside its place, flushed to the disk and
renamed: a process that is killed leaves nothing that looks complete.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastlm.core.locks import locked
from fastlm.training.checkpoint import one_line, write_json
from fastlm.training.checkpoints import flush, sha256
from fastlm.training.data.tokens import Tokens

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
FORMAT = 1  # of the files; a change that older code cannot read needs the next number
PARTIAL = ".partial-"  # the name of a directory that is not complete begins with it
SHARD = 2**28  # ids
ENDS = np.dtype("<i8")
BUFFER = 2**20  # bytes


class HashedFile:
    """A file of numbers that is written from the beginning to the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.count, self.digest = path, dtype, 0, hashlib.sha256()
        self.file = path.open("wb", buffering=BUFFER)

    def append(self, values: ArrayLike) -> None:
        content = np.ascontiguousarray(values, dtype=self.dtype)
        self.file.write(content.data)
        self.digest.update(content.data)
        self.count += content.size

    def close(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        self.file.close()
        flush(self.path)
        return {"file": self.path.name, "count": self.count, "sha256": self.digest.hexdigest()}


class PartWriter:
    """Writes the ids of one part of the text, document after document."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.folder, self.name, self.dtype = folder, name, dtype.newbyteorder("<")
        self.tokens = self.documents = 0
        self.shards: list[dict[str, Any]] = []
        self.shard: HashedFile | None = None
        self.ends = HashedFile(folder / f"{name}.ends.bin", ENDS)

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self.shard is None:
                self.shard = HashedFile(self.folder / f"{self.name}-{len(self.shards):05}.bin", self.dtype)
            some, ids = np.split(ids, [SHARD - self.shard.count])
            self.shard.append(some)
            self.tokens += len(some)
            if self.shard.count == SHARD:
                self.end_shard()

    def end_shard(self) -> None:
        if self.shard is not None:
            self.shards.append(self.shard.close())
            self.shard = None

    def end_documents(self, ends: np.ndarray) -> None:
        self.ends.append(ends)
        self.documents += len(ends)

    def close(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        self.end_shard()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "dtype": self.dtype.str,
            "shards": self.shards,
            "ends": self.ends.close(),
        }


def key_of(identity: dict[str, Any]) -> str:
    """The name of the directory for all that the ids depend on."""
    content = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def prepared(cache: Path, key: str, write: Callable[[Path], dict[str, Any]]) -> tuple[Path, list[str]]:
    """The complete directory for a key, written unless it is there, and what was wrong with the one that was there.

    Processes that need the same directory wait for the one that writes it. If writing fails, nothing is left.

    Args:
        write: writes the files into an empty directory and returns the manifest.
    """
    created = [folder for folder in (cache, *cache.absolute().parents) if not folder.exists()]
    notes: list[str] = []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, wait=True) as held:
            if held:
                for partial in cache.glob(f"{PARTIAL}*"):  # of processes that were killed
                    shutil.rmtree(partial, ignore_errors=True)
            final = cache / key
            if final.exists():
                if (damage := damage_of(final)) is None:
                    return final, notes
                notes.append(damage)
            with new_folder(cache, key) as folder:
                write_json(folder / MANIFEST, {"format": FORMAT, **write(folder)})
                for path in (folder / MANIFEST, folder):
                    flush(path)
                remove(final)
                with contextlib.suppress(FileExistsError):  # without locks, another process may have been faster
                    folder.rename(final)
                flush(cache)
            return final, notes
    except BaseException as failure:
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()  # if it is empty
        if isinstance(failure, OSError) and (failure.filename is None or str(cache) in str(failure.filename)):
            raise OSError(f"cache: could not write to {str(cache)!r}: {one_line(failure)}") from failure
        raise


@contextlib.contextmanager
def new_folder(cache: Path, key: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{key}-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a complete directory. A process that is killed meanwhile leaves none that looks complete."""
    if folder.exists():
        partial = folder.with_name(f"{PARTIAL}old-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def keep_only(cache: Path, folder: Path) -> None:
    """Deletes the directories of other keys, as far as this module wrote them."""
    for other in cache.iterdir():
        if other.name != folder.name and (other / MANIFEST).is_file():
            remove(other)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a directory, in words."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return f"{folder / MANIFEST}, which is of another format"
        for part in content["parts"].values():
            for entry in (*part["shards"], part["ends"]):
                if sha256(folder / entry["file"]) != entry["sha256"]:
                    return f"{folder / entry['file']}, which has changed"
        if sha256(folder / TOKENIZER) != content["tokenizer_sha256"]:
            return f"{folder / TOKENIZER}, which has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as failure:
        return f"{folder} ({one_line(failure)})"
    return None


def read_parts(folder: Path) -> dict[str, Tokens]:
    """The parts of a complete directory, mapped into memory."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        name: Tokens(
            [mapped(folder, entry, np.dtype(part["dtype"])) for entry in part["shards"]]
            or [np.empty(0, dtype=np.dtype(part["dtype"]))],
            mapped(folder, part["ends"], ENDS),
        )
        for name, part in content["parts"].items()
    }


def mapped(folder: Path, entry: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    if not entry["count"]:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(folder / entry["file"], dtype=dtype, mode="r", shape=(entry["count"],))
