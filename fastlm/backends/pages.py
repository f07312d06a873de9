"""Huge pages for results that malloc takes fresh from the system every time."""

import ctypes
from pathlib import Path

from torch import Tensor

FRESH = (
    32 << 20
)  # bytes: glibc, left to itself, keeps no larger block for the next call; smaller ones are mostly found again in the heap
MADV_HUGEPAGE = 14  # sys/mman.h
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def page_bytes() -> int:
    """Of a huge page; 0 where asking for one changes nothing: they are always given, or never."""
    try:
        return (
            int((SETTINGS / "hpage_pmd_size").read_text()) if "[madvise]" in (SETTINGS / "enabled").read_text() else 0
        )
    except OSError:
        return 0


PAGE = page_bytes()
if PAGE:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def on_huge_pages(x: Tensor) -> Tensor:
    """x, of which nothing is written yet: if it is large, what lies in it of whole huge pages is mapped by one page fault each, where small ones would take
    512. Nothing beside it is mapped, so the process holds no more than it did.
    """
    if PAGE and x.nbytes >= FRESH:
        first, last = -(-x.data_ptr() // PAGE) * PAGE, (x.data_ptr() + x.nbytes) // PAGE * PAGE
        if first < last:
            madvise(first, last - first, MADV_HUGEPAGE)  # advice: whatever comes of it, the memory is there
    return x
