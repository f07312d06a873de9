"""Reads files into token ids and cuts token ids into windows of one context."""

import codecs
import dataclasses
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlm.core.errors import mismatch
from fastlm.training.settings import TOKENIZERS, check_one_of, check_range
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer

# Maximum number of tokens of an evaluation: the standard error is about 0.01 nats.
EVALUATED_TOKENS = 2**16
CHUNK = 2**20  # bytes of a text that are decoded at a time
CODE_POINTS = 0x110000  # of Unicode
NEW_PARAGRAPH = re.compile(r"\n(?=\S)")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids in the smallest sufficient integer dtype, the tokenizer, and the files that were read or not."""

    train: Tensor
    validation: Tensor
    tokenizer: Tokenizer
    skipped: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()  # of the text, in this order
    validation_files: tuple[Path, ...] = ()  # of a separate validation text


class Files(NamedTuple):
    found: list[Path]
    skipped: list[Path]  # hidden and binary files that no path names


def load(
    paths: Sequence[str | Path],
    *,
    tokenizer: str | Tokenizer = "byte",
    val_fraction: float = 0.1,
    val_file: str | Path | Sequence[Path] | None = None,
    masked: bool = False,
) -> Corpus:
    """Reads files as one text and tokenizes it.

    Args:
        paths: files, directories or glob patterns, concatenated in this order.
        tokenizer: "byte" or "char", or that of a model.
        val_fraction: the last part of the text, kept for validation.
        val_file: a separate validation text, or the files of one, used instead of val_fraction.
        masked: add the special tokens for masked-token training.

    Raises:
        ValueError, FileNotFoundError: an argument is invalid; the message names it.
    """
    if not isinstance(tokenizer, Tokenizer):
        check_one_of("tokenizer", tokenizer, TOKENIZERS)
    if not val_file:
        check_range("val_fraction", val_fraction, 0, 1, open_left=True)
    training = find_files("data", paths)
    val_files = [val_file] if isinstance(val_file, str | Path) else val_file
    separate = find_files("val_file", val_files if val_file and val_files else [])
    if not training.found:
        raise mismatch("data", "at least one file, directory or pattern", "none")
    text, held_out = read(training.found), read(separate.found)
    if not any(text.values()):
        files = f"{len(text)} empty file{'s' * (len(text) != 1)}, the first is {next(iter(text))}"
        raise mismatch("data", "a text that is not empty", files)
    if isinstance(tokenizer, Tokenizer):
        encode, tokenizer_object = by_tokenizer(tokenizer), tokenizer
    else:
        encode, tokenizer_object = (by_byte if tokenizer == "byte" else by_character)(text | held_out, masked)
    ids = encode(text)
    cut = len(ids) if val_file else round(len(ids) * (1 - val_fraction))
    validation = encode(held_out) if val_file else ids[cut:]
    skipped = (*training.skipped, *separate.skipped)
    return Corpus(
        train=ids[:cut],
        validation=validation,
        tokenizer=tokenizer_object,
        skipped=skipped,
        files=tuple(training.found),
        validation_files=tuple(separate.found),
    )


def check_length(corpus: Corpus, context: int) -> None:
    """Checks that the training and the validation part have at least one context and the token that follows it."""
    for argument, ids, part in (
        ("data", corpus.train, "training"),
        ("val_fraction or val_file", corpus.validation, "validation"),
    ):
        if len(ids) < context + 1:
            raise mismatch(
                argument,
                f"at least {context + 1} tokens for {part} (one context of {context} and the next token)",
                len(ids),
            )


def find_files(argument: str, paths: Iterable[str | Path]) -> Files:
    """Expands directories (recursively) and glob patterns (with `**`) to sorted lists of files.

    Hidden and binary files are skipped unless a path names them. A file is read once, however often it is named.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if path.exists() and not path.is_dir():
            raise mismatch(argument, "a file, a directory or a pattern", path)
        candidates = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files: list[Path] = []
        others: list[Path] = []
        for file in sorted(p for p in candidates if p.is_file()):
            hidden = is_hidden(file.relative_to(path) if path.is_dir() else file)
            (others if hidden or is_binary(file) else files).append(file)
        if not files:
            raise FileNotFoundError(
                f"{argument}: expected a file, a directory with text files or a pattern that matches text files, "
                f"got {str(path)!r}"
            )
        found += files
        skipped += others
    return Files(list({file.absolute(): file for file in found}.values()), skipped)


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def is_binary(path: Path) -> bool:
    """Whether there is a NUL byte near the beginning, the criterion of git and grep."""
    with path.open("rb") as file:
        return b"\0" in file.read(8000)


