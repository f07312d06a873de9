"""Reads files into token ids and cuts token ids into windows of one context."""

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlm.core.errors import mismatch
from fastlm.training.settings import TOKENIZERS, check_one_of, check_range
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer

# Maximum number of tokens of an evaluation: the standard error is about 0.01 nats.
EVALUATED_TOKENS = 2**16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids in the smallest sufficient integer dtype, and the tokenizer."""

    train: Tensor
    validation: Tensor
    tokenizer: Tokenizer


def load(
    paths: Sequence[str | Path],
    *,
    tokenizer: str = "byte",
    val_fraction: float = 0.1,
    val_file: str | Path | None = None,
    masked: bool = False,
) -> Corpus:
    """Reads files as one text and tokenizes it.

    Args:
        paths: files, directories or glob patterns, concatenated in this order.
        tokenizer: "byte" or "char".
        val_fraction: the last part of the text, kept for validation.
        val_file: a separate validation text, used instead of val_fraction.
        masked: add the special tokens for masked-token training.

    Raises:
        ValueError, FileNotFoundError: an argument is invalid; the message names it.
    """
    check_one_of("tokenizer", tokenizer, TOKENIZERS)
    if not val_file:
        check_range("val_fraction", val_fraction, 0, 1, open_left=True)
    text = read(find_files("data", paths))
    held_out = read(find_files("val_file", [val_file])) if val_file else {}
    if not any(text.values()):
        files = f"{len(text)} empty file{'s' * (len(text) != 1)}, the first is {next(iter(text))}"
        raise mismatch("data", "a text that is not empty", files)
    encode, tokenizer_object = (by_byte if tokenizer == "byte" else by_character)(text | held_out, masked)
    ids = encode(text)
    cut = len(ids) if val_file else round(len(ids) * (1 - val_fraction))
    validation = encode(held_out) if val_file else ids[cut:]
    return Corpus(train=ids[:cut], validation=validation, tokenizer=tokenizer_object)


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


def find_files(argument: str, paths: Iterable[str | Path]) -> list[Path]:
    """Expands directories (recursively) and glob patterns (with `**`) to sorted lists of files.

    Hidden and binary files are skipped unless a path names them.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if path.exists() and not path.is_dir():
            raise mismatch(argument, "a file, a directory or a pattern", path)
        candidates = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(
            p
            for p in candidates
            if p.is_file() and not is_hidden(p.relative_to(path) if path.is_dir() else p) and not is_binary(p)
        )
        if not files:
            raise FileNotFoundError(
                f"{argument}: expected a file, a directory with text files or a pattern that matches text files, "
                f"got {str(path)!r}"
            )
        found += files
    if not found:
        raise mismatch(argument, "at least one file, directory or pattern", "none")
    return found


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


def by_character(texts: dict[Path, bytes], masked: bool):
    """The vocabulary consists of all characters of the texts, sorted by code point."""
    codes = {path: code_points(path, text) for path, text in texts.items()}
    alphabet = torch.unique(torch.cat(list(codes.values())))
    dtype = torch.uint8 if len(alphabet) <= 256 else torch.int32

    def encode(some):
        return torch.searchsorted(alphabet, torch.cat([codes[path] for path in some])).to(dtype)

    return encode, char_tokenizer([chr(c) for c in alphabet.tolist()], masked=masked)


def code_points(path: Path, text: bytes) -> Tensor:
    try:
        decoded = bytearray(text.decode("utf-8").encode("utf-32-le"))
    except UnicodeDecodeError as wrong:
        expected = "UTF-8 text for the char tokenizer (the byte tokenizer accepts any file)"
        raise mismatch("data", expected, f"{path}, invalid at byte {wrong.start}") from None
    return torch.frombuffer(decoded, dtype=torch.int32) if decoded else torch.empty(0, dtype=torch.int32)


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
