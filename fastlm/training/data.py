"""From files to token ids, once, and from token ids to windows of one context."""

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlm.ops.boundary import mismatch
from fastlm.training.settings import TOKENIZERS, one_of, within
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer

EVALUATED_TOKENS = (
    2**16
)  # at most: enough for a standard error of a hundredth of a nat, and seconds at most for the models this trainer is for


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids, in the smallest integer type that holds them, and the tokenizer that made them."""

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
    """Read the files (folders, patterns) in order as one text; validation is its end, or a file of its own."""
    one_of("tokenizer", tokenizer, TOKENIZERS)
    if not val_file:
        within("val_fraction", val_fraction, 0, 1, open_left=True)
    text = read(find_files("data", paths))
    held_out = read(find_files("val_file", [val_file])) if val_file else {}
    if not any(text.values()):
        raise mismatch(
            "data", "some text", f"{len(text)} empty file{'s' * (len(text) != 1)}, the first {next(iter(text))}"
        )
    encode, made = (by_byte if tokenizer == "byte" else by_character)(text | held_out, masked)
    ids = encode(text)
    cut = len(ids) if val_file else round(len(ids) * (1 - val_fraction))
    return Corpus(train=ids[:cut], validation=encode(held_out) if val_file else ids[cut:], tokenizer=made)


def check_length(corpus: Corpus, context: int) -> None:
    """One context and the token after it, on either side of the split."""
    for argument, ids, part in (
        ("data", corpus.train, "training"),
        ("val_fraction or val_file", corpus.validation, "validation"),
    ):
        if len(ids) < context + 1:
            raise mismatch(
                argument,
                f"at least {context + 1} tokens for {part}, one context of {context} and the token after it",
                len(ids),
            )


def find_files(argument: str, paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named; of a folder, all files below it, and of a pattern (`**` too), all that match, both sorted and without hidden and binary ones."""
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if path.exists() and not path.is_dir():
            raise mismatch(argument, "a file, a folder or a pattern", path)
        candidates = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(
            p
            for p in candidates
            if p.is_file() and not hidden(p.relative_to(path) if path.is_dir() else p) and not binary(p)
        )
        if not files:
            raise FileNotFoundError(
                f"{argument}: expected a file, a folder with text files in it or a pattern that matches some, got {str(path)!r}"
            )
        found += files
    if not found:
        raise mismatch(argument, "at least one file, folder or pattern", "none")
    return found


def hidden(path: Path) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def binary(path: Path) -> bool:
    """As git and grep judge: a NUL byte near the beginning."""
    with path.open("rb") as file:
        return b"\0" in file.read(8000)


def read(files: Iterable[Path]) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in files}


def by_byte(texts: dict[Path, bytes], masked: bool):
    def encode(some):
        joined = bytearray().join(some.values())
        return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)

    return encode, byte_tokenizer(masked=masked)


def by_character(texts: dict[Path, bytes], masked: bool):
    """The vocabulary is every character of the texts, in the order of their code points."""
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
        raise mismatch(
            "data",
            "UTF-8 text for the char tokenizer (the byte tokenizer reads anything)",
            f"{path}, where byte {wrong.start} is not",
        ) from None
    return torch.frombuffer(decoded, dtype=torch.int32) if decoded else torch.empty(0, dtype=torch.int32)


def windows(ids: Tensor, starts: Tensor, length: int) -> Tensor:
    return ids[starts[:, None] + torch.arange(length)].long()


def random_windows(ids: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, length): every start is as likely, windows may overlap."""
    return windows(ids, torch.randint(len(ids) - length + 1, (count,), generator=generator), length)


def spread_windows(ids: Tensor, length: int, batch: int, most: int = EVALUATED_TOKENS) -> Iterator[Tensor]:
    """The same windows every time, (≤ batch, length) each: side by side where `most` tokens cover the ids, else evenly spread over them."""
    count = max(1, min((len(ids) - 1) // (length - 1), most // (length - 1)))
    room = len(ids) - length  # start of the last window
    starts = (
        torch.tensor([i * room // (count - 1) for i in range(count)]) if count > 1 else torch.zeros(1, dtype=torch.long)
    )
    for some in starts.split(batch):
        yield windows(ids, some, length)
