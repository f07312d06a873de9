"""Runs calls in forked processes, so that one that crashes or hangs is an outcome and not the end of the tests."""

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SECONDS = 60  # of one call


class Outcome(NamedTuple):
    result: Any = None
    crash: str = ""


def outcomes(calls: Sequence[Callable[[], Any]]) -> list[Outcome]:
    """What each call returned (it must be picklable), or how it ended its process."""
    found: list[Outcome] = []
    while len(found) < len(calls):
        results, crash = batch(calls[len(found) :])
        found += [Outcome(result) for result in results]
        if crash:
            found.append(Outcome(crash=crash))
    return found


def batch(calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], str]:
    """(the results of the calls of one process, how the next one ended it or "")."""
    sys.stdout.flush()
    sys.stderr.flush()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        try:
            faulthandler.disable()  # the outcome says how a process ended
            torch.set_num_threads(1)  # libgomp starts no threads after a fork
            for call in calls:
                sending.send(call())
        finally:
            os._exit(0)
    sending.close()
    results: list[Any] = []
    hung = False
    with receiving:
        while len(results) < len(calls):
            if not receiving.poll(SECONDS):
                hung = True
                os.kill(process, signal.SIGKILL)
                break
            try:
                results.append(receiving.recv())
            except EOFError:
                break
    status = os.waitpid(process, 0)[1]
    if len(results) == len(calls):
        return results, ""
    if hung:
        return results, f"did not return in {SECONDS} s"
    if os.WIFSIGNALED(status):
        return results, f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return results, "ended its process"
