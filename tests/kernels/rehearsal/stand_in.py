"""What the Makefile's recipes run as Python in a rehearsal: stand_in.py ARGUMENTS OF PYTHON…

Programs that use PyTorch see an H100, the stub of the driver. Each call is noted with its seconds.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path


def note(step: str, began: float, processor_began: float, **more: object) -> None:
    """Adds a line to the file that FASTLM_REHEARSAL names."""
    line = {"step": step, "seconds": time.monotonic() - began, "processor_seconds": processor_time() - processor_began}
    with Path(os.environ["FASTLM_REHEARSAL"]).open("a") as file:
        file.write(json.dumps(line | more) + "\n")


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def title(arguments: list[str]) -> str:
    words = " ".join(arguments[:4] if arguments[0] == "-m" else arguments[:2]).split()
    return f"python {' '.join(words)}"[:72]


def run(arguments: list[str]) -> None:
    """As `python ARGUMENTS…`, which may raise SystemExit."""
    option, *rest = arguments
    if option == "-c":
        if "fastlm" in rest[0] or "torch" in rest[0]:
            from tests.kernels import stub_driver

            stub_driver.pretend()
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        if rest[0] == "pytest":  # stub_driver.pretend() is called in each of its processes
            os.environ["PYTEST_PLUGINS"] = "tests.kernels.rehearsal.plugin"
            os.environ.pop("FASTLM_TEST_DEVICE", None)  # there is none
        else:
            from tests.kernels import stub_driver

            stub_driver.pretend()
            if "bench" in rest:
                from tests.kernels.rehearsal import measurements

                measurements.on_this_cpu()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.exit(subprocess.run([sys.executable, *arguments]).returncode)


def main() -> None:
    arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # of a time limit: the step is noted
    began, processor_began = time.monotonic(), processor_time()
    try:
        run(arguments)
    finally:
        note(title(arguments), began, processor_began)


if __name__ == "__main__":
    main()
