"""Locks of directories, between processes. A lock ends with the process that holds it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[bool | None]:
    """Holds the lock of a directory inside the block.

    Yields True; False if another process has the lock and wait is False; None where directories have no locks, as on
    some network file systems.

    Raises:
        OSError: the directory cannot be opened.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held: bool | None = True
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        yield held
    finally:
        os.close(handle)
