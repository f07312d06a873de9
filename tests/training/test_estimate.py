import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from fastlm.training import estimate
from fastlm.training.models import build
from fastlm.training.settings import Settings

SETTINGS = Settings(layers=4, heads=2, width=32, context=16, batch=6, micro_batch=4, ema=0.9)
CPU = torch.device("cpu")


def estimated(settings, corpus):
    return estimate.estimate(settings, corpus, lambda some: build(some, corpus.tokenizer), CPU)


def test_a_model_that_fits_is_measured(corpus, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.01)
    found = estimated(SETTINGS, corpus)
    assert found.parameters == build(SETTINGS, corpus.tokenizer).num_parameters()
    assert found.measured and found.seconds > 0 and found.memory > 2**26 and found.available > 2**26


def test_a_larger_one_is_extrapolated_from_its_layers(corpus, monkeypatch):
    """Of layers that take 3 s, and a rest of 1 s."""
    monkeypatch.setattr(estimate, "measure", lambda settings, *rest: (1 + 3 * settings.layers, 0))
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1)
    found = estimated(SETTINGS, corpus)
    assert not found.measured and found.seconds == 13
    assert found.memory > found.parameters * 36


def test_saved_bytes_are_linear_in_layers(corpus):
    sizes = [
        estimate.saved_bytes(few, corpus, build(few, corpus.tokenizer))
        for few in (dataclasses.replace(SETTINGS, layers=n) for n in (1, 2, 6))
    ]
    assert 0 < sizes[0] < sizes[1] and sizes[2] == pytest.approx(estimate.linear(*sizes[:2], 6), rel=0.01)


def test_micro_batches_add_up(corpus, monkeypatch):
    """A step of 6 sequences is a micro-batch of 4, one of 2, and an update."""

    def timed(call, device):
        call()
        return {"micro_batch": 2.0, "last_micro_batch": 1.25, "update": 0.5}[call.__name__]

    monkeypatch.setattr(estimate, "timed", timed)
    model = build(SETTINGS, corpus.tokenizer)
    before = [p.detach().clone() for p in model.parameters()]
    assert estimate.measure(SETTINGS, corpus, model)[0] == 3.75
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
def test_the_memory_is_that_of_the_run(text_file, tmp_path):
    """Within 15 %. Time depends on what else the machine does, and memory where the system reclaims pages."""
    options = [str(text_file), "--layers", "4", "--width", "256", "--context", "128", "--threads", "1"]
    program = "import resource, sys; from fastlm.cli import app; app(sys.argv[1:], standalone_mode=False); "
    program += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"

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
