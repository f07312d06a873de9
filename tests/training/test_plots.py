import dataclasses
import json
import math
import sys
import xml.etree.ElementTree

import pytest

from fastlm.training.metrics import FILE, JSONLines
from fastlm.training.plots import Curves, draw, write
from fastlm.training.report import Step

COLUMNS = ("steps", "loss", "lr", "grad_norm", "tokens_per_second")


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in the learning rate; a step of the second was skipped."""
    for name, lr in (("a <b>", 1e-3), ("c", 2e-3)):
        run = tmp_path / name
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"settings": {"lr": lr, "width": 77123}}))
        with JSONLines(run) as metrics:
            for i in range(1, 6):
                skipped = "its loss is nan" if name == "c" and i == 3 else ""
                loss = math.nan if skipped else 3.0 / i
                metrics.on_step(Step(i, loss, lr, loss, 1000.0 * i, 1.0, skipped, False))
            metrics.on_evaluation_end(2, 2.5, 2.25)
            metrics.on_evaluation_end(5, 1.5, 2.75)
            metrics.on_sample(5, "text")
    return [tmp_path / "a <b>", tmp_path / "c"]


def test_reading(runs):
    with (runs[1] / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # is being written
    curves = Curves.read(runs[1])
    assert curves.steps == [1, 2, 3, 4, 5] and curves.evaluations == [(2, 2.25), (5, 2.75)]
    assert curves.loss[:2] == curves.grad_norm[:2] == [3.0, 1.5] and math.isnan(curves.loss[2])
    assert (curves.lr[0], curves.tokens_per_second[4], curves.skipped) == (2e-3, 5000.0, 1)


@pytest.mark.parametrize("steps", [5, 20])
def test_steps_are_whole_numbers(runs, steps):
    curves = dataclasses.replace(Curves.read(runs[0]), **{key: list(range(1, steps + 1)) for key in COLUMNS})
    for axes in draw([curves]).axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize("ending, begin", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_files(runs, tmp_path, ending, begin):
    file = tmp_path / f"plot.{ending}"
    write(file, [Curves.read(run) for run in runs])
    content = file.read_bytes()
    assert content.startswith(begin)
    if ending == "svg":
        xml.etree.ElementTree.fromstring(content)
    if ending == "html":
        text = content.decode()
        assert "a &lt;b&gt;</th><td>5</td><td>2.7500</td><td>2.2500</td><td>2</td><td>3,000</td><td>0</td>" in text
        assert "<td>0.002</td>" in text and "77123" not in text  # settings that differ
        assert "src=" not in text and 'href="http' not in text  # nothing is loaded


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "run: expected the directory of a run, with metrics.jsonl, got"),
        ("", "run: expected at least one step in"),
        ("{}\nx\n", "run: expected JSON in line 2 of .*, got 'x"),
    ],
)
def test_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        Curves.read(tmp_path)


def test_another_format(runs, tmp_path):
    with pytest.raises(ValueError, match=r"out: expected a file that ends with .png, .svg, .html, got '.*plot.gif'"):
        write(tmp_path / "plot.gif", [])


def test_without_matplotlib(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="out: expected an installation with matplotlib"):
        write(tmp_path / "plot.png", [Curves.read(run) for run in runs])
