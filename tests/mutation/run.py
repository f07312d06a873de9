"""Runs mutants: which of them does the suite not notice?

`python -m tests.mutation.run cpu cuda triton python --all` is what the nightly run does; without --all a fixed sample
is taken. --only selects by a part of the path.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.mutation import build, by_hand, cpp, python_source, rules
from tests.mutation.mutation import Mutation, sample

ROOT = Path(__file__).parents[2]
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
SECONDS = 15.0  # of the CPU: the tests that a compiled mutant may survive, as they take without it
# Compiled graphs and schemas say nothing of a kernel's arithmetic; a fork's child may not use several threads.
TESTS = [
    "-m",
    "not slow",
    "-k",
    "not compile and not opcheck and not contract and not fork and not inductor and not subprocess",
]
GLOBS = {
    "cpu": ["csrc/cpu/*.h"],
    "cuda": ["csrc/cuda/*.cu", "csrc/cuda/*.cuh"],
    "triton": ["kernels/*.py"],
    "python": [f"fastlm/ops/*/{name}.py" for name in ("reference", "torch", "cpu", "api", "autograd")],
}
BY_HAND = {"cpu": by_hand.CPU, "cuda": by_hand.CUDA, "triton": by_hand.TRITON, "python": by_hand.PYTHON}
PER_FILE = {"cpu": 4, "cuda": 3, "triton": 1, "python": 1}  # mutations of each file in the sample


def proposed(kind: str) -> list[Mutation]:
    """All generated mutations, but for those that a rule excludes."""
    propose = cpp.propose if kind in ("cpu", "cuda") else python_source.propose
    paths = sorted({path for pattern in GLOBS[kind] for path in ROOT.glob(pattern)})
    found = [m for path in paths for m in propose(str(path.relative_to(ROOT)), path.read_text())]
    return [m for m in found if not rules.reason(m)]


def chosen(kind: str, scope: str) -> list[Mutation]:
    """scope: "hand" for those by hand and the picked ones, "sample" for a fixed sample of the generated ones too, "all"
    for all of them.
    """
    hand = [m for ordinal, wanted in enumerate(BY_HAND[kind]) for m in by_hand.found(ROOT, wanted, ordinal)]
    generated = proposed(kind)
    if scope == "all":
        return hand + generated
    picked = [m for m in generated if fixed(m)]
    sampled = sample(generated, PER_FILE[kind]) if scope == "sample" else []
    return hand + picked + [m for m in sampled if not fixed(m)]


def fixed(m: Mutation) -> bool:
    """Whether it runs in every scope, and must be noticed."""
    return m.kind == "by hand" or (m.file.startswith("csrc/cpu/") and m.key in by_hand.PICKED)


def operator_of(name: str) -> str:
    """The longest name of an operator that a file's name begins with; "" if it belongs to none (philox)."""
    operators = [path.parent.name for path in ROOT.glob("fastlm/ops/*/__init__.py")]
    return max((operator for operator in operators if name.startswith(operator)), key=len, default="")


def test_files(file: str) -> list[str]:
    """The tests of the operator that a file belongs to; for what happens before a backend, those of all operators too.

    A file that belongs to no operator has the tests that name it, or all.
    """
    path = Path(file)
    name = path.parent.name if path.parts[:2] == ("fastlm", "ops") else path.stem
    operator = operator_of(name)
    tests = sorted([*ROOT.glob("tests/ops/test_*.py"), *ROOT.glob("tests/optim/test_*.py")])
    own = [test for test in tests if operator and operator_of(test.stem.removeprefix("test_")) == operator]
    if path.parts[0] == "kernels" and operator == "attention":
        own.insert(0, ROOT / "tests/kernels/test_paths.py")  # the branches of the attention kernels
    own = own or [test for test in [*tests, *sorted(ROOT.glob("tests/models/test_*.py"))] if name in test.read_text()]
    shared = [test for test in tests if test.stem == "test_every_operator" and path.stem in ("api", "autograd")]
    return [str(test.relative_to(ROOT)) for test in [*own, *shared] or tests]


