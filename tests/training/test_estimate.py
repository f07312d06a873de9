import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from fastlm.training import data, estimate
from fastlm.training.estimate import Seconds
from fastlm.training.models import build
from fastlm.training.settings import Settings

SETTINGS = Settings(layers=4, heads=2, width=32, context=16, batch=6, micro_batch=4, ema=0.9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(text, tmp_path_factory):
    file = tmp_path_factory.mktemp("short") / "text.txt"
    file.write_text(text[:3000])
    return data.load([file], tokenizer="char")


def estimated(settings, corpus):
    return estimate.estimate(settings, corpus, lambda some: build(some, corpus.tokenizer), CPU)


def test_a_model_that_fits_is_measured(corpus, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.01)
    monkeypatch.setattr(estimate, "SHORT", 0.01)
    found = estimated(SETTINGS, corpus)
    assert found.parameters == build(SETTINGS, corpus.tokenizer).num_parameters()
    assert found.measured and min(dataclasses.astuple(found.seconds)) > 0
    assert found.memory > 2**26 and found.available > 2**26
    assert found.stored == pytest.approx(16 * found.parameters, rel=0.01)  # and the numbers of the steps


def test_a_larger_one_is_extrapolated_from_its_layers(corpus, monkeypatch):
    """Of layers that take 3 s, and a rest of 1 s."""

    def measure(settings, *rest):
        return Seconds(2.0, 1 + 3 * settings.layers, 0.5 * settings.layers, 0.25), 0

    monkeypatch.setattr(estimate, "measure", measure)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1)
    found = estimated(SETTINGS, corpus)
    assert not found.measured and found.seconds == Seconds(2, 13, 2, 0.25)
    assert found.stored == found.parameters * 16
    assert found.memory > found.parameters * 36


def test_saved_bytes_are_linear_in_layers(corpus):
    sizes = [
        estimate.saved_bytes(
            dataclasses.replace(SETTINGS, layers=n), corpus, lambda some: build(some, corpus.tokenizer), CPU
        )
        for n in (1, 2, 6)
    ]
    assert 0 < sizes[0] < sizes[1] and sizes[2] == pytest.approx(estimate.linear(*sizes[:2], 6), rel=0.01)


def test_micro_batches_add_up(corpus, monkeypatch):
    """A step of 6 sequences is a micro-batch of 4, one of 2, and an update."""

    def timed(call, device, total=None):
        call()
        seconds = {"micro_batch": 2.0, "last_micro_batch": 1.25, "update": 0.5, "evaluation": 0.5, "copy": 0.25}
        return seconds[call.__name__]

    monkeypatch.setattr(estimate, "timed", timed)
    model = build(SETTINGS, corpus.tokenizer)
    before = [p.detach().clone() for p in model.parameters()]
    windows = sum((len(tokens) - 1) // 16 for tokens in (corpus.train, corpus.validation))  # 6 of which are measured
    found, _ = estimate.measure(SETTINGS, corpus, model)
    assert found == Seconds(found.start, 3.75, pytest.approx(windows / 12), 0.25)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak may be that of this process")
def test_the_memory_is_that_of_the_run(text_file, tmp_path):
    """Within 15 %. Time depends on what else the machine does, and memory where the system reclaims pages."""
    options = [str(text_file), "--layers", "4", "--width", "256", "--context", "128", "--threads", "1"]
    program = "import sys, torch; from fastlm.cli import app; app(sys.argv[1:], standalone_mode=False); "
    program += "from fastlm.training.estimate import peak_memory; print('peak', peak_memory(torch.device('cpu')))"

    def run(*more):
        command = [sys.executable, "-c", program, "train", *options, *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def ratio(name):
        dry = run("--dry-run", "--out", str(tmp_path / name))
        assert not (tmp_path / name).exists()
        real = run("--steps", "5", "--out", str(tmp_path / name))
        estimated = float(re.search(r"memory: ([\d.]+) GiB", dry)[1]) * 2**30
        return estimated / float(re.search(r"peak (\d+)", real)[1])

    assert any(0.85 < ratio(name) < 1.15 for name in ("first", "second", "third"))
