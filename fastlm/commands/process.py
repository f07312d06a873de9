"""How a command sets up its own process, alone or as one of those that torchrun has started."""

import contextlib
import os
from collections.abc import Iterator

import torch

import fastlm
from fastlm.commands.display import console
from fastlm.core.errors import Ended, mismatch
from fastlm.device import choose_device
from fastlm.training import distributed
from fastlm.training.distributed import Group
from fastlm.training.settings import check_integer


def set_up(device: str, threads: int | None) -> torch.device:
    """The device that was chosen; sets the number of threads and, for a CPU, tunes the allocator."""
    chosen = choose_device(device)
    set_threads(threads)
    if chosen.type == "cpu":
        fastlm.tune_allocator()
    return chosen


@contextlib.contextmanager
def set_up_several(device: str, threads: int | None) -> Iterator[tuple[Group, torch.device]]:
    """Joins the other processes, if there are any. Only the first one prints.

    device, threads: as for set_up; by default each process on a machine has a GPU of its own, or an equal share of the
    CPU's cores.

    Raises:
        ConnectionError: another process has ended or does not answer.
        Ended: the same, where two others report it.
    """
    several = distributed.is_several()
    if several and ":" in device:
        raise mismatch("device", "auto, cpu or cuda with several processes, each of which has its own GPU", device)
    chosen = distributed.local_device(set_up(device, distributed.local_threads() if threads is None else threads))
    group = distributed.join(chosen)
    console.quiet = group.rank > 0
    try:
        yield group, chosen
        group.meet()
    except RuntimeError as error:
        reason = distributed.lost_process(error) if several else None
        if reason is None:
            raise
        if group.rank > 1:
            raise Ended from None
        seconds = distributed.timeout().total_seconds()
        expected = f"another process has ended, or has not answered for {seconds:g} seconds"
        raise ConnectionError(f"process {group.rank} of {group.size}: {expected} ({reason})") from None


def check_alone() -> None:
    if distributed.is_several():
        expected = "1, as only `fastlm train` runs on several processes"
        raise mismatch("WORLD_SIZE", expected, repr(os.environ["WORLD_SIZE"]))


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
