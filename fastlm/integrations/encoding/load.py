"""Loading a transformers model from a directory, and accelerating it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from fastlm.core.errors import mismatch
from fastlm.integrations.encoding.tokens import one_line
from fastlm.integrations.transformers import accelerate
from fastlm.models.config import CONFIG, read_json


def load(directory: str | os.PathLike, kind: Any, *, dtype: torch.dtype | None, may_be_missing: str) -> nn.Module:
    """The model in a directory, in evaluation mode, through `fastlm.accelerate`.

    Args:
        kind: one of transformers' auto classes.
        dtype: of the parameters; None: as stored.
        may_be_missing: the beginning of the names of weights that are not read.
    """
    path = Path(directory)
    try:
        read_json(path / CONFIG)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"model: {error}") from None
    try:
        with quietly():
            dtype_of = "auto" if dtype is None else dtype
            model, read = kind.from_pretrained(
                str(path), dtype=dtype_of, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged files raise many types of error
        raise ValueError(f"{directory}: the model could not be read ({one_line(error)})") from None
    if missing := [name for name in read["missing_keys"] if not name.startswith(may_be_missing)]:
        raise mismatch(str(directory), f"all weights of a {type(model).__name__}", f"none for {sorted(missing)[0]}")
    return accelerate(model.eval())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters in them is checked."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