def read(files: Iterable[Path]) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in files}


def by_byte(texts: dict[Path, bytes], masked: bool):
    def encode(some):
        text = bytearray().join(some.values())
        return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)

    return encode, byte_tokenizer(masked=masked)


def by_tokenizer(tokenizer: Tokenizer):
    """Without the special tokens that the tokenizer adds around a text."""

    def encode(some):
        pieces = [
            torch.tensor(tokenizer.encode(part, add_special_tokens=False).ids, dtype=torch.int32)
            for path, text in some.items()
            for part in paragraphs(decoded(path, text))
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)

    return encode


def decoded(path: Path, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise mismatch("data", "UTF-8 text for the tokenizer", f"{path}, invalid at byte {wrong.start}") from None


def paragraphs(text: str) -> Iterator[str]:
    """Parts of about CHUNK characters that begin with a line that is not indented, so that no token is cut.

    The ids of a text as a whole would take many times its size.
    """
    begin = 0
    while len(text) - begin > CHUNK:
        found = NEW_PARAGRAPH.search(text, begin + CHUNK)
        if found is None:
            break
        yield text[begin : found.end()]
        begin = found.end()
    if begin < len(text):
        yield text[begin:]


def by_character(texts: dict[Path, bytes], masked: bool):
    """The vocabulary consists of all characters of the texts, sorted by code point.

    Texts are decoded in chunks, twice: once for the vocabulary and once for the ids. Decoding them as a whole would
    take many times their size.
    """
    occurs, counts = np.zeros(CODE_POINTS, dtype=bool), dict.fromkeys(texts, 0)
    for path, text in texts.items():
        for codes in code_points(path, text):
            occurs[codes] = True
            counts[path] += len(codes)
    alphabet = np.flatnonzero(occurs)
    id_of = np.zeros(CODE_POINTS, dtype=np.uint8 if len(alphabet) <= 256 else np.int32)
    id_of[alphabet] = np.arange(len(alphabet))

    def encode(some):
        ids, filled = np.empty(sum(counts[path] for path in some), dtype=id_of.dtype), 0
        for path, text in some.items():
            for codes in code_points(path, text):
                ids[filled : filled + len(codes)] = id_of[codes]
                filled += len(codes)
        return torch.from_numpy(ids)

    return encode, char_tokenizer([chr(c) for c in alphabet.tolist()], masked=masked)


def code_points(path: Path, text: bytes) -> Iterator[np.ndarray]:
    """The code points of a UTF-8 text, in chunks."""
    decoder, whole = codecs.getincrementaldecoder("utf-8")(), memoryview(text)
    for start in range(0, len(text), CHUNK):
        undecoded = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            chunk = decoder.decode(whole[start : start + CHUNK], final=start + CHUNK >= len(text))
        except UnicodeDecodeError as wrong:
            expected = "UTF-8 text for the char tokenizer (the byte tokenizer accepts any file)"
            place = start - undecoded + wrong.start
            raise mismatch("data", expected, f"{path}, invalid at byte {place}") from None
        yield np.frombuffer(chunk.encode("utf-32-le"), dtype=np.uint32)


def windows(ids: Tensor, starts: Tensor, length: int) -> Tensor:
    return ids[starts[:, None] + torch.arange(length)].long()


def random_windows(ids: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, length) windows with uniformly distributed starts; they may overlap."""
    return windows(ids, torch.randint(len(ids) - length + 1, (count,), generator=generator), length)


def spread_windows(ids: Tensor, length: int, batch: int, max_tokens: int = EVALUATED_TOKENS) -> Iterator[Tensor]:
    """Deterministic windows in batches of (≤ batch, length).

    They are adjacent if max_tokens covers all ids, else evenly spaced.
    """
    count = max(1, min((len(ids) - 1) // (length - 1), max_tokens // (length - 1)))
    last_start = len(ids) - length
    starts = (
        torch.tensor([i * last_start // (count - 1) for i in range(count)])
        if count > 1
        else torch.zeros(1, dtype=torch.long)
    )
    for some in starts.split(batch):
        yield windows(ids, some, length)
