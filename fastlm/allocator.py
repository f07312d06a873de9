"""Keeping memory that was freed: what a training step allocates, the next one needs again.

By default glibc returns large blocks to the system at once and takes them fresh the next time, one page fault per 4 kB: a quarter of a training step on some
machines.
"""

import ctypes
import dataclasses
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MOST = 2**31 - 1  # mallopt takes a C int
NEVER = -1  # of M_TRIM_THRESHOLD: the top of the heap is never given back

VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
TUNABLES = tuple(f"glibc.malloc.{name}" for name in ("mmap_threshold", "trim_threshold", "mmap_max", "top_pad"))


@dataclasses.dataclass(frozen=True)
class AllocatorTuning:
    """What tune_allocator did. str() of it is one line."""

    tuned: bool  # whether freed memory now stays with the process
    reason: str  # what was set, or why nothing was

    def __str__(self) -> str:
        return f"allocator: {'tuned' if self.tuned else 'left as it is'} ({self.reason})"


def tune_allocator() -> AllocatorTuning:
    """Let this process keep the memory that it frees, so that the next training step finds it mapped.

    With glibc: large blocks come from the heap, and the heap is not given back. It takes effect for what is allocated afterwards and holds until the process
    ends, for PyTorch's own operators and everything else too; resident memory stays at its highest. Nothing calls this but fastlm's own commands:
    it is for the program to decide.

    Nothing is changed, and the result says why, where the user has set one of glibc's thresholds in the environment (MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, MALLOC_TOP_PAD_, GLIBC_TUNABLES), where another allocator serves (jemalloc, tcmalloc, mimalloc, …), and where the
    C library is not glibc (musl, macOS, Windows).
    """
    global done
    why_not = obstacle()
    done = AllocatorTuning(False, why_not) if why_not else apply(ctypes.CDLL(None).mallopt)
    return done


done: AllocatorTuning | None = None  # what was done to this process, for fastlm.info()


def in_words() -> str:
    """For `fastlm info`: the state of this process, or what could be gained."""
    if done is not None and done.tuned:
        return f"tuned ({done.reason})"
    why_not = obstacle()
    return (
        f"as it is ({why_not})"
        if why_not
        else "glibc's defaults; fastlm.tune_allocator() makes training faster (fastlm train and fastlm demo call it)"
    )


def obstacle() -> str:
    """Why this process is left as it is; "" = it can be tuned."""
    if not sys.platform.startswith("linux"):
        return f"glibc's settings mean nothing on {sys.platform}"
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return "the C library is not glibc"
    mine = own_settings()
    if mine:
        return f"the environment sets {', '.join(mine)}"
    other = other_allocator(libc)
    return f"malloc is that of {other}" if other else ""


def own_settings() -> list[str]:
    """The user's own, by name."""
    tunables = [pair.partition("=")[0] for pair in os.environ.get("GLIBC_TUNABLES", "").split(":")]
    return [name for name in VARIABLES if name in os.environ] + [name for name in tunables if name in TUNABLES]


class Found(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def library_of(libc: Any, function: str) -> str:
    """The file that the process takes a function from; "" where the linker does not say."""
    found = Found()
    address = ctypes.cast(getattr(libc, function), ctypes.c_void_p)
    return os.fsdecode(found.file) if libc.dladdr(address, ctypes.byref(found)) and found.file else ""


def other_allocator(libc: Any) -> str:
    """The file whose malloc stands before glibc's, "" where none does."""
    # Not malloc itself: a program that is not position-independent, as some Pythons are, has an address of its own for a function that it calls.
    malloc = library_of(libc, "aligned_alloc")
    return malloc if malloc and malloc != library_of(libc, "gnu_get_libc_version") else ""


def apply(mallopt: Any) -> AllocatorTuning:
    """mallopt returns 0 for a value that it refuses. Older versions of glibc refuse a threshold above 32 MiB, which the largest blocks of a step exceed: there
    no block comes from the system itself any more."""
    if mallopt(M_MMAP_THRESHOLD, MOST):
        what = f"M_MMAP_THRESHOLD {MOST}"
    elif mallopt(M_MMAP_MAX, 0):
        what = "M_MMAP_MAX 0"
    else:
        return AllocatorTuning(False, "glibc refused M_MMAP_THRESHOLD and M_MMAP_MAX")
    if not mallopt(M_TRIM_THRESHOLD, NEVER):
        return AllocatorTuning(False, f"glibc took {what}, but refused M_TRIM_THRESHOLD")
    return AllocatorTuning(True, f"{what}, M_TRIM_THRESHOLD {NEVER}: memory that is freed stays with the process")
