"""Resident memory of this process, where Linux tells it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kilobytes(field: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


def rise(expected: int) -> Callable[[], int | None]:
    """A function that tells by how many bytes resident memory has at most risen since now, beyond the `expected` ones; None where the system does not tell.

    What was freed before goes back to the system first: it would serve again, and its use would not show.
    """
    if not STATUS.exists():
        return lambda: None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # the highest so far is forgotten
        before = kilobytes("VmRSS")
    except OSError:
        return lambda: None
    return lambda: (kilobytes("VmHWM") - before) * 1024 - expected
