"""Encodes files and writes their ids, in several processes if that takes long.

Files are read in order by this process, in batches of about a megabyte that are encoded elsewhere and come back in
order. Memory does not grow with the text.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlm.training.data.documents import Chunk, chunks_of, is_held_out
from fastlm.training.data.encode import Encoder
from fastlm.training.data.records import is_records
from fastlm.training.data.shards import PartWriter
from fastlm.training.data.workers import Encoded, Workers

BATCH = 2**20  # bytes or characters that are encoded at once
ALONE = 2**22  # bytes of text up to which starting other processes takes longer than encoding here
TRAINING, VALIDATION = "training", "validation"

Progress = Callable[[str, int, int], None]  # ("reading" or "tokenizing", bytes that are done, of so many)


class Plan(NamedTuple):
    """What is encoded, and how."""

    files: Mapping[str, Sequence[Path]]  # of each part
    sums: Mapping[str, str]  # the SHA-256 of the files by their absolute paths
    field: str
    held_out: float  # fraction of the documents of the training files that are for validation, by their content
    end_of_text: int | None  # the id after each document
    record_end: Sequence[int]  # without it: the ids after each record
    processes: int
    progress: Progress


class Batch(NamedTuple):
    contents: list[Any]
    parts: list[str]  # of each content: the part of the text that it belongs to
    ends: list[Sequence[int] | None]  # the ids after it, if it is the last of its document
    read: int  # bytes of all files that are read after it, about


def write_parts(folder: Path, encoder: Encoder, plan: Plan) -> dict[str, Any]:
    """Writes the ids of all files; returns the entries of the parts in the manifest."""
    names = dict.fromkeys([*plan.files, *([VALIDATION] if plan.held_out else [])])
    writers = {name: PartWriter(folder, name, encoder.dtype) for name in names}
    total = sum(file.stat().st_size for files in plan.files.values() for file in files)
    processes = plan.processes if encoder.parallel and total > ALONE else 1
    for batch, (ids, lengths) in encoded(encoder, batches(encoder, plan), processes):
        write(writers, batch, ids, lengths)
        plan.progress("tokenizing", min(batch.read, total), total)
    return {name: writer.close() for name, writer in writers.items()}


def write(writers: Mapping[str, PartWriter], batch: Batch, ids: np.ndarray, lengths: Sequence[int]) -> None:
    """Writes the ids of a batch, which may belong to several parts."""
    bounds = np.cumsum([0, *lengths])
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in writers}
    counts = {name: writer.tokens for name, writer in writers.items()}
    ends: dict[str, list[int]] = {name: [] for name in writers}
    for i, (part, end) in enumerate(zip(batch.parts, batch.ends, strict=True)):
        pieces[part].append(ids[bounds[i] : bounds[i + 1]])
        counts[part] += lengths[i]
        if end is not None:
            pieces[part].append(np.asarray(end, dtype=ids.dtype))
            counts[part] += len(end)
            ends[part].append(counts[part])
    for name, writer in writers.items():
        if pieces[name]:
            writer.append(np.concatenate(pieces[name]))
            writer.end_documents(np.asarray(ends[name], dtype=np.int64))


def batches(encoder: Encoder, plan: Plan) -> Iterator[Batch]:
    batch, size, before = Batch([], [], [], 0), 0, 0
    for part, files in plan.files.items():
        for file in files:
            ending = plan.record_end if is_records(file) else ()
            if plan.end_of_text is not None:
                ending = (plan.end_of_text,)
            for chunk in chunks_of(file, encoder, plan.field, plan.sums[str(file.absolute())]):
                batch.contents.append(chunk.content)
                batch.parts.append(part_of(chunk, part, plan.held_out))
                batch.ends.append(ending if chunk.is_last else None)
                size += len(chunk.content)
                if size >= BATCH or len(batch.contents) >= BATCH // 16:
                    yield batch._replace(read=before + chunk.read)
                    batch, size = Batch([], [], [], 0), 0
            before += file.stat().st_size
    if batch.contents:
        yield batch._replace(read=before)


def part_of(chunk: Chunk, part: str, held_out: float) -> str:
    return VALIDATION if part == TRAINING and held_out and is_held_out(chunk.digest, held_out) else part


def encoded(encoder: Encoder, batches: Iterable[Batch], processes: int) -> Iterator[tuple[Batch, Encoded]]:
    """Each batch with its ids, in order; at most two batches per process are in memory."""
    if processes == 1:
        for batch in batches:
            yield batch, encoder.encode(batch.contents)
        return
    with Workers(encoder.tokenizer, encoder.dtype, processes) as workers:
        waiting: collections.deque[tuple[Batch, concurrent.futures.Future[Encoded]]] = collections.deque()
        for batch in batches:
            waiting.append((batch, workers.submit(batch.contents)))
            if len(waiting) >= 2 * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
