"""How a command sets up its own process."""

import contextlib
from collections.abc import Iterator

import torch

import fastlm
from fastlm.core.errors import mismatch
from fastlm.device import choose_device
from fastlm.training.settings import check_integer


def set_up(device: str, threads: int | None) -> torch.device:
    """The device that was chosen; sets the number of threads and, for a CPU, tunes the allocator."""
    chosen = choose_device(device)
    set_threads(threads)
    if chosen.type == "cpu":
        fastlm.tune_allocator()
    return chosen


def set_threads(threads: int | None) -> None:
    if threads is not None:
        check_integer("threads", threads, 1)
        if threads > 4096:  # starting many more threads fails and ends the process
            raise mismatch("threads", "at most 4096", threads)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def needs_transformers() -> Iterator[None]:
    """Around imports: the error of an installation without transformers."""
    try:
        yield
    except ImportError:
        raise mismatch("model", "an installation with transformers (pip install transformers)", "one without") from None
