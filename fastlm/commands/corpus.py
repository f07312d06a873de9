"""The text and the tokenizer of a run of fastlm train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastlm.commands.display import byte_bar, say
from fastlm.core.errors import did_you_mean, mismatch
from fastlm.generation import load_tokenizer
from fastlm.generation.tokenizer import load_tokenizer_file
from fastlm.training import checkpoint, data
from fastlm.training.settings import TOKENIZERS
from fastlm.training.tokenizers import end_of_text_id

FILE = "tokenizer.json"


def load_text(load: Callable[..., data.Corpus], *arguments: Any, **options: Any) -> data.Corpus:
    """Calls data.load, or another function with its options, with a progress bar."""
    with byte_bar() as progress:
        corpus = load(*arguments, progress=progress, **options)
    for damage in corpus.damages:
        say(f"tokenized again: {damage}")
    return corpus


def tokenizer_of(name: str) -> tuple[str | Tokenizer, Path | None]:
    """A tokenizer by its name or path, and the directory or file that it comes from."""
    if name in TOKENIZERS:
        return name, None
    path = Path(name)
    if path.is_dir():
        return tokenizer_in(path)
    if path.is_file():
        return (tokenizer_in(path.parent)[0], path.parent) if path.name == FILE else (load_tokenizer_file(path), path)
    expected = f"{', '.join(TOKENIZERS)}, a {FILE} or a directory with one"
    raise mismatch("tokenizer", expected, f"{name!r}{did_you_mean(name, TOKENIZERS)}")


def tokenizer_in(directory: Path) -> tuple[Tokenizer, Path]:
    return load_tokenizer(directory).tokenizer, directory


def end_of_text_of(tokenizer: str | Tokenizer, source: Path | None) -> int | None:
    return end_of_text_id(tokenizer, settings_of(source)) if isinstance(tokenizer, Tokenizer) else None


def settings_of(source: Path | None) -> str | None:
    """The contents of the tokenizer_config.json of a tokenizer."""
    return checkpoint.read_tokenizer_settings(source) if source is not None and source.is_dir() else None
