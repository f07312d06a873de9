"""A worker process that runs one thing on request and reports how long it took.

Allocator tuning affects the whole process and cannot be undone. Whole steps are therefore compared between processes
that take turns.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from typing import Any

from fastlm.allocator import VARIABLES


class Worker:
    """Runs a function of fastlm.benchmarking in a new process.

    Args:
        function: "module.function", which returns (Timer, a function that returns the peak memory use so far).
        arguments: for the function, as JSON.
    """

    def __init__(self, function: str, arguments: dict[str, Any]):
        tuning = (*VARIABLES, "GLIBC_TUNABLES")  # the default settings are those without the user's tuning
        environment = {name: value for name, value in os.environ.items() if name not in tuning}
        command = [sys.executable, "-m", "fastlm.benchmarking.worker", function, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent only, which then ends the worker
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.name = f"{function} {arguments}"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self) -> dict[str, Any]:
        """Run once: {"seconds", "bytes", "backends", "tuned"}."""
        try:
            self.requests.write("\n")
            self.requests.flush()
        except BrokenPipeError:
            pass  # reported below, as there is no answer
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the worker process for {self.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __call__(self, n: int = 1) -> float:
        """A Timer."""
        return sum(self.ask()["seconds"] for _ in range(n)) / n


def main(name: str, arguments: str) -> None:
    from fastlm import allocator
    from fastlm.backends.selection import selected_backends

    module, _, function = name.rpartition(".")
    timer, peak = getattr(importlib.import_module(f"fastlm.benchmarking.{module}"), function)(**json.loads(arguments))
    for _ in sys.stdin:
        seconds = timer(1)
        tuned = allocator.done is not None and allocator.done.tuned
        answer = {"seconds": seconds, "bytes": peak(), "backends": selected_backends(), "tuned": tuned}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