def run_compiled(
    kind: str, mutations: list[Mutation], folder: Path, seconds: float, ignore_failing: bool
) -> list[tuple[Mutation, dict]]:
    """All in one build and one process of pytest, which forks for each."""
    tree = folder / kind
    numbered = build.build(tree, mutations, build.compile_cpu if kind == "cpu" else build.compile_cuda)
    pattern = "_cpu_baseline*.so" if kind == "cpu" else "_cuda_emulated*.so"
    module = str(next((tree / "fastlm").glob(pattern)))
    plan, out = folder / f"{kind}.plan.json", folder / f"{kind}.json"
    limits = {"seconds": seconds, "workers": WORKERS, "ignore_failing": ignore_failing}
    thorough = [number for number, m in numbered.items() if fixed(m)]  # all of the tests that execute them
    plan.write_text(json.dumps({"module": module, "mutants": list(numbered), "thorough": thorough, **limits}))
    environment = os.environ | {
        "FASTLM_MUTATION_PLAN": str(plan),
        "FASTLM_MUTATION_OUT": str(out),
        "FASTLM_TEST_PACKAGE": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tree),
        "FASTLM_TEST_BACKENDS": kind,
    }
    environment |= (
        {"FASTLM_ISA": "baseline"} if kind == "cpu" else {"FASTLM_CUDA_EMULATION": "1", "FASTLM_TEST_EMULATED": "3"}
    )
    kernels = ["tests/kernels/test_paths.py"]
    for path in sorted((ROOT / "tests/kernels").glob("test_cuda_*.py")):
        if path.stem not in ("test_cuda_build", "test_cuda_emulation"):  # which compile, and run no kernel of ours
            kernels.append(f"tests/kernels/{path.name}")
    tests = (
        ["tests/ops", "tests/optim", "tests/models/test_decode_step.py"] if kind == "cpu" else ["tests/ops", *kernels]
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.mutation.plugin",
        "-p",
        "no:cacheprovider",
        *TESTS,
        *tests,
    ]
    with open(folder / f"{kind}.log", "w+") as log:
        done = subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        if not out.exists() or done.returncode:
            raise RuntimeError(f"pytest ended with {done.returncode}: {log.read()[-4000:]}")
    outcomes = json.loads(out.read_text())
    return [(m, outcomes[str(number)]) for number, m in numbered.items()]


def run_python(kind: str, mutations: list[Mutation], folder: Path) -> list[tuple[Mutation, dict]]:
    """Each in a process that imports the mutated module."""
    plan, out = folder / f"{kind}.plan.json", folder / f"{kind}.json"
    mutants = {}
    for number, m in enumerate(mutations):
        stem = Path(m.file).stem
        backend = "triton" if kind == "triton" else stem if stem in ("reference", "torch", "cpu") else "reference"
        module = m.file.removesuffix(".py").replace("/", ".")
        mutants[str(number)] = {
            "file": m.file,
            "module": f"fastlm.{module}" if kind == "triton" else module,
            "text": python_source.mutated((ROOT / m.file).read_text(), m),
            "environment": {"FASTLM_TEST_BACKENDS": backend, "FASTLM_TEST_INTERPRETED": "18"},
            "arguments": [*TESTS, *test_files(m.file)],
        }
    plan.write_text(json.dumps({"mutants": mutants, "workers": WORKERS}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.mutation.fresh", str(plan), str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"tests.mutation.fresh ended with {done.returncode}: {done.stdout[-4000:]}")
    outcomes = json.loads(out.read_text())
    return [(m, outcomes[str(number)]) for number, m in enumerate(mutations)]


def run(
    kind: str, folder: Path, scope: str = "sample", only: str = "", ignore_failing: bool = False
) -> list[tuple[Mutation, dict]]:
    mutations = [m for m in chosen(kind, scope) if only in m.file]
    if kind in ("cpu", "cuda"):
        return run_compiled(kind, mutations, folder, SECONDS, ignore_failing)
    return run_python(kind, mutations, folder)


def unnoticed(outcomes: list[tuple[Mutation, dict]]) -> list[str]:
    """A line for each mutant that no test notices. What no test executes is among them."""
    return [
        f"{m}: {'no test executes it' if 'unreached' in outcome else 'survives'}"
        for m, outcome in outcomes
        if not {"killed", "not_applicable"} & set(outcome)
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("kinds", nargs="+", choices=list(GLOBS))
    arguments.add_argument("--all", action="store_true", help="all mutants, not the sample")
    arguments.add_argument("--only", default="", help="those of files whose path contains this")
    arguments.add_argument("--verbose", action="store_true", help="what became of each")
    arguments.add_argument("--folder", type=Path, help="where the build and the logs go")
    arguments.add_argument(
        "--ignore-failing", action="store_true", help="tests that fail without a mutant are left out"
    )
    given = arguments.parse_args()
    lines = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            scope = "all" if given.all else "sample"
            outcomes = run(kind, folder, scope, given.only, given.ignore_failing)
        print(kind, dict(Counter(next(iter(outcome)) for _, outcome in outcomes)), flush=True)
        if given.verbose:
            print("\n".join(f"{m}: {outcome}" for m, outcome in outcomes))
        lines += unnoticed(outcomes)
    print("\n".join(lines))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
