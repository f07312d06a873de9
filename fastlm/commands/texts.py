"""Reads the texts of `fastlm encode` and `fastlm rerank`: lines, a field of JSON lines, a column of Parquet."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastlm.core.errors import did_you_mean, mismatch, shown


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
        starts.append((file, len(texts)))
        texts += READERS.get(file.suffix.lower(), lines)(file, field)
    if not texts:
        raise mismatch("files", "at least one text", f"none in {', '.join(map(str, files))}")
    return Texts(texts, starts)


def lines(file: Path, field: str) -> list[str]:
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


def json_lines(file: Path, field: str) -> list[str]:
    found = []
    for number, line in enumerate(lines(file, field), 1):
        place = f"{file}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise mismatch(place, "a JSON object", f"invalid JSON ({error})") from None
        if not isinstance(entry, dict):
            raise mismatch(place, "a JSON object", shown(entry))
        if field not in entry:
            raise no_field(place, field, list(entry))
        if not isinstance(entry[field], str):
            raise mismatch(place, f"a string in the field {field!r}", shown(entry[field]))
        found.append(entry[field])
    return found


def parquet(file: Path, field: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        expected = "an installation with pyarrow (pip install 'fastlm[parquet]')"
        raise mismatch(str(file), expected, "one without") from None
    with open(file, "rb"):  # its errors are one line
        pass
    try:
        names = parquet.read_schema(file).names
        if field not in names:
            raise no_field(str(file), field, names)
        found = parquet.read_table(file, columns=[field]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: damaged or not a Parquet file ({error})") from None
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise mismatch(f"{file}:{number}", f"a string in the column {field!r}", shown(text))
    return found


def no_field(place: str, field: str, names: list[str]) -> ValueError:
    near = did_you_mean(field, names)
    return mismatch(place, f"the field {field!r} (--field names another)", f"{', '.join(names[:20]) or 'none'}{near}")


READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".parquet": parquet,
}
