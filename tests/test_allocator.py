"""tune_allocator changes a process for good: what it does is tested in processes of their own."""

import ctypes.util
import os
import subprocess
import sys

import pytest

import fastlm
from fastlm import allocator

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
on_glibc = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")


def process(code, **environment):
    """What a new process prints, in an environment without the user's own settings."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in (*allocator.VARIABLES, "GLIBC_TUNABLES", "LD_PRELOAD")
    }
    clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=clean, capture_output=True, text=True, check=True
    ).stdout.strip()


# Twice 64 MB, written to, then freed, eight times; the first round always takes its memory fresh.
FAULTS = """
import resource, torch, fastlm
{}
counts = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b = torch.empty(16 << 20).fill_(1), torch.empty(16 << 20).fill_(1)
    del a, b
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(counts[1:]))
"""


@on_glibc
def test_memory_stays_mapped():
    before, after = int(process(FAULTS.format(""))), int(process(FAULTS.format("fastlm.tune_allocator()")))
    assert before >= 7 * 64  # with the largest pages that there are, one fault per 2 MB
    assert after < before / 20


@on_glibc
def test_importing_changes_nothing():
    code = "import fastlm, fastlm.cli, fastlm.commands.train, fastlm.commands.demo; from fastlm import allocator; print(allocator.done, fastlm.info().allocator)"
    assert process(code).startswith("None glibc's defaults; fastlm.tune_allocator() makes training faster")


@on_glibc
def test_it_says_what_it_did():
    said = process(
        "import fastlm; t = fastlm.tune_allocator(); print(t.tuned, t); print(fastlm.info().allocator)"
    ).splitlines()
    assert (
        said[0]
        == "True allocator: tuned (M_MMAP_THRESHOLD 2147483647, M_TRIM_THRESHOLD -1: memory that is freed stays with the process)"
    )
    assert said[1] == said[0].removeprefix("True allocator: ")


@on_glibc
@pytest.mark.parametrize(
    "variable, value, named",
    [
        ("MALLOC_MMAP_THRESHOLD_", "100000", "MALLOC_MMAP_THRESHOLD_"),
        pytest.param("MALLOC_TRIM_THRESHOLD_", "100000", "MALLOC_TRIM_THRESHOLD_", marks=pytest.mark.slow),
        pytest.param("MALLOC_MMAP_MAX_", "9", "MALLOC_MMAP_MAX_", marks=pytest.mark.slow),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.trim_threshold=100000", "glibc.malloc.trim_threshold"),
        pytest.param(
            "GLIBC_TUNABLES",
            "glibc.malloc.mmap_threshold=100000",
            "glibc.malloc.mmap_threshold",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_setting_of_the_user_wins(variable, value, named):
    faults = FAULTS.format("print(fastlm.tune_allocator())")
    said, count = process(faults, **{variable: value}).splitlines()
    assert said == f"allocator: left as it is (the environment sets {named})"
    assert int(count) >= 7 * 64 or variable == "MALLOC_MMAP_MAX_"


@on_glibc
def test_another_tunable_is_no_setting_of_the_allocators_thresholds():
    assert (
        process("import fastlm; print(fastlm.tune_allocator().tuned)", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
        == "True"
    )


@on_glibc
@pytest.mark.parametrize("library", ["jemalloc", "tcmalloc", "mimalloc"])
def test_another_allocator_is_left_alone(library):
    file = ctypes.util.find_library(library) or ctypes.util.find_library(f"{library}_minimal")
    if not file:
        pytest.skip(f"{library} is not installed")
    said = process("import fastlm; print(fastlm.tune_allocator())", LD_PRELOAD=file)
    assert said.startswith("allocator: left as it is (malloc is that of /") and library in said


class Mallopt:
    """A glibc that refuses some parameters."""

    def __init__(self, *refused):
        self.refused, self.calls = refused, []

    def __call__(self, parameter, value):
        assert -(2**31) <= value < 2**31
        self.calls.append((parameter, value))
        return int(parameter not in self.refused)


def test_an_older_glibc_that_refuses_a_large_threshold():
    mallopt = Mallopt(allocator.M_MMAP_THRESHOLD)
    said = allocator.apply(mallopt)
    assert said.tuned and said.reason.startswith("M_MMAP_MAX 0, M_TRIM_THRESHOLD -1")
    assert mallopt.calls == [(-3, 2**31 - 1), (-4, 0), (-1, -1)]


@pytest.mark.parametrize(
    "refused, reason",
    [
        ((-3, -4), "glibc refused M_MMAP_THRESHOLD and M_MMAP_MAX"),
        ((-1,), "glibc took M_MMAP_THRESHOLD 2147483647, but refused M_TRIM_THRESHOLD"),
    ],
)
def test_refusals_are_told(refused, reason):
    assert allocator.apply(Mallopt(*refused)) == fastlm.allocator.AllocatorTuning(False, reason)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "done", None)
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert str(fastlm.tune_allocator()) == "allocator: left as it is (glibc's settings mean nothing on darwin)"
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # musl: no mallopt, and not glibc's version
    assert str(fastlm.tune_allocator()) == "allocator: left as it is (the C library is not glibc)"


@on_glibc
def test_the_commands_call_it(tmp_path):
    (tmp_path / "text.txt").write_text("some words, and more of them\n" * 50)
    code = (
        "import sys; from fastlm import allocator, cli\n"
        f"sys.argv = ['fastlm', 'train', '--data', {str(tmp_path / 'text.txt')!r}, '--out', {str(tmp_path / 'out')!r}, '--steps', '1', '--layers', '1',"
        " '--width', '16', '--heads', '1', '--context', '8', '--warmup', '0']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(allocator.done.tuned)"
    )
    assert process(code).splitlines()[-1] == "True"
