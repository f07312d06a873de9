"""Files of torch.distributed.checkpoint (DCP): each process writes its part of the tensors, any number of them reads.

Their index is a pickle. DCP would run the code in it; here it is read by an unpickler that knows the classes of the
index and no other.
"""

import contextlib
import enum
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from fastlm.core.errors import mismatch
from fastlm.training.distributed import Group
from fastlm.training.sharded import sharded_like

INDEX = ".metadata"
STATEFUL = {  # classes of an index whose objects have attributes that are set from the pickle
    _StorageInfo,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
}
# What an index consists of, besides dtypes and paths.
NAMED = {(kind.__module__, kind.__name__) for kind in STATEFUL} | {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),  # a layout by its name
}
PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}  # a checkpoint is read on any system


def write(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Writes the parts of this process, flushed to the disk. All processes call it.

    Raises:
        OSError: one of them could not write.
    """
    try:
        with quiet():
            dcp.save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(folder, sync_files=True, overwrite=True),
                process_group=group.writing,
                no_dist=group.size == 1,
            )
    except dcp.api.CheckpointException as failure:
        first = next(iter(failure.failures.values()))[0]
        raise first if isinstance(first, OSError) else OSError(str(first)) from None


def read(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in main memory; of those that are sharded in `wanted`, the part of this process.

    Raises:
        ValueError: the files are damaged, or the index has anything but the places of tensors.
    """
    reader = Reader(folder)
    stored = reader.index.state_dict_metadata
    try:
        tensors = {  # tensors alone: DCP would run the code in any other entry
            name: empty(wanted.get(name), x.size, x.properties.dtype)
            for name, x in stored.items()
            if isinstance(x, TensorStorageMetadata)
        }
        with quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as failure:  # damaged files raise many types of error
        raise mismatch("resume", f"a checkpoint in {folder}", f"damaged files ({failure})") from None
    return tensors


class Reader(dcp.FileSystemReader):
    """DCP's, with an index that is read once, without running code."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.index = read_index(folder)

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        self.index.storage_meta = self.index.storage_meta or StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


def read_index(folder: Path) -> Metadata:
    """Raises ValueError, with the name of the file, if it is damaged or has any other object than an index has."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise Refused(type(index).__qualname__)
        for place in index.storage_data.values():
            if PurePath(place.relative_path).name != place.relative_path or place.relative_path in ("", ".."):
                raise Refused(f"file {place.relative_path!r}")
    except Refused as refused:
        expected = f"in {path} the places of tensors and nothing else, as code in a checkpoint is never run"
        raise mismatch("resume", expected, f"the {refused}") from None
    except Exception as failure:  # damaged pickles raise many types of error
        raise mismatch("resume", f"a checkpoint in {folder}", f"a damaged file {path} ({failure})") from None
    return index


class Refused(Exception):
    """What an index should not have."""


Unpickler: Any = pickle._Unpickler  # its opcodes can be refused one by one


class IndexUnpickler(Unpickler):
    """In Python, as the unpickler in C sets attributes of any object, of the classes themselves too."""

    dispatch: ClassVar[dict[int, Any]] = dict(Unpickler.dispatch)

    def load_build(self) -> None:
        if type(self.stack[-2]) not in STATEFUL:
            raise Refused(f"state of an object of type {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return PATHS[name]
        if (module, name) == ("builtins", "getattr"):  # as some versions of Python pickle a member of an Enum
            return member
        if (module, name) in NAMED or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise Refused(f"Python object {module}.{name}")


def member(kind: Any, name: str) -> Any:
    if not isinstance(kind, enum.EnumMeta):
        raise Refused(f"attribute {name}")
    return kind[name]


def empty(like: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    if isinstance(like, DTensor):
        local: Tensor = torch.empty_like(like.to_local(), dtype=dtype, device="cpu")
        return sharded_like(like, local)
    return torch.empty(size, dtype=dtype, device="cpu")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No notes of the library on stderr, such as that one process alone reads the files."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
