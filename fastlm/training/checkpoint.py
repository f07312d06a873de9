"""Saves a trained model: the checkpoint, its tokenizer, and what else a command writes, all at once."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models import checkpoint
from fastlm.models.base import PretrainedModel
from fastlm.models.config import CONFIG, stored
from fastlm.training.tokenizers import tokenizer_config


def prepare(out: str | Path, *, overwrite: bool = False) -> Path:
    """Checks, before training starts, that the output directory can be written and has no model yet."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # torchrun sets it
        raise mismatch("WORLD_SIZE", "1, as training on several processes is not supported", repr(processes))
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a directory or a path for a new one, got the file {str(out)!r}")
    nearest = next(directory for directory in (out, *out.absolute().parents) if directory.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"out: expected a writable directory, got {str(out)!r} in {str(nearest)!r}")
    names = (CONFIG, *checkpoint.WEIGHT_FILES)
    if not overwrite and (found := next((name for name in names if stored(out, name).exists()), None)):
        raise FileExistsError(
            f"out: expected a directory without a model, got {str(out)!r}, which has {found}; --overwrite replaces it"
        )
    return out


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """models.checkpoint.staged, with errors that name the option."""
    try:
        with checkpoint.staged(out) as folder:
            yield folder
    except OSError as failure:
        raise OSError(f"out: could not save to {str(out)!r}; no file was written: {one_line(failure)}") from failure


def one_line(failure: BaseException) -> str:
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return " ".join(reason.split())


def write_model(folder: Path, model: PretrainedModel, tokenizer: Tokenizer, init: Path | None = None) -> None:
    """Writes the files that `fastlm generate`, `from_pretrained` and Hugging Face's classes read.

    init: the directory that the tokenizer comes from, whose settings are kept.
    """
    model.write_files(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = None if init is None else stored(init, "tokenizer_config.json")
    if settings is not None and settings.is_file():
        shutil.copyfile(settings, folder / "tokenizer_config.json")
    else:
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, model.config.max_position_embeddings))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
