"""`make gpu` without a GPU, where a fake Python and compute-sanitizer record their arguments; and .ci/run."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo "$FAKE_CARDS" ;;
  setup.py*) echo "archs $FASTLM_CUDA_ARCHS without $FASTLM_BUILD_ISAS" >> "$LOG"; sleep "$BUILDS"
    case "$FASTLM_CUDA_ARCHS" in 75) exit 1 ;; 76) exit 124 ;; esac ;;
  *xdist*) test -z "$XDIST" || echo "-n $XDIST"; test -n "$XDIST" ;;
  *"-m pytest"*) test -z "$REAL" || exec "$REAL" -m pytest -v $WORKERS --junitxml="$LOG.xml" "$TESTED";
    trap 'touch "$LOG.interrupted"; exit 2' INT; test -z "$SLEEPS" || { sleep "$SLEEPS" & wait; };
    echo "$*" > "$LOG.pytest"; echo "tests on $FASTLM_TEST_BACKENDS" >> "$LOG"; exit "$TESTS" ;;
  *" bench --gpu"*) echo "$*" > "$LOG.bench"; echo "measurements" >> "$LOG"; exit "$BENCH" ;;
  *'print(*'*) echo "$REFUSES" ;;
  *backends*) echo ",cuda" ;;
esac
"""
BUILT = "archs 90 without none"
SANITIZER = """#!/bin/sh
printf '%s\\n' "$@" > "$LOG.$2"
test -z "$STUCK" || exec sleep "$STUCK"
exit "$FINDS"
"""


@pytest.fixture
def make(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)

    def run(tests=0, bench=0, cards="90", target="gpu", variables=(), **given):
        log = tmp_path / "log"
        log.write_text("")
        of_make = ("ARGS", "MAKEFLAGS", "MAKELEVEL")  # of the one that may have started the tests
        of_xdist = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")  # this process may be a worker
        environment = {k: v for k, v in os.environ.items() if k not in ("FASTLM_CUDA_ARCHS", *of_make, *of_xdist)}
        environment |= {
            "LOG": str(log),
            "TESTS": str(tests),
            "BENCH": str(bench),
            "FAKE_CARDS": cards,
            "FINDS": "0",
            "STUCK": "",
            "REFUSES": "",
            "XDIST": "",
            "SLEEPS": "",
            "BUILDS": "0",
            "REAL": "",
        }
        environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **given}
        command = ["make", "-C", str(ROOT), target, f"PYTHON={python}", f"OUT={tmp_path / 'out'}", *variables]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


@pytest.mark.parametrize("tests, bench", [(0, 0), (1, 0), (0, 3), (124, 1)])
def test_a_failure_fails_the_target_but_later_steps_still_run(tests, bench, make):
    done, log = make(tests, bench)
    assert log == [BUILT, "tests on triton,cuda", BUILT, "measurements"]
    assert (done.returncode == 0) == (tests == bench == 0), done.stderr
    lines = done.stdout.splitlines()
    assert (f"the tests: exit status {tests}" in lines) == bool(tests)
    assert (f"the measurements: exit status {bench}" in lines) == bool(bench)


def test_tests_and_measurements_are_targets_of_their_own(make, tmp_path):
    """Each for a command of ten minutes, with at most eight files of results."""
    done, log = make(target="gpu-test")
    assert done.returncode == 0 and log == [BUILT, "tests on triton,cuda"]
    done, log = make(target="gpu-bench", bench=3)
    assert done.returncode != 0 and log == [BUILT, "measurements"]
    listing = subprocess.run(["make", "-C", str(ROOT), "-n", "gpu-test", "gpu-bench"], capture_output=True, text=True)
    limits = [int(n) for n in re.findall(r"timeout (?:-s INT )?(?:-k 20 )?(\d+)", listing.stdout)]
    bench = re.search(r"--limit (\d+)", listing.stdout)
    assert limits[:2] == [100, 100] and {*limits[2:]} <= {469, 470} and int(bench[1]) in (439, 440)
    for target in ("gpu-test", "gpu-bench"):
        listing = subprocess.run(["make", "-C", str(ROOT), "-n", target, "OUT=OUT"], capture_output=True, text=True)
        sanitizers = ["OUT/sanitizer-memcheck.txt", "OUT/sanitizer-racecheck.txt"] * (target == "gpu-test")
        table = ["OUT/table.txt"] * (target == "gpu-bench")  # beside table.json
        assert len({*re.findall(r"OUT/[a-z.]+", listing.stdout), *sanitizers, *table}) <= 8


