"""fastlm tokenizer train: trains a tokenizer on text and writes a directory for --tokenizer and AutoTokenizer."""

from pathlib import Path

from fastlm.commands.display import console, quantity, say
from fastlm.commands.train import skipped_in_words
from fastlm.models.config import stored
from fastlm.training import checkpoint
from fastlm.training.train_tokenizer import train_tokenizer, write_tokenizer

FILE = "tokenizer.json"


def run(
    paths: list[Path], *, kind: str, vocab_size: int, lowercase: bool, field: str, out: Path, overwrite: bool
) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a directory or a path for a new one, got the file {str(out)!r}")
    checkpoint.check_writable("out", out)
    if stored(out, FILE).exists() and not overwrite:
        got = f"{str(out)!r}, which has {FILE}; --overwrite replaces it"
        raise FileExistsError(f"out: expected a directory without a tokenizer, got {got}")
    tokenizer, files = train_tokenizer(
        paths,
        kind=kind,
        vocab_size=vocab_size,
        lowercase=lowercase,
        field=field,
        show_progress=console.is_terminal,
    )
    if files.skipped:
        say(skipped_in_words(files.skipped))
    write_tokenizer(out, tokenizer)
    say(f"{quantity(tokenizer.get_vocab_size(), 'token')} from {quantity(len(files.found), 'file')}; saved to {out}")
