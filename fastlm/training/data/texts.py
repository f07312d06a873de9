"""Reads text files in chunks: as bytes, as characters, or cut where a tokenizer does not join them."""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastlm.core.errors import mismatch

CHUNK = 2**20  # bytes of a file, or characters of a text, that are encoded at a time
LONG = 2  # chunks, after which a text without such lines is cut between words
LONGEST = 16  # chunks, after which one without words is cut anywhere
NEW_LINE = re.compile(r"(?<=\S)\n(?=[^\s/])")
NEW_PARAGRAPH = re.compile(r"\n(?=\S)")
NEW_WORD = re.compile(r"(?<=\S)(?= \S)")


def byte_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            yield chunk


def characters(file: Path, expected: str) -> Iterator[str]:
    """A UTF-8 text in chunks.

    Raises:
        ValueError: it is not UTF-8; the message has `expected`, the file and the place.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in byte_chunks(file):
        undecoded = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as wrong:
            raise mismatch("data", expected, f"{file}, invalid at byte {read - undecoded + wrong.start}") from None
        read += len(chunk)
    undecoded = len(decoder.getstate()[0])
    if undecoded:
        raise mismatch("data", expected, f"{file}, invalid at byte {read - undecoded}")


def paragraphs(parts: Iterable[str]) -> Iterator[str]:
    """A text, given in parts, as parts of about CHUNK characters that begin with a line.

    It is not indented, and no empty line is before it: tokenizers join line breaks and spaces with each other, with
    punctuation before them and some with slashes after them, so that no token is cut here. The ids of a text as a whole
    would take many times its size.
    """
    text = ""
    for part in parts:
        text += part
        while len(text) > CHUNK:
            found = NEW_LINE.search(text, CHUNK)
            if found is None and len(text) > LONG * CHUNK:
                found = NEW_WORD.search(text, CHUNK) or NEW_PARAGRAPH.search(text, CHUNK)
            if found is None and len(text) <= LONGEST * CHUNK:
                break
            end = CHUNK if found is None else found.end()
            yield text[:end]
            text = text[end:]
    if text:
        yield text
