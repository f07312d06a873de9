"""SIGINT (Ctrl-C) and SIGTERM stop training after the current step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """An evaluation was ended early."""


def until(stopping: Callable[[], bool] | None, items: Iterable[T]) -> Iterator[T]:
    """The items; raises Stopped as soon as `stopping` returns True."""
    for item in items:
        if stopping is not None and stopping():
            raise Stopped
        yield item


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that SIGINT (Ctrl-C) and SIGTERM set. After a second one the block raises KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop
        return
    received = 0

    def handle(number: int, frame: object) -> None:
        nonlocal received
        received += 1
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received > 1:
        raise KeyboardInterrupt
