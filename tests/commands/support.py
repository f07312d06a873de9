"""Running commands: in this process, or in a new one where signals and exit codes matter."""

import json
import os
import subprocess
import sys

import torch
from typer.testing import CliRunner

from fastlm.cli import app

TINY = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --steps 12 --eval-every 5 --warmup 2".split()
TEXT = "for line in lines:\n    print(line, 'naïve')\n" * 60


def fastlm_command(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        torch.set_num_threads(threads)


def run(*arguments):
    result = fastlm_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def process(*arguments, cwd):
    """Runs the command in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )


def assert_same_run(out, other):
    """The runs have the same weights and evaluations, bit for bit."""
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    one, two = (json.loads((run / "summary.json").read_text()) for run in (out, other))
    assert one.pop("tokens_per_second") > 0 and two.pop("tokens_per_second") > 0
    assert one == two
