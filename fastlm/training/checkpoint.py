"""Saving: everything is written beside its place first and moved there when it is whole."""

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
    """The folder that will be written, checked before the training rather than after it."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, or a name for a new one, got the file {str(out)!r}")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"out: expected a folder that can be written, got {str(out)!r} in {str(nearest)!r}")
    return out


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`. Its files move up at the end; if anything fails, they vanish, and `out` is as it was before."""
    created, whole = not out.exists(), False
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
        try:
            yield folder
            for file in sorted(folder.iterdir()):
                os.replace(file, out / file.name)
            whole = True
        finally:
            shutil.rmtree(out if created and not whole else folder, ignore_errors=True)
    except Exception as failure:
        if (
            isinstance(failure, OSError) or type(failure).__name__ == "SafetensorError"
        ):  # the latter is what a full disk looks like from safetensors
            raise OSError(
                f"out: could not save into {str(out)!r}, nothing was kept there: {one_line(failure)}"
            ) from failure
        raise


def one_line(failure: BaseException) -> str:
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return " ".join(reason.split())


def write_model(folder: Path, model: PretrainedModel, tokenizer: Tokenizer) -> None:
    """What `fastlm generate`, `from_pretrained` and Hugging Face's own classes read."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
