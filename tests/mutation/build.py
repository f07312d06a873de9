"""A copy of the working tree whose compiled module contains mutants, each behind a run-time switch."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.mutation.mutation import Mutation, apply

ROOT = Path(__file__).parents[2]
HEADER = Path(__file__).with_name("mutant_switch.h")
LIMIT = 16384  # the size of fastlm_mutants_reached


def copy_tree(folder: Path) -> None:
    """The files of the working tree, committed or not, and none that git ignores."""
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def instrument(folder: Path, numbered: dict[int, Mutation]) -> None:
    for file in {m.file for m in numbered.values()}:
        edits = [
            (begin, end, new.replace("@ID@", str(number)))
            for number, m in numbered.items()
            if m.file == file
            for begin, end, new in m.edits
        ]
        # Messages of the compiler name the lines of the original.
        text = f'#include "{HEADER}"\n#line 1\n' + apply((ROOT / file).read_text(), edits)
        (folder / file).write_text(text)


def build(folder: Path, mutations: list[Mutation], compile_tree: Callable[[Path], str]) -> dict[int, Mutation]:
    """Compiles all mutations into one module: number → mutation. Those on whose lines the compiler finds an error are
    left out, and the rest is compiled again; `compile_tree` returns the compiler's messages, "" if all went well.
    """
    assert len(mutations) < LIMIT
    numbered = dict(enumerate(mutations, 1))
    copy_tree(folder)
    for _ in range(4):
        instrument(folder, numbered)
        messages = compile_tree(folder)
        if not messages:
            return numbered
        wrong = set(re.findall(r"((?:csrc|kernels)/[\w./]+):(\d+):(?:\d+:)? (?:fatal )?error", messages))
        dropped = [
            n
            for n, m in numbered.items()
            if (m.file, str(m.line)) in wrong or any(m.file == f and abs(m.line - int(line)) <= 1 for f, line in wrong)
        ]
        if not dropped:
            raise RuntimeError(messages[-6000:])
        for number in dropped:
            print(f"does not compile: {numbered.pop(number)}", file=sys.stderr)
        for file in {f for f, _ in wrong}:  # one without a mutant left
            shutil.copy2(ROOT / file, folder / file)
    raise RuntimeError(messages[-6000:])


def compile_cpu(folder: Path) -> str:
    """One module, of the instruction set that every machine has, without optimisation."""
    environment = os.environ | {
        "CXXFLAGS": "-O0 -w",
        "FASTLM_BUILD_ISAS": "baseline",
        "FASTLM_BUILD_CUDA": "0",
        "FASTLM_REQUIRE_BUILD": "1",
        "PYTHONPATH": str(folder),
    }
    return messages([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, environment)


def compile_cuda(folder: Path) -> str:
    """The CUDA kernels for the emulator."""
    return messages([sys.executable, "-m", "tests.cuda_emulation"], folder, os.environ | {"PYTHONPATH": str(folder)})


def messages(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout if done.returncode else ""
