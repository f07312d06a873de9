"""Transparent huge pages for large results, which malloc maps from the system on every call."""

import ctypes
from pathlib import Path

from torch import Tensor

MIN_BYTES = 32 << 20  # glibc's default keeps no larger block for reuse; smaller ones mostly come from the heap
MADV_HUGEPAGE = 14  # sys/mman.h
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def huge_page_bytes() -> int:
    """The size of a huge page; 0 where madvise has no effect, because the system always or never uses them."""
    try:
        if "[madvise]" not in (SETTINGS / "enabled").read_text():
            return 0
        return int((SETTINGS / "hpage_pmd_size").read_text())
    except OSError:
        return 0


PAGE = huge_page_bytes()
if PAGE:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def on_huge_pages(x: Tensor) -> Tensor:
    """x, a new tensor that nothing was written to yet. If it is large, its whole huge pages are advised as such.

    One page fault then maps what 512 faults of small pages would. Only pages that lie wholly inside the tensor are
    advised, so the process holds no more memory than before.
    """
    if PAGE and x.nbytes >= MIN_BYTES:
        first, last = -(-x.data_ptr() // PAGE) * PAGE, (x.data_ptr() + x.nbytes) // PAGE * PAGE
        if first < last:
            madvise(first, last - first, MADV_HUGEPAGE)  # advice only: a failure changes nothing
    return x
