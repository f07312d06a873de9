"""Memory use: what PyTorch's allocator gives out during a call, and the resident memory of this process on Linux."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of_call(call: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at once during a call, beyond those before it.

    The kernels' own packing buffers, some hundred kilobytes per thread, are not counted.
    """
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints a line on stderr every time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    in_use = peak = 0
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def kilobytes(field: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


def resident_growth(expected: int) -> Callable[[], int | None]:
    """A function that returns by how many bytes peak resident memory exceeds the present use plus the expected growth.

    It returns None where the system does not report it. Memory that was freed before is returned to the system first:
    it would be reused without showing.
    """
    if not STATUS.exists():
        return lambda: None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # resets the peak
        before = kilobytes("VmRSS")
    except OSError:
        return lambda: None
    return lambda: (kilobytes("VmHWM") - before) * 1024 - expected
