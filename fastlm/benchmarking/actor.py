"""A process of its own that does one thing on request and says how long it took.

What tune_allocator did for one library it would have done for the other, and it cannot be undone: whole steps are therefore compared between processes, which
the parent lets work in turn.
"""

import importlib
import json
import os
import subprocess
import sys
from typing import Any

from fastlm.allocator import VARIABLES


class Actor:
    """`work` names a function of fastlm.benchmarking, "module.function"; it is called with `arguments` in the new process and returns (Timer, bytes held so
    far).
    """

    def __init__(self, work: str, arguments: dict[str, Any]):
        clean = {
            name: value for name, value in os.environ.items() if name not in (*VARIABLES, "GLIBC_TUNABLES")
        }  # as it comes is without the user's tuning
        command = [sys.executable, "-m", "fastlm.benchmarking.actor", work, json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers, self.name = self.process.stdin, self.process.stdout, f"{work} {arguments}"

    def __enter__(self) -> "Actor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.requests.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self) -> dict[str, Any]:
        try:
            self.requests.write("\n")
            self.requests.flush()
        except BrokenPipeError:
            pass  # the line that is missing says it
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the process for {self.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __call__(self) -> float:
        """Once more: a Timer for in_turn."""
        return self.ask()["seconds"]


def main(work: str, arguments: str) -> None:
    from fastlm import allocator
    from fastlm.benchmarking import compare

    module, _, function = work.rpartition(".")
    timer, held = getattr(importlib.import_module(f"fastlm.benchmarking.{module}"), function)(**json.loads(arguments))
    for _ in sys.stdin:
        tuned = allocator.done is not None and allocator.done.tuned
        print(
            json.dumps({"seconds": timer(), "bytes": held(), "backends": compare.backends_seen(), "tuned": tuned}),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
