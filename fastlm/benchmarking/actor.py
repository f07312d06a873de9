"""A process of its own that does one thing on request and says how long it took.

What an allocator did for one library it would have done for the other, and its settings are read when a process starts: whole steps are therefore compared
between processes, which the parent lets work in turn.
"""

import json
import os
import subprocess
import sys
from typing import Any

# Memory that was freed stays mapped: by default glibc returns large blocks at once, and every step faults their pages in again.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(64 << 20)}


class Actor:
    """`work` names a function in fastlm.benchmarking.whole; it is called with `arguments` in the new process and returns a Timer."""

    def __init__(self, work: str, arguments: dict[str, Any], environment: dict[str, str] | None = None):
        clean = {name: value for name, value in os.environ.items() if name not in TUNED and name != "GLIBC_TUNABLES"}
        command = [sys.executable, "-m", "fastlm.benchmarking.actor", work, json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean | (environment or {}))
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
    from fastlm.benchmarking import compare, whole

    timer = getattr(whole, work)(**json.loads(arguments))
    for _ in sys.stdin:
        print(json.dumps({"seconds": timer(), "bytes": peak_bytes(), "backends": compare.backends_seen()}), flush=True)


def peak_bytes() -> int:
    """Resident memory at its highest."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
