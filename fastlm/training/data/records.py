"""Reads files of records: a field of JSON lines, a column of Parquet or Arrow. One record is one text.

Files are read in parts, so that memory does not grow with them.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastlm.core.errors import did_you_mean, mismatch, shown

ROWS = 1024  # of Parquet that are read at a time


class Record(NamedTuple):
    text: str
    place: str  # file and number of the line or row, for messages
    read: int  # number of bytes of the file that are read after it, about


def is_records(file: Path) -> bool:
    return file.suffix.lower() in RECORDS


def records(file: Path, field: str) -> Iterator[Record]:
    """The texts of a file of records, in order.

    Raises:
        ValueError: a record has no text in the field, or the file is damaged; the message has file and line or row.
    """
    return RECORDS[file.suffix.lower()](file, field)


def json_lines(file: Path, field: str) -> Iterator[Record]:
    read = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            place = f"{file}:{number}"
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise mismatch(place, "text in UTF-8", f"the byte 0x{line[error.start]:02x}") from None
            try:
                entry = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise mismatch(place, "a JSON object", f"invalid JSON ({error})") from None
            if not isinstance(entry, dict):
                raise mismatch(place, "a JSON object", shown(entry))
            if field not in entry:
                raise no_field(place, field, list(entry))
            yield Record(checked(entry[field], f"a string in the field {field!r}", place), place, read)


def parquet(file: Path, field: str) -> Iterator[Record]:
    pyarrow = pyarrow_for(file)
    from pyarrow import parquet

    size = file.stat().st_size  # an error of the system is one line
    try:
        with parquet.ParquetFile(file) as opened:
            check_column(file, field, opened.schema_arrow)
            total, number = opened.metadata.num_rows, 0
            for batch in opened.iter_batches(ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield row(text, file, number, field, size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged or not a Parquet file ({error})") from None


def arrow(file: Path, field: str) -> Iterator[Record]:
    """An Arrow IPC stream, as `datasets` writes, or an Arrow IPC file."""
    pyarrow = pyarrow_for(file)
    size, number = file.stat().st_size, 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            for batch in arrow_batches(pyarrow, source):
                check_column(file, field, batch.schema)
                for text in batch.column(field).to_pylist():
                    number += 1
                    yield row(text, file, number, field, min(source.tell(), size))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged or not an Arrow file ({error})") from None


def arrow_batches(pyarrow: ModuleType, source: Any) -> Iterator[Any]:
    from pyarrow import ipc

    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        opened = ipc.open_file(source)
        for i in range(opened.num_record_batches):
            yield opened.get_batch(i)
    else:
        yield from ipc.open_stream(source)


def pyarrow_for(file: Path) -> ModuleType:
    try:
        import pyarrow
    except ImportError:
        expected = "an installation with pyarrow (pip install 'fastlm[parquet]')"
        raise mismatch(str(file), expected, "one without") from None
    return pyarrow


def check_column(file: Path, field: str, schema: Any) -> None:
    if field not in schema.names:
        raise no_field(str(file), field, schema.names)


def row(text: Any, file: Path, number: int, field: str, read: int) -> Record:
    place = f"{file}:{number}"
    return Record(checked(text, f"a string in the column {field!r}", place), place, read)


def checked(text: Any, expected: str, place: str) -> str:
    if not isinstance(text, str):
        raise mismatch(place, expected, shown(text))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise mismatch(place, "Unicode text", "half of a surrogate pair") from None
    return text


def no_field(place: str, field: str, names: list[str]) -> ValueError:
    near = did_you_mean(field, names)
    return mismatch(place, f"the field {field!r} (--field names another)", f"{', '.join(names[:20]) or 'none'}{near}")


RECORDS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".parquet": parquet,
    ".arrow": arrow,
}
