"""Saves a trained model: the checkpoint, its tokenizer, and what else a command writes, all at once."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlm._version import __version__
from fastlm.models import checkpoint
from fastlm.models.config import CONFIG, stored
from fastlm.training.tokenizers import tokenizer_config

TOKENIZER_SETTINGS = "tokenizer_config.json"
CHECKPOINTS, STEP = "checkpoints", "step-"  # names of the directories of checkpoints, see checkpoints.py


class Trained(Protocol):
    """What a checkpoint needs of a model. A PretrainedModel is one."""

    config: Any

    def state_dict(self) -> dict[str, Any]: ...

    def write_files(self, folder: Path, state: dict[str, Tensor] | None = None) -> None: ...


def prepare(out: str | Path, *, overwrite: bool = False, can_resume: bool = False) -> Path:
    """Checks, before training starts, that the output directory can be written and has no model or checkpoint yet.

    can_resume: whether the command has --resume.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a directory or a path for a new one, got the file {str(out)!r}")
    check_writable("out", out)
    names = [name for name in (CONFIG, *checkpoint.WEIGHT_FILES) if stored(out, name).exists()]
    names += [str(folder.relative_to(out)) for folder in saved_in(out)]
    if names and not overwrite:
        options = f"--overwrite replaces it{', --resume continues it' * (can_resume and bool(saved_in(out)))}"
        raise FileExistsError(
            f"out: expected a directory without a model, got {str(out)!r}, which has {names[0]}; {options}"
        )
    return out


def check_writable(argument: str, out: Path) -> None:
    nearest = next(directory for directory in (out, *out.absolute().parents) if directory.exists())
    if not is_writable(nearest):
        raise PermissionError(f"{argument}: expected a writable directory, got {str(out)!r} in {str(nearest)!r}")


def is_writable(directory: Path) -> bool:
    """Found by trying: for root, os.access() is true of file systems such as /proc too."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fastlm-", dir=directory))
    except OSError:
        return False
    return True


def saved_in(run: Path) -> list[Path]:
    """The directories of the checkpoints of a run, the oldest first."""
    folders = (run / CHECKPOINTS).glob(f"{STEP}*")
    return sorted((folder for folder in folders if folder.name.removeprefix(STEP).isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(STEP))


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


def write_model(
    folder: Path,
    model: Trained,
    tokenizer: Tokenizer,
    tokenizer_settings: str | None = None,
    *,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes the files that `fastlm generate`, `from_pretrained` and Hugging Face's classes read.

    Args:
        tokenizer_settings: the contents of tokenizer_config.json; None: those for a tokenizer of this package.
        state: a copy of the model's state dict, written instead of the present one.
    """
    model.write_files(folder, state)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    if tokenizer_settings is not None:
        (folder / TOKENIZER_SETTINGS).write_text(tokenizer_settings, encoding="utf-8")
    else:
        write_json(folder / TOKENIZER_SETTINGS, tokenizer_config(tokenizer, model.config.max_position_embeddings))


def read_tokenizer_settings(directory: Path) -> str | None:
    path = stored(directory, TOKENIZER_SETTINGS)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def versions() -> dict[str, str]:
    return {"fastlm": __version__, "torch": torch.__version__}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
