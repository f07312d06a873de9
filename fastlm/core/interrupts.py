"""Ctrl-C while the command imports its modules, which takes seconds: one line instead of a traceback.

An exception would not do: it would be raised inside the initialisation of PyTorch or of this package.
"""

import os
import signal
import sys
import threading
from types import FrameType


def is_command() -> bool:
    """Whether this process is the `fastlm` command or `python -m fastlm.cli`."""
    program = sys.argv[0] if sys.argv else ""
    return os.path.basename(program) == "fastlm" or (program == "-m" and "fastlm.cli" in sys.orig_argv)


def stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def stop_quietly() -> None:
    """Until raise_again(). A process that ignores Ctrl-C, as in the background of a shell, still does."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there a handler can be set
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def ignore() -> None:
    """For the rest of the command: all is saved.

    While Python shuts down, Ctrl-C would end the process by the signal, as if it had failed.
    """
    if is_command() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def raise_again() -> None:
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
