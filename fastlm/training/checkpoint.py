"""Saves a trained model. Files are written to a temporary directory and moved to their final paths when complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from fastlm.models.base import PretrainedModel


def prepare(out: str | Path) -> Path:
    """Checks, before training starts, that the output directory can be written."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a directory or a path for a new one, got the file {str(out)!r}")
    nearest = next(directory for directory in (out, *out.absolute().parents) if directory.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"out: expected a writable directory, got {str(out)!r} in {str(nearest)!r}")
    return out


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a temporary directory inside `out` and moves its files into `out` on exit.

    If an exception is raised, the files are deleted and `out` is as before.
    """
    created, complete = not out.exists(), False
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
        try:
            yield folder
            for file in sorted(folder.iterdir()):
                os.replace(file, out / file.name)
            complete = True
        finally:
            shutil.rmtree(out if created and not complete else folder, ignore_errors=True)
    except Exception as failure:
        # On a full disk safetensors raises its own type of error.
        if isinstance(failure, OSError) or type(failure).__name__ == "SafetensorError":
            raise OSError(f"out: could not save to {str(out)!r}; no file was written: {one_line(failure)}") from failure
        raise


def one_line(failure: BaseException) -> str:
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return " ".join(reason.split())


def write_model(folder: Path, model: PretrainedModel, tokenizer: Tokenizer) -> None:
    """Writes the files that `fastlm generate`, `from_pretrained` and Hugging Face's classes read."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
