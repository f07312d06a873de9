"""tune_allocator changes a process permanently, so each test runs it in a new process."""

import ctypes.util
import os
import subprocess
import sys

import pytest

import fastlm
from fastlm import allocator
from fastlm.core import huge_pages

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
on_glibc = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")


def process(code, **environment):
    """The output of a new process, in an environment without allocator settings."""
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in (*allocator.VARIABLES, "GLIBC_TUNABLES", "LD_PRELOAD")
    }
    base |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=base, capture_output=True, text=True, check=True
    ).stdout.strip()


# Allocates, writes and frees two blocks of 64 MB; prints how much of the address space that returned, in kB.
MAPPED = """
import torch, fastlm
{}
def mapped():  # address space and not resident memory, which the system may reclaim
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
a, b = torch.empty(16 << 20).fill_(1), torch.empty(16 << 20).fill_(1)
before = mapped()
del a, b
print(before - mapped())
"""
BOTH = 2 * (64 << 10)  # kB


@on_glibc
def test_freed_memory_stays_mapped():
    assert int(process(MAPPED.format(""))) >= BOTH
    assert int(process(MAPPED.format("fastlm.tune_allocator()"))) == 0


@on_glibc
def test_imports_do_not_tune():
    code = (
        "import fastlm, fastlm.cli, fastlm.commands.train, fastlm.commands.demo\n"
        "from fastlm import allocator\n"
        "print(allocator.done, fastlm.info().allocator)"
    )
    assert process(code).startswith("None glibc's defaults; fastlm.tune_allocator() makes training faster")


@on_glibc
def test_result_and_info_describe_the_tuning():
    output = process(
        "import fastlm; t = fastlm.tune_allocator(); print(t.tuned, t); print(fastlm.info().allocator)"
    ).splitlines()
    pages = ", in huge pages" if huge_pages.PAGE and not huge_pages.address_space_is_limited() else ""
    tuned = f"tuned (M_MMAP_THRESHOLD 2147483647, M_TRIM_THRESHOLD -1: freed memory stays mapped{pages})"
    assert output == [f"True allocator: {tuned}", tuned]


ADVISED = """
import torch, fastlm
from tests.core.test_huge_pages import advised_bytes
{}
first = fastlm.tune_allocator()
x = torch.empty(16, 1 << 20)  # 64 MB, of which the first may lie below
print(advised_bytes(x) > 0.9 * x.nbytes, fastlm.tune_allocator() == first)
"""


@on_glibc
@pytest.mark.skipif(not huge_pages.PAGE, reason="this system uses huge pages always or never")
@pytest.mark.skipif(huge_pages.address_space_is_limited(), reason="the address space is limited")
def test_the_heap_is_on_huge_pages():
    assert process(ADVISED.format("")) == "True True"


@on_glibc
def test_a_tuned_process_can_fork():
    """Linux refuses to copy a piece of address space that is larger than its memory."""
    code = (
        "import os, fastlm; fastlm.tune_allocator(); pid = os.fork(); pid or os._exit(7); print(os.waitpid(pid, 0)[1])"
    )
    assert process(code) == str(7 << 8)


@on_glibc
def test_a_limited_address_space_is_left_to_the_process():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))"
    assert process(ADVISED.format(limit)) == "False True"


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
def test_environment_settings_are_respected(variable, value, named):
    code = MAPPED.format("print(fastlm.tune_allocator())")
    output, returned = process(code, **{variable: value}).splitlines()
    assert output == f"allocator: not tuned (the environment sets {named})"
    assert int(returned) >= BOTH or variable == "MALLOC_MMAP_MAX_"


@on_glibc
def test_unrelated_tunable():
    assert (
        process("import fastlm; print(fastlm.tune_allocator().tuned)", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
        == "True"
    )


@on_glibc
@pytest.mark.parametrize("library", ["jemalloc", "tcmalloc", "mimalloc"])
def test_other_allocators_are_not_tuned(library):
    file = ctypes.util.find_library(library) or ctypes.util.find_library(f"{library}_minimal")
    if not file:
        pytest.skip(f"{library} is not installed")
    output = process("import fastlm; print(fastlm.tune_allocator())", LD_PRELOAD=file)
    assert output.startswith("allocator: not tuned (malloc is provided by /") and library in output


class Mallopt:
    """mallopt of a glibc that rejects some parameters."""

    def __init__(self, *rejected):
        self.rejected, self.calls = rejected, []

    def __call__(self, parameter, value):
        assert -(2**31) <= value < 2**31
        self.calls.append((parameter, value))
        return int(parameter not in self.rejected)


def test_older_glibc_that_rejects_a_large_threshold():
    mallopt = Mallopt(allocator.M_MMAP_THRESHOLD)
    output = allocator.apply(mallopt)
    assert output.tuned and output.reason.startswith("M_MMAP_MAX 0, M_TRIM_THRESHOLD -1")
    assert mallopt.calls == [(-3, 2**31 - 1), (-4, 0), (-1, -1)]


@pytest.mark.parametrize(
    "rejected, reason",
    [
        ((-3, -4), "glibc rejected M_MMAP_THRESHOLD and M_MMAP_MAX"),
        ((-1,), "glibc accepted M_MMAP_THRESHOLD 2147483647, but rejected M_TRIM_THRESHOLD"),
    ],
)
def test_rejected_parameters(rejected, reason):
    assert allocator.apply(Mallopt(*rejected)) == fastlm.allocator.AllocatorTuning(False, reason)


def test_other_systems_are_not_tuned(monkeypatch):
    monkeypatch.setattr(allocator, "done", None)
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert str(fastlm.tune_allocator()) == "allocator: not tuned (only glibc can be tuned, not darwin)"
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # musl: no mallopt, no gnu_get_libc_version
    assert str(fastlm.tune_allocator()) == "allocator: not tuned (the C library is not glibc)"


@on_glibc
def test_train_tunes_the_allocator(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words, and more of them\n" * 50)
    code = (
        "import sys; from fastlm import allocator, cli\n"
        f"sys.argv = ['fastlm', 'train', '--data', {str(text)!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "sys.argv += '--steps 1 --layers 1 --width 16 --heads 1 --context 8 --warmup 0'.split()\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(allocator.done.tuned)"
    )
    assert process(code).splitlines()[-1] == "True"
