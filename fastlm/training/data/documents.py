"""Documents of files: a text file is one, and so is every record. Which side of the split one falls on depends on its
content alone.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastlm.training.data.encode import Encoder
from fastlm.training.data.records import is_records, records


class Chunk(NamedTuple):
    """A part of a document, as the encoder takes it."""

    content: Any
    is_last: bool  # of its document
    digest: bytes  # SHA-256 of the document
    read: int  # bytes of the file that are read after it, about


def chunks_of(file: Path, encoder: Encoder, field: str, sha256: str) -> Iterator[Chunk]:
    """The chunks of all documents of a file, in order.

    Args:
        field: of records, which has the text.
        sha256: of the file.
    """
    if is_records(file):
        for record in records(file, field):
            digest = hashlib.sha256(record.text.encode()).digest()
            for content, is_last in with_last(encoder.parts(record.text), empty=""):
                yield Chunk(content, is_last, digest, record.read)
        return
    digest, read = bytes.fromhex(sha256), 0
    for content, is_last in with_last(encoder.chunks(file), empty=None):
        if content is not None:  # an empty file is no document
            read += len(content)
            yield Chunk(content, is_last, digest, read)


def with_last(items: Iterator, empty: Any) -> Iterator[tuple[Any, bool]]:
    """The items, each with whether it is the last; (empty, True) if there are none."""
    previous = next(items, None)
    for item in items:
        yield previous, False
        previous = item
    yield empty if previous is None else previous, True


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a document is for validation: a function of its content, whatever the order and the other documents."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
