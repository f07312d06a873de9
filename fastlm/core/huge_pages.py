"""Transparent huge pages: for large results, which malloc maps from the system on every call, and for a whole heap.

A page fault then maps 2 MB instead of 4 kB. Memory is also read faster, the more so on virtual machines, where the
address of a page takes up to 24 accesses to find: a processor remembers those of a few thousand pages.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

from torch import Tensor

MIN_BYTES = 32 << 20  # glibc's default keeps no larger block for reuse; smaller ones mostly come from the heap
MADV_HUGEPAGE = 14  # sys/mman.h
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
STRICT = "2"  # the system grants no more address space than there is memory
CHUNK = 1 << 30  # bytes; glibc's malloc takes no larger block from the heap than its threshold


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


def address_space_is_limited() -> bool:
    """Whether reserved address space takes something away from the process or from others."""
    import resource  # not on Windows

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    try:
        return any(limit != resource.RLIM_INFINITY for limit in limits) or OVERCOMMIT.read_text().strip() == STRICT
    except OSError:
        return True


def reserve_heap(libc: Any) -> bool:
    """Extends the heap by three quarters of the machine's memory, advised as huge pages; returns whether it did so.

    Only pages that are written to take memory. With more than all of the memory in one range of address space, Linux
    would not let the process fork. glibc must not take large blocks from elsewhere or trim the heap.
    """
    if not PAGE or address_space_is_limited():
        return False
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes, libc.free.argtypes = (
        [ctypes.c_size_t],
        [ctypes.c_ssize_t],
        [ctypes.c_void_p],
    )
    chunks: list[int] = []
    for _ in range(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4 // CHUNK):
        chunk = libc.malloc(CHUNK)
        if not chunk or chunk > libc.sbrk(0):  # there is no room, or it is not in the heap
            libc.free(chunk)
            break
        chunks.append(chunk)
    if chunks:
        first, end = -(-chunks[0] // PAGE) * PAGE, libc.sbrk(0) // PAGE * PAGE
        madvise(first, end - first, MADV_HUGEPAGE)
    for chunk in reversed(chunks):  # each adjoins the free end of the heap
        libc.free(chunk)
    return bool(chunks)
