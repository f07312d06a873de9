import json
import os
import re
import signal

import pytest

from fastlm.commands import demo
from fastlm.commands.display import BarReport
from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.training.baseline import PlainGPT2
from fastlm.training.curve import draw_losses
from tests.commands.support import fastlm_command, process, run


def test_demo(small_demo, tmp_path):
    output = run("demo", "--out", tmp_path / "out", "--seconds", 1)
    assert re.search(
        r"fastlm +[\d,]+ tokens/s\n +PyTorch +[\d,]+ tokens/s\n +speedup .*: \d+\.\d\d × \(median of 5 pairs",
        output,
    )
    assert "losses agree" in output and "\ndef " in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert output.splitlines()[-1] == f"val loss {summary['val_loss']:.4f}"
    assert summary["val_loss"] < 5 and summary["steps"] > 6 and len(summary["comparison"]["losses"]) == 6
    assert load_model(tmp_path / "out").config.n_positions == 64
    assert ("loss.png" in os.listdir(tmp_path / "out")) == draw_losses(tmp_path / "probe.png", [1.0])
    assert load_tokenizer(tmp_path / "out").encode("def") == list(b"def")


def test_the_demo_replaces_a_run(small_demo, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 40)
    small = "--layers 1 --heads 2 --width 16 --context 8 --batch 2 --steps 2".split()
    run("train", text, *small, "--out", tmp_path / "out")
    run("demo", "--out", tmp_path / "out", "--seconds", 0.1, "--overwrite")
    result = fastlm_command("train", "--resume", tmp_path / "out")
    assert result.exit_code == 1 and "resume: expected the directory of a run" in result.stderr
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize("pair_seconds", [1e-9, 1e9], ids=["ends by time", "ends by number"])
def test_bars_of_the_demo_end_full(small_demo, tmp_path, monkeypatch, pair_seconds):
    shown, show = [], BarReport.show

    def record(bar, completed, *words):
        shown.append(completed / bar.progress.tasks[0].total)
        show(bar, completed, *words)

    monkeypatch.setattr(BarReport, "show", record)
    monkeypatch.setattr(demo, "PAIR_SECONDS", pair_seconds)
    run("demo", "--out", tmp_path / "out", "--seconds", 0.2)
    comparison = shown[: shown.index(1) + 1]
    assert len(comparison) >= 5 and comparison == sorted(comparison) and shown[-1] == 1
    assert all(0 < share <= 1 for share in shown)


def test_demo_fails_if_the_losses_disagree(small_demo, tmp_path, monkeypatch):
    original = PlainGPT2.loss
    monkeypatch.setattr(PlainGPT2, "loss", staticmethod(lambda *batch: original(*batch) * 1.001))
    result = fastlm_command("demo", "--out", tmp_path, "--seconds", 0.1)
    assert result.exit_code == 1 and "losses DISAGREE" in result.stdout
    assert re.fullmatch(
        r"error: losses: expected a relative difference of at most 1e-05 between fastlm and PyTorch, got \d\.\de-0\d\n",
        result.stderr,
    )


def test_demo_without_the_standard_library(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    result = fastlm_command("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: corpus: expected the standard library's source, got no .py file in '.*'\n", result.stderr
    )


def test_interrupted_demo(tmp_path):
    with process("demo", "--threads", 1, cwd=tmp_path) as running:
        assert any(line.startswith("1. ") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in errors + output
    if errors != "interrupted\n":  # before the first step
        assert "interrupted after" in output and (tmp_path / "runs" / "demo" / "model.safetensors").exists()
