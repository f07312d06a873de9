"""Files of torch.distributed.checkpoint, which any number of processes reads: each writes its part of the tensors."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fastlm.core.errors import mismatch
from fastlm.training.distributed import Group
from fastlm.training.sharded import sharded_like


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
        ValueError: the files are damaged.
    """
    reader = dcp.FileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: empty(wanted.get(name), x.size, x.properties.dtype)
            for name, x in stored.items()
            if isinstance(x, TensorStorageMetadata)
        }
        with quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as failure:  # damaged files raise many types of error
        raise mismatch("resume", f"a checkpoint in {folder}", f"damaged files ({failure})") from None
    return tensors


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
