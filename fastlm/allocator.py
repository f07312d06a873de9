"""Allocator tuning: keeps freed memory in the process, as every training step allocates the same sizes again.

By default glibc returns large blocks to the system immediately. Allocating them again causes a page fault per 4 kB,
which took a quarter of a training step on some machines. Where Linux grants huge pages on request, the heap is also
moved to these.
"""

import ctypes
import dataclasses
import os
import sys
from typing import Any

from fastlm.core import huge_pages

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MAX_INT = 2**31 - 1  # mallopt takes a C int
NEVER = -1  # value of M_TRIM_THRESHOLD: never return the top of the heap

# Settings of the user that disable the tuning.
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
TUNABLES = tuple(f"glibc.malloc.{name}" for name in ("mmap_threshold", "trim_threshold", "mmap_max", "top_pad"))


@dataclasses.dataclass(frozen=True)
class AllocatorTuning:
    """The result of tune_allocator; str() is one line."""

    tuned: bool  # whether the process now keeps freed memory
    reason: str  # what was set, or why nothing was set

    def __str__(self) -> str:
        return f"allocator: {'tuned' if self.tuned else 'not tuned'} ({self.reason})"


def tune_allocator() -> AllocatorTuning:
    """Configures glibc to keep freed memory in this process, so that the next training step reuses mapped pages.

    Large blocks are then allocated on the heap, and the heap is not trimmed. Where Linux grants huge pages on request,
    the heap is extended by three quarters of the machine's memory, in address space only, and lies on them there. This
    applies to all later allocations of the process, including PyTorch's: call it before a model is created or loaded.
    Resident memory stays at its peak. Only fastlm's commands call this function: a library should not change the
    allocator of a program without being asked.

    Nothing is changed, and the result says why, if the environment sets one of glibc's thresholds
    (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, MALLOC_TOP_PAD_, GLIBC_TUNABLES), if another
    allocator is in use (jemalloc, tcmalloc, mimalloc, …), or if the C library is not glibc (musl, macOS, Windows).
    """
    global done
    if done is None or not done.tuned:
        reason = why_not_tunable()
        done = AllocatorTuning(False, reason) if reason else tune(ctypes.CDLL(None))
    return done


done: AllocatorTuning | None = None  # the latest result in this process, for fastlm.info()


def summary() -> str:
    """The state of this process, for fastlm.info()."""
    if done is not None and done.tuned:
        return f"tuned ({done.reason})"
    if reason := why_not_tunable():
        return f"not tuned ({reason})"
    return "glibc's defaults; fastlm.tune_allocator() makes training faster (the commands that compute call it)"


def why_not_tunable() -> str:
    """Why tune_allocator does not change this process; "" if it does."""
    if not sys.platform.startswith("linux"):
        return f"only glibc can be tuned, not {sys.platform}"
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return "the C library is not glibc"
    if settings := environment_settings():
        return f"the environment sets {', '.join(settings)}"
    library = replaced_malloc(libc)
    return f"malloc is provided by {library}" if library else ""


def environment_settings() -> list[str]:
    """Names of the allocator settings in the environment."""
    tunables = [pair.partition("=")[0] for pair in os.environ.get("GLIBC_TUNABLES", "").split(":")]
    return [name for name in VARIABLES if name in os.environ] + [name for name in tunables if name in TUNABLES]


class DlInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def library_of(libc: Any, function: str) -> str:
    """The shared library that provides a function; "" if unknown."""
    info = DlInfo()
    address = ctypes.cast(getattr(libc, function), ctypes.c_void_p)
    return os.fsdecode(info.file) if libc.dladdr(address, ctypes.byref(info)) and info.file else ""


def replaced_malloc(libc: Any) -> str:
    """The shared library that replaces glibc's malloc; "" if none does."""
    # aligned_alloc instead of malloc: a program that is not position-independent, as some builds of Python, has its own
    # address (in the PLT) for functions that it calls.
    malloc = library_of(libc, "aligned_alloc")
    return malloc if malloc and malloc != library_of(libc, "gnu_get_libc_version") else ""


def tune(libc: Any) -> AllocatorTuning:
    tuning = apply(libc.mallopt)
    if tuning.tuned and huge_pages.reserve_heap(libc):
        return AllocatorTuning(True, f"{tuning.reason}, in huge pages")
    return tuning


def apply(mallopt: Any) -> AllocatorTuning:
    """Sets the thresholds. mallopt returns 0 for a rejected value.

    Older versions of glibc reject a threshold above 32 MiB, which the largest blocks of a step exceed. There mmap is
    disabled instead.
    """
    if mallopt(M_MMAP_THRESHOLD, MAX_INT):
        setting = f"M_MMAP_THRESHOLD {MAX_INT}"
    elif mallopt(M_MMAP_MAX, 0):
        setting = "M_MMAP_MAX 0"
    else:
        return AllocatorTuning(False, "glibc rejected M_MMAP_THRESHOLD and M_MMAP_MAX")
    if not mallopt(M_TRIM_THRESHOLD, NEVER):
        return AllocatorTuning(False, f"glibc accepted {setting}, but rejected M_TRIM_THRESHOLD")
    return AllocatorTuning(True, f"{setting}, M_TRIM_THRESHOLD {NEVER}: freed memory stays mapped")
