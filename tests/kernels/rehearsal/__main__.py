"""`make gpu-test` and `make gpu-bench` without a GPU: python -m tests.kernels.rehearsal [--out FOLDER] [TARGET…]

Each target runs as it does on a GPU, with its own time limits, in a copy of the tree that has no compiled modules. A
stub of the CUDA driver takes the launches: every kernel is compiled as on an H100, and nothing runs on a GPU. Operands
are tensors of the CPU.

gpu-test: a fixed sample with cases of every test. The reference returns the results, so the tests go on to their end.
tests/kernels/test_gpu.py, which needs the device, is left out. gpu-bench: all cases, with few rows, short sequences and
two layers, because PyTorch computes them on this CPU.

Printed are the seconds of each step. It fails if a target takes more than 500 s or leaves no results, if a kernel does
not compile, or if a measurement fails. Tests may: no GPU raises what some of them wait for.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

from tests.kernels import stub_driver

ROOT = Path(__file__).parents[3]
TARGETS = ("gpu-test", "gpu-bench")
LIMIT = 500  # seconds of a target
PROCESSES = 8  # in which the Makefile runs the tests
SHARE = 16  # one in so many cases of each test, at least one
COPIED = ("benchmarks", "csrc", "fastlm", "kernels", "tests", "Makefile", "pyproject.toml", "setup.py", "README.md")
COMPILED = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
RESULTS = {"gpu-test": ("info.txt", "tests.txt", "tests.xml"), "gpu-bench": ("info.txt", "bench.json", "bench.md")}
STAND_IN = """#!/bin/sh
export PYTHONPATH={paths!r}
exec {python!r} -m tests.kernels.rehearsal.stand_in "$@"
"""


@dataclasses.dataclass
class Outcome:
    seconds: float
    status: int
    steps: list[dict]  # {"step", "seconds", "processor_seconds"}
    processes: list[dict]  # of pytest: see plugin.py
    wrong: list[str]


def copy_tree(to: Path) -> None:
    """What the targets need of the tree, without compiled modules."""
    to.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=COMPILED)
        else:
            shutil.copy(ROOT / name, to / name)


def rehearse(target: str, out: Path, folder: Path, environment: dict[str, str], python: Path) -> Outcome:
    """Runs a target in a folder, with results in `out`. python: what the recipes run."""
    out.mkdir(parents=True, exist_ok=True)
    notes = out / "steps.jsonl"
    for earlier in out.glob(f"{notes.name}*"):
        earlier.unlink()
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLM_", "MAKE")) and k != "ARGS"}
    began = time.monotonic()
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(folder), target, f"PYTHON={python}", f"OUT={out}"],
        env=own
        | environment
        | {
            "FASTLM_REHEARSAL": str(notes),
            "FASTLM_REHEARSAL_SHARE": str(SHARE),
            "OMP_NUM_THREADS": "1",  # the processors are for compiling, as they are beside a GPU
        },
        stdout=sys.stderr,
    )
    steps = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    processes = [json.loads(file.read_text()) for file in out.glob(f"{notes.name}.*")]
    outcome = Outcome(time.monotonic() - began, done.returncode, steps, processes, [])
    if outcome.seconds > LIMIT:
        outcome.wrong.append(f"{outcome.seconds:.0f} s, more than {LIMIT}")
    outcome.wrong += [f"no {name}" for name in RESULTS[target] if not (out / name).exists()]
    outcome.wrong += [error for process in processes for error in process["errors"]]
    if target == "gpu-bench" and (out / "failed").exists():
        outcome.wrong += (out / "failed").read_text().splitlines()
    return outcome


def counts(report: Path) -> dict[str, int]:
    """Of pytest's report: tests, failures, errors, skipped."""
    suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def summary(target: str, out: Path, outcome: Outcome) -> list[str]:
    lines = [f"{target}: {outcome.seconds:.0f} s"]
    lines += [
        f"  {step['seconds']:6.1f} s  {step['processor_seconds']:6.1f} s of a processor  {step['step']}"
        for step in outcome.steps
    ]
    if outcome.processes:
        finished, kernels, seconds = (
            sum(process[name] for process in outcome.processes) for name in ("finished", "kernels", "processor_seconds")
        )
        of_all, chosen = outcome.processes[0]["all"], outcome.processes[0]["chosen"]
        lines.append(
            f"  {finished} of the {chosen} tests of the sample: {seconds:.0f} s of a processor, {kernels} kernels"
        )
        estimate = seconds / finished * of_all / PROCESSES
        lines.append(f"  at this rate all {of_all} tests take {estimate:.0f} s of {PROCESSES} processes")
    if (out / "tests.xml").exists():
        lines.append("  " + ", ".join(f"{name} {count}" for name, count in counts(out / "tests.xml").items()))
    if (out / "bench.json").exists():
        found = json.loads((out / "bench.json").read_text())
        left_out = f", left out {len(found['left_out'])}: {'; '.join(found['left_out'])}" if found["left_out"] else ""
        lines.append(f"  {len(found['rows'])} rows, failed {len(found['failed'])}{left_out}")
    return [*lines, *(f"  wrong: {what}" for what in outcome.wrong)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; both by default")
    parser.add_argument("--out", type=Path, default=Path("gpu-rehearsal"), help="for the results of each target")
    options = parser.parse_args()
    if unknown := {*options.targets} - {*TARGETS}:
        parser.error(f"TARGET: expected {' or '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        folder, tree = Path(temporary), Path(temporary, "tree")
        copy_tree(tree)
        environment = stub_driver.compile_stub(folder)
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # by which the build finds that there is a driver
        python = folder / "python"
        paths = os.pathsep.join([str(tree), *(path for path in sys.path if path and Path(path) != ROOT)])
        python.write_text(STAND_IN.format(paths=paths, python=sys.executable))
        python.chmod(0o755)
        for target in options.targets or TARGETS:
            out = options.out.absolute() / target
            outcome = rehearse(target, out, tree, environment, python)
            print(*summary(target, out, outcome), sep="\n", flush=True)
            wrong |= bool(outcome.wrong)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
