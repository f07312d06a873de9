import builtins
import json
import math

import pytest

from fastlm.training.metrics import FILE, SIZE, JSONLines, TensorBoard
from fastlm.training.report import Reports, Step

GOOD = Step(1, 2.5, 1e-3, 0.7, 8999.96, 9000.0, "", False)
BAD = Step(2, math.nan, 1e-3, math.nan, 9000.0, 9000.0, "its loss is nan", False)
OVERFLOW = Step(3, 2.5, 1e-3, math.inf, 9000.0, 9000.0, "", True)


def lines(run):
    return [json.loads(line) for line in (run / FILE).read_text("utf-8").splitlines()]


def test_lines(tmp_path):
    with JSONLines(tmp_path) as metrics:
        for step in (GOOD, BAD, OVERFLOW):
            metrics.on_step(step)
        metrics.on_evaluation_end(3, 2.0, math.inf)
        metrics.on_sample(3, "naïve\n")
    rate = {"lr": 1e-3, "tokens_per_second": 9000.0}
    assert lines(tmp_path) == [
        {"step": 1, "loss": 2.5, "grad_norm": 0.7} | rate,
        {"step": 2, "loss": None, "grad_norm": None, "skipped": "its loss is nan"} | rate,
        {"step": 3, "loss": 2.5, "grad_norm": None, "skipped": "a gradient overflowed float16"} | rate,
        {"step": 3, "train_loss": 2.0, "val_loss": None},
        {"step": 3, "sample": "naïve\n"},
    ]


def test_lines_of_steps_that_are_run_again_are_deleted(tmp_path):
    with JSONLines(tmp_path) as metrics:
        metrics.on_step(GOOD)
        saved = Reports([metrics]).on_save()
        before = (tmp_path / FILE).read_bytes()
        metrics.on_step(BAD)
    assert saved == {SIZE: len(before)}
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"step": 3, "lo')  # the process was killed
    with JSONLines(tmp_path, saved[SIZE]) as metrics:
        metrics.on_step(OVERFLOW)
        assert metrics.on_save()[SIZE] > saved[SIZE]
    assert (tmp_path / FILE).read_bytes().startswith(before) and [x["step"] for x in lines(tmp_path)] == [1, 3]
    with JSONLines(tmp_path, 10**9):
        pass
    assert [x["step"] for x in lines(tmp_path)] == [1, 3]  # a shorter file is kept as it is
    with JSONLines(tmp_path):
        pass
    assert lines(tmp_path) == []


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 1):
        with TensorBoard(tmp_path, start) as events:
            for step in range(start + 1, 4):
                events.on_step(GOOD._replace(step=step, loss=float(10 * start + step)))
            events.on_evaluation_end(3, 2.0, 2.5)
            events.on_sample(3, "text")
            events.on_save()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss/batch")] == [(1, 1.0), (2, 12.0), (3, 13.0)]
    assert read.Scalars("loss/val")[-1].value == 2.5
    assert set(read.Tags()["scalars"]) == {
        "loss/batch",
        "loss/train",
        "loss/val",
        "lr",
        "grad_norm",
        "tokens_per_second",
    }


def test_without_tensorboard(tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *arguments, **keywords):
        if "tensorboard" in name:
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'tensorboard: expected an installation with tensorboard \(pip install "fas'):
        TensorBoard(tmp_path)
