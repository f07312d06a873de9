"""Reads files into token ids."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm._version import __version__
from fastlm.core.errors import mismatch
from fastlm.training.checkpoints import sha256
from fastlm.training.data.encode import ByteEncoder, CharEncoder, Encoder, TokenizerEncoder, alphabet_of
from fastlm.training.data.pipeline import TRAINING, VALIDATION, Plan, Progress, write_parts
from fastlm.training.data.records import is_records, records
from fastlm.training.data.shards import TOKENIZER, key_of, prepared, read_parts
from fastlm.training.data.sources import find_files, text_files
from fastlm.training.data.texts import characters
from fastlm.training.data.tokens import Tokens
from fastlm.training.settings import DOCUMENTS, TOKENIZERS, check_one_of, check_range

RECORD_END = "\n"  # after each record, with a tokenizer without an end-of-text token


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids, the tokenizer, and the files that were read or not."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    skipped: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()  # of the text, in this order
    validation_files: tuple[Path, ...] = ()  # of a separate validation text
    sums: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the SHA-256 of the files by absolute path
    end_of_text: int | None = None  # the id after each document
    folder: Path | None = None  # of the ids, in the cache
    damages: tuple[str, ...] = ()  # of ids that were in the cache and had to be computed again


def load(
    paths: Sequence[str | Path],
    *,
    tokenizer: str | Tokenizer = "byte",
    end_of_text: int | None = None,
    val_fraction: float = 0.1,
    val_file: str | Path | Sequence[Path] | None = None,
    masked: bool = False,
    field: str = "text",
    documents: str = "stream",
    context: int = 0,
    cache: Path | None = None,
    sums: Mapping[str, str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Corpus:
    """Reads files and tokenizes them.

    Text files in one stream are cut in two for validation, at val_fraction before the end. Where there are documents
    to choose from, that is with documents="packed" or files of records, documents are chosen by a hash of their
    content, so that each falls on the same side whatever the order and the other documents.

    Args:
        paths: files, directories or glob patterns, concatenated in this order. A text file is a document; of .jsonl,
            .parquet and .arrow files every record is one.
        tokenizer: "byte" or "char", or that of a model.
        end_of_text: with the tokenizer of a model, the id to write after each document; None: without one, a line
            break follows each record.
        val_fraction: fraction of the text, or of the documents, for validation.
        val_file: a separate validation text, or the files of one, used instead of val_fraction.
        masked: add the special tokens for masked-token training.
        field: the field of JSON lines, or the column of Parquet and Arrow, with the texts.
        documents: "stream" or "packed".
        context: check that both parts have so many tokens, and the next one.
        cache: where token ids are kept for the next time; None: they are deleted at the end of the process.
        sums: the SHA-256 of the files by their absolute paths, if they were computed just now.
        progress: is called with the stage, reading or tokenizing, and the number of bytes that are done, and of all.

    Raises:
        ValueError, FileNotFoundError: an argument is invalid; the message names it.
    """
    if not isinstance(tokenizer, Tokenizer):
        check_one_of("tokenizer", tokenizer, TOKENIZERS)
    check_one_of("documents", documents, DOCUMENTS)
    if not val_file:
        check_range("val_fraction", val_fraction, 0, 1, open_left=True)
    training = text_files("data", paths)
    val_files = [val_file] if isinstance(val_file, str | Path) else val_file
    separate = find_files("val_file", val_files if val_file and val_files else [])
    files = [*training.found, *separate.found]
    has_records = any(map(is_records, files))
    by_content = not val_file and (documents == "packed" or has_records)
    before = states_of(files)
    digests = sums_of(files, progress) if sums is None else dict(sums)
    plan = Plan(
        files={TRAINING: training.found} | ({VALIDATION: separate.found} if val_file else {}),
        sums=digests,
        field=field,
        held_out=val_fraction if by_content else 0.0,
        end_of_text=end_of_text,
        record_end=(),
        progress=progress,
        processes=torch.get_num_threads(),
    )
    tail = 0.0 if val_file or by_content else val_fraction

    def write(folder: Path) -> dict[str, Any]:
        encoder = encoder_for(tokenizer, files, field, masked)
        (folder / TOKENIZER).write_text(encoder.tokenizer.to_str(), encoding="utf-8")
        ending, _ = encoder.encode(list(encoder.parts(RECORD_END)) if end_of_text is None and has_records else [])
        parts = write_parts(folder, encoder, plan._replace(record_end=ending.tolist()))
        if changed := [file for file, state in states_of(files).items() if state != before[file]]:
            raise mismatch("data", "files that do not change while they are read", changed[0])
        chosen = "" if not by_content else documents_in_words(parts)
        check_lengths(*split({name: part["tokens"] for name, part in parts.items()}, tail), context, chosen)
        return {
            "parts": parts,
            "tokenizer_sha256": sha256(folder / TOKENIZER),
            "sources": [{"file": str(file.absolute()), "sha256": digests[str(file.absolute())]} for file in files],
            "fastlm": __version__,
        }

    identity = {
        "sources": {name: [digests[str(file.absolute())] for file in some] for name, some in plan.files.items()},
        "records": [is_records(file) for file in files],
        "tokenizer": digest_of(tokenizer) if isinstance(tokenizer, Tokenizer) else [tokenizer, masked],
        "end_of_text": end_of_text,
        "field": field if has_records else None,
        "held_out": plan.held_out,
    }
    with contextlib.nullcontext(cache) if cache else tempfile.TemporaryDirectory(prefix="fastlm-") as place:
        folder, damages = prepared(Path(place), key_of(identity), write)
        parts = read_parts(folder)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    if tail:
        train, validation = parts[TRAINING].cut(split({TRAINING: len(parts[TRAINING])}, tail)[0])
    else:
        train, validation = parts[TRAINING], parts[VALIDATION]
    return Corpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        skipped=(*training.skipped, *separate.skipped),
        files=tuple(training.found),
        validation_files=tuple(separate.found),
        sums=digests,
        end_of_text=end_of_text,
        folder=folder if cache else None,
        damages=tuple(damages),
    )


def split(tokens: Mapping[str, int], tail: float) -> tuple[int, int]:
    """The number of tokens for training and for validation. tail: the fraction at the end, of a text in one part."""
    if not tail:
        return tokens[TRAINING], tokens[VALIDATION]
    first = round(tokens[TRAINING] * (1 - tail))
    return first, tokens[TRAINING] - first


def check_length(corpus: Corpus, context: int) -> None:
    """Checks that the training and the validation part have at least one context and the token that follows it."""
    check_lengths(len(corpus.train), len(corpus.validation), context)


def check_lengths(train: int, validation: int, context: int, chosen: str = "") -> None:
    """chosen: more about the tokens for validation, for the message."""
    for argument, count, part, more in (
        ("data", train, "training", ""),
        ("val_fraction or val_file", validation, "validation", chosen),
    ):
        if context and count < context + 1:
            expected = f"at least {context + 1} tokens for {part} (one context of {context} and the next token)"
            raise mismatch(argument, expected, f"{count}{more}")


def documents_in_words(parts: Mapping[str, Mapping[str, Any]]) -> str:
    chosen, others = parts[VALIDATION]["documents"], parts[TRAINING]["documents"]
    return f" in {chosen} of {chosen + others} documents, which are chosen by their content"


def encoder_for(tokenizer: str | Tokenizer, files: Sequence[Path], field: str, masked: bool) -> Encoder:
    if isinstance(tokenizer, Tokenizer):
        return TokenizerEncoder(tokenizer)
    if tokenizer == "byte":
        return ByteEncoder(masked=masked)
    return CharEncoder(alphabet_of(texts_of(files, field, CharEncoder.expected)), masked=masked)


def texts_of(files: Sequence[Path], field: str, expected: str) -> Iterator[str]:
    """All texts of the files in parts, with the line breaks between records."""
    for file in files:
        if is_records(file):
            yield RECORD_END
            yield from (record.text for record in records(file, field))
        else:
            yield from characters(file, expected)


def states_of(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change."""
    return {file: (status.st_size, status.st_mtime_ns) for file in files for status in (file.stat(),)}


def sums_of(files: Sequence[Path], progress: Progress) -> dict[str, str]:
    """The SHA-256 of files by their absolute paths."""
    total, done, lock = sum(file.stat().st_size for file in files), 0, threading.Lock()

    def count(read: int) -> None:
        nonlocal done
        with lock:
            done += read
            progress("reading", min(done, total), total)

    with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(lambda file: sha256(file, count), files)
        return {str(file.absolute()): digest for file, digest in zip(files, digests, strict=True)}


def digest_of(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