def test_the_limits_include_the_time_of_the_build(make, tmp_path):
    make(target="gpu-bench", BUILDS="1.1")
    limit = re.search(r"--limit (\d+)", (tmp_path / "log.bench").read_text())
    assert 420 <= int(limit[1]) < 440
    make(target="gpu-bench", BUILDS="1.1", variables=["BENCH_LIMIT=1"])  # less than the build took
    limit = re.search(r"--limit (-?\d+)", (tmp_path / "log.bench").read_text())
    assert int(limit[1]) == 1


def test_tests_that_run_out_of_time_still_report(make, tmp_path):
    """pytest is interrupted, which it ends by writing its report."""
    done, _ = make(target="gpu-test", SLEEPS="1.5", variables=["TEST_LIMIT=1"])
    assert done.returncode != 0 and "the tests: exit status 124" in done.stdout
    assert (tmp_path / "log.interrupted").exists()


HANGS = """
import os, signal, time
import pytest

def test_quick():
    pass

@pytest.mark.parametrize("i", range(2))
def test_hangs(i):
    if "PYTEST_XDIST_WORKER" in os.environ:  # as in a call of the driver, which no signal interrupts
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param("", marks=pytest.mark.nightly), "-n 2 --dist worksteal"])
def test_interrupted_tests_leave_a_report(workers, make, tmp_path):
    """pytest itself writes it, even if its workers hang; and each test has a line as soon as it is over."""
    (tmp_path / "test_it.py").write_text(HANGS)
    given = {"REAL": sys.executable, "TESTED": str(tmp_path / "test_it.py"), "WORKERS": workers}
    done, _ = make(target="gpu-test", variables=["TEST_LIMIT=15"], **given)
    assert done.returncode != 0 and "the tests: exit status 124" in done.stdout, done.stdout + done.stderr
    assert 'name="test_quick"' in (tmp_path / "log.xml").read_text()
    lines = (tmp_path / "out" / "tests.txt").read_text().splitlines()
    assert [line for line in lines if "test_quick" in line and "PASSED" in line]


@pytest.mark.parametrize("xdist", ["", "7"])
def test_tests_run_in_parallel_where_xdist_is_installed(xdist, make, tmp_path):
    done, _ = make(XDIST=xdist)
    given = (tmp_path / "log.pytest").read_text().split()
    assert done.returncode == 0 and "gpu" in given
    assert [after for before, after in itertools.pairwise(given) if before == "-n"] == [xdist] * bool(xdist)


def test_a_silent_sanitizer_failure_does_not_prevent_the_measurements(make):
    done, log = make(variables=["SANITIZED=false"])
    assert log[-1] == "measurements" and done.returncode != 0 and "compute-sanitizer: exit status 1" in done.stdout


def test_an_earlier_failure_does_not_fail_the_next_run(make):
    assert make(tests=1)[0].returncode and not make()[0].returncode


def test_kernels_are_built_for_the_installed_gpus(make):
    def archs(**given):
        return [line.removesuffix(" without none") for line in make(target="gpu-build", **given)[1]]

    assert archs(cards="80,90") == ["archs 80,90"]
    assert archs(cards="75") == ["archs 75", "archs "]  # unsupported: built for all
    assert archs(cards="76") == ["archs 76"]  # out of time, which all would be too
    assert archs(cards="") == ["archs "]  # an AMD GPU, or none
    assert archs(cards="90", FASTLM_CUDA_ARCHS="86") == ["archs 86"]  # set by the user


@pytest.fixture
def sanitizer(tmp_path):
    def arguments(tool):
        """The arguments that compute-sanitizer was given with `tool`, or None if it was not run with that tool."""
        log = tmp_path / f"log.{tool}"
        return log.read_text().splitlines() if log.exists() else None

    return arguments


@pytest.mark.parametrize("finds", [0, 99])
def test_findings_of_compute_sanitizer_fail_the_target(finds, make, sanitizer):
    done, log = make(FINDS=str(finds))
    assert log == [BUILT, "tests on triton,cuda", BUILT, "measurements"]
    assert (done.returncode == 0) == (finds == 0), done.stderr
    for tool in ("memcheck", "racecheck"):
        assert f"compute-sanitizer {tool}: {'exit status 99' if finds else 'nothing found'}" in done.stdout
        assert sanitizer(tool)[:4] == ["--tool", tool, "--error-exitcode", "99"]
    assert ("compute-sanitizer: exit status 1" in done.stdout.splitlines()) == bool(finds)
    assert sanitizer("synccheck") is None


def test_a_sanitizer_out_of_time_fails_nothing(make):
    """The tests beside it go on, and the next tool has its turn."""
    done, log = make(target="gpu-test", STUCK="60", variables=["LIMIT=1", "TOOLS=memcheck"])
    assert done.returncode == 0 and "compute-sanitizer memcheck: out of time after 1 s" in done.stdout
    assert log == [BUILT, "tests on triton,cuda"]
    done, _ = make(target="gpu-test", FINDS="124")
    for tool in ("memcheck", "racecheck"):
        assert done.returncode == 0 and f"compute-sanitizer {tool}: out of time after 150 s" in done.stdout


def test_compute_sanitizer_alone(make, sanitizer):
    done, log = make(target="gpu-sanitize", TOOLS="synccheck", FINDS="1")
    assert done.returncode and log == [] and sanitizer("synccheck") and sanitizer("memcheck") is None


def test_a_line_says_why_compute_sanitizer_did_not_run(make, sanitizer, tmp_path):
    done, _ = make(REFUSES="finds no NVIDIA driver")
    assert (
        done.returncode == 0
        and "compute-sanitizer has nothing to look at: cuda finds no NVIDIA driver" in done.stdout.splitlines()
    )
    assert sanitizer("memcheck") is None
    (tmp_path / "compute-sanitizer").rename(tmp_path / "elsewhere")
    if not shutil.which("compute-sanitizer") and not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        done, _ = make(CUDA_HOME="", CUDA_PATH="")
        assert done.returncode == 0 and [
            line for line in done.stdout.splitlines() if line.startswith("compute-sanitizer is not on the PATH")
        ]
    (tmp_path / "bin").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "bin" / "compute-sanitizer")
    assert make(CUDA_HOME=str(tmp_path))[0].returncode == 0 and (
        sanitizer("memcheck") or shutil.which("compute-sanitizer")
    )


@pytest.mark.slow
def test_the_sanitized_tests_exist(make, sanitizer):
    """Node ids as on a GPU. Each test file of CUDA kernels is represented."""
    make(target="gpu-sanitize")
    named = [argument for argument in sanitizer("memcheck") if argument.startswith("tests/")]
    environment = os.environ | {"FASTLM_TEST_BACKENDS": "cuda", "FASTLM_TEST_EMULATED": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *named]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {
        f"tests/kernels/test_{name}.py"
        for name in ("training", "cuda_attention", "cuda_gemm", "cuda_layernorm_residual")
    }


def test_nightly_is_everything_of_ci():
    done = subprocess.run(["make", "-C", str(ROOT), "-n", "nightly"], capture_output=True, text=True)
    assert ".ci/run nightly" in map(str.strip, done.stdout.splitlines()), done.stderr
    done = subprocess.run([str(ROOT / ".ci" / "run"), "weekly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "usage: .ci/run [commit|nightly [PATTERN]]\n"


def run_stages(stages, mode="commit", wanted="."):
    """Runs lines with stages, by the function of .ci/run."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("stage()"))
    stage = "\n".join(lines[begin : lines.index("}", begin) + 1])
    script = f"""
set -euo pipefail
mode={mode} wanted={wanted} times=() failed=0
fails() {{ (exit 3); echo "not reached"; }}
export -f fails
trap 'printf "%s\n" "${{times[@]}}"' EXIT
{stage}
{stages}
exit $failed
"""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs coreutils")
@pytest.mark.parametrize(
    "command, status, message",
    [
        ("sleep 60", 124, "=== a stage: exceeded its time limit of 1 s"),
        ("fails", 3, ""),
        ("true", 0, ""),
    ],
)
def test_a_stage_of_ci_fails_by_its_name(command, status, message):
    """One that hangs, one whose function fails before its last command, and one that passes."""
    done = run_stages(f'stage 1 "a stage" {command}')
    assert done.returncode == status and message in done.stderr, done.stderr
    assert "not reached" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.split(" s  ")[1] == ("a stage" if status == 0 else f"a stage (failed with status {status})")


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs coreutils")
def test_at_night_the_other_stages_run_after_a_failure():
    done = run_stages("stage 1 one fails\nstage 1 two echo reached", mode="nightly")
    assert done.returncode == 1 and "reached" in done.stdout.splitlines()
    done = run_stages("stage 1 one fails\nstage 1 two echo reached", mode="nightly", wanted="tw")
    assert done.returncode == 0 and "reached" in done.stdout.splitlines() and "one" not in done.stdout


def test_wheels_name_the_packages_that_are_missing(tmp_path):
    for tool in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    command = [str(ROOT / "tests/build/wheels.sh"), "aarch64"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "apt-get install g++-12-aarch64-linux-gnu qemu-user mmdebstrap" in done.stderr
