"""Reads the texts of `fastlm encode` and `fastlm rerank`: lines, or a field of records."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastlm.core.errors import mismatch
from fastlm.training.data.records import is_records, records


@dataclasses.dataclass(frozen=True)
class Texts:
    texts: list[str]
    files: list[tuple[Path, int]]  # each with the index of its first text

    def place(self, index: int) -> str:
        """Where a text comes from."""
        file, first = next((file, first) for file, first in reversed(self.files) if first <= index)
        return f"{file}:{index - first + 1}"


def read(files: Sequence[Path], field: str) -> Texts:
    """All texts of the files, in order. Line i of a file of lines is its text i, even if it is empty."""
    texts: list[str] = []
    starts = []
    for file in files:
        if not file.exists() or file.is_dir():
            raise mismatch(
                "files", "a file", f"{str(file)!r}, {'a directory' if file.is_dir() else 'which does not exist'}"
            )
    for file in files:
        starts.append((file, len(texts)))
        texts += [record.text for record in records(file, field)] if is_records(file) else lines(file)
    if not texts:
        raise mismatch("files", "at least one text", f"none in {', '.join(map(str, files))}")
    return Texts(texts, starts)


def lines(file: Path) -> list[str]:
    data = file.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise mismatch(f"{file}:{number}", "text in UTF-8", f"the byte 0x{data[error.start]:02x}") from None
    found = content.split("\n")  # not splitlines: a text may have other separators
    if not found[-1]:
        found.pop()
    return [line.removesuffix("\r") for line in found]
