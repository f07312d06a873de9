"""`make gpu` where there is no GPU: a Python that only says what it was asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo "$FAKE_CARDS" ;;
  setup.py*) echo "archs $FASTLM_CUDA_ARCHS" >> "$LOG"; case "$FASTLM_CUDA_ARCHS" in 75) exit 1 ;; esac ;;
  *"-m pytest"*) echo "tests on $FASTLM_TEST_BACKENDS" >> "$LOG"; exit "$TESTS" ;;
  *" bench --gpu"*) echo "measurements" >> "$LOG"; exit "$BENCH" ;;
  *backends*) echo ",cuda" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(tests=0, bench=0, cards="90", **given):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("FASTLM_CUDA_ARCHS", "MAKEFLAGS", "MAKELEVEL")}
        environment |= {"LOG": str(log), "TESTS": str(tests), "BENCH": str(bench), "FAKE_CARDS": cards, **given}
        command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={python}", f"OUT={tmp_path / 'out'}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


@pytest.mark.parametrize("tests, bench", [(0, 0), (1, 0), (0, 3), (124, 1)])
def test_what_fails_fails_the_whole_and_keeps_nothing_from_running(tests, bench, make):
    done, log = make(tests, bench)
    assert log == ["archs 90", "tests on triton,cuda", "measurements"]
    assert (done.returncode == 0) == (tests == bench == 0), done.stderr
    said = done.stdout.splitlines()
    assert (f"the tests: exit status {tests}" in said) == bool(tests) and (f"the measurements: exit status {bench}" in said) == bool(bench)


def test_an_earlier_run_that_failed_is_forgotten(make):
    assert make(tests=1)[0].returncode and not make()[0].returncode


def test_the_kernels_are_built_for_the_cards_that_are_here(make):
    assert make(cards="80,90")[1][0] == "archs 80,90"
    assert make(cards="75")[1][:2] == ["archs 75", "archs "]  # which is not served: as everywhere
    assert make(cards="")[1][0] == "archs "  # AMD's, or none
    assert make(cards="90", FASTLM_CUDA_ARCHS="86")[1][0] == "archs 86"  # the user's own
