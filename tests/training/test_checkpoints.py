import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from fastlm.models import load_model
from fastlm.training import checkpoints, data, guard
from fastlm.training.checkpoints import Checkpoints, damage_of, newest, saved_in
from fastlm.training.loop import train
from fastlm.training.models import build
from fastlm.training.objectives import NextToken
from fastlm.training.report import Report
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer

TINY = Settings(layers=1, heads=2, width=16, context=16, batch=8, steps=30, warmup=3, eval_every=6, checkpoint_every=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small for more, and other tests may run at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text_file(text, tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(text[:1000])
    return file


@pytest.fixture(scope="module")
def corpus(text_file):
    return data.load([text_file], tokenizer="char")


class Interrupt(Report):
    """Signals the process after a step, or when an evaluation begins after it."""

    def __init__(self, step, *numbers, evaluating=False):
        self.step, self.numbers, self.evaluating, self.seen = step, list(numbers), evaluating, 0

    def on_step(self, step):
        self.seen = step.step
        if not self.evaluating:
            self.signal()

    def on_evaluation_start(self):
        if self.evaluating:
            self.signal()

    def signal(self):
        if self.seen == self.step:
            while self.numbers:
                os.kill(os.getpid(), self.numbers.pop())


def train_in(run, settings, corpus, **arguments):
    """Trains, or goes on from the newest checkpoint."""
    start, damages = newest(run)
    assert not damages
    torch.manual_seed(time.monotonic_ns())  # what the process has drawn before does not matter
    model = build(settings, corpus.tokenizer) if start is None else load_model(start.folder, dtype=torch.float32)
    with Checkpoints(run, keep=settings.keep, tokenizer=corpus.tokenizer) as writer:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        return train(settings, corpus, model, checkpoints=writer, start=start, **arguments)


def steps_of(run):
    return [checkpoints.step_of(folder) for folder in saved_in(run)]


def tensors_of(run):
    saved, _ = newest(run)
    return saved.tensors() | dict(load_model(saved.folder).state_dict())


@pytest.mark.parametrize("objective", ["next-token", "masked-token"])
@pytest.mark.parametrize(
    "dtype, dropout, number",
    [
        ("fp32", 0.0, signal.SIGINT),
        ("fp32", 0.2, signal.SIGTERM),
        ("bf16", 0.0, signal.SIGTERM),
        ("bf16", 0.2, signal.SIGINT),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(text_file, tmp_path, objective, dtype, dropout, number):
    corpus = data.load([text_file], tokenizer="char", masked=objective == "masked-token")
    settings = dataclasses.replace(TINY, objective=objective, dtype=dtype, dropout=dropout)
    whole = train(settings, corpus)
    first = train_in(tmp_path, settings, corpus, report=Interrupt(13, number))
    assert (first.interrupted, first.steps, first.losses) == (True, 13, whole.losses[:13])
    assert steps_of(tmp_path)[-1] == 13
    second = train_in(tmp_path, settings, corpus)
    assert not second.interrupted and second.losses == whole.losses and second.evaluations == whole.evaluations
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "wsd", "micro_batch": 3, "dropout": 0.1},
        {"dtype": "fp16", "dropout": 0.1},
        {"ema": 0.9},
        {"skip_spikes": 0.01, "max_skipped": 30, "lr": 1e-9, "min_lr": 0.0},
        {"ema": 0.9, "patience": 2, "lr": 1e-9, "min_lr": 0.0},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_all_state_of_a_run_is_in_a_checkpoint(corpus, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(guard, "FEWEST", 5)
    settings, nan = dataclasses.replace(TINY, eval_every=3, **changes), (3, 12, 14, 21)
    parts = 3 if settings.micro_batch else 1  # the loss is called for each
    at = [parts * step for step in nan]
    whole = train(settings, corpus, loss=Diverging(*at))
    first = train_in(tmp_path, settings, corpus, report=Interrupt(13, signal.SIGINT), loss=Diverging(*at))
    second = train_in(tmp_path, settings, corpus, loss=Diverging(*at, before=13 * parts))
    assert whole.stopped_early == (settings.patience > 0) and set(whole.skipped) & set(nan)
    assert first.steps == min(13, whole.steps) and second.evaluations == whole.evaluations
    assert (second.skipped, second.overflows, second.steps) == (whole.skipped, whole.overflows, whole.steps)
    torch.testing.assert_close(second.losses, whole.losses, rtol=0, atol=0, equal_nan=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())
    if settings.skip_spikes:
        assert len(whole.skipped) > len(nan)


def test_a_checkpoint_has_the_averaged_weights(corpus, tmp_path):
    """As they are what was evaluated."""
    result = train_in(tmp_path, dataclasses.replace(TINY, ema=0.9), corpus)
    (*_, folder) = saved_in(tmp_path)
    averaged = load_model(folder).parameters()
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), averaged, strict=True))


def test_a_second_signal_leaves_the_checkpoint(corpus, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, TINY, corpus, report=Interrupt(7, signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    assert steps_of(tmp_path)[-1] == 7 and signal.getsignal(signal.SIGINT) is before
    assert train_in(tmp_path, TINY, corpus).losses == train(TINY, corpus).losses


def test_a_signal_ends_an_evaluation(corpus, tmp_path, monkeypatch):
    """The checkpoint comes first; the run that goes on evaluates again."""
    order = []
    evaluate, write = Trainer.evaluate, Checkpoints.write
    monkeypatch.setattr(Trainer, "evaluate", lambda *a: (evaluate(*a), order.append("evaluated"))[0])
    monkeypatch.setattr(Checkpoints, "write", lambda *a: (write(*a), order.append("saved"))[0])
    train_in(tmp_path, TINY, corpus, report=Interrupt(6, signal.SIGTERM, evaluating=True))
    assert steps_of(tmp_path) == [4, 6] and order == ["saved", "saved", "evaluated", "evaluated"]
    monkeypatch.undo()
    assert train_in(tmp_path, TINY, corpus).evaluations == train(TINY, corpus).evaluations


def test_batches_do_not_depend_on_evaluations_and_checkpoints(corpus, tmp_path):
    often = dataclasses.replace(TINY, dropout=0.1, eval_every=1, checkpoint_every=1)
    seldom = dataclasses.replace(often, eval_every=30, checkpoint_every=0)
    assert train_in(tmp_path / "often", often, corpus).losses == train_in(tmp_path / "seldom", seldom, corpus).losses
    assert steps_of(tmp_path / "seldom") == [30]


def test_the_newest_and_the_best_are_kept(corpus, tmp_path):
    losses = {4: 3.0, 8: 1.0, 12: 2.0, 16: 2.5, 20: 2.0}
    model = build(TINY, corpus.tokenizer)
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path, keep=2, tokenizer=corpus.tokenizer) as writer:
        for step, loss in losses.items():
            writer.save(step, model, {}, {"seconds": 1.0, "evaluations": [(step, loss, loss)]})
        writer.wait()
    assert steps_of(tmp_path) == [8, 16, 20]


def test_a_checkpoint_is_a_model(corpus, tmp_path):
    result = train_in(tmp_path, TINY, corpus)
    (*_, folder) = saved_in(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(result.model.parameters(), load_model(folder).parameters(), strict=True)
    )


def test_what_changes_after_a_save_is_not_in_it(corpus, tmp_path, monkeypatch):
    """A thread writes from a copy."""
    model = build(TINY, corpus.tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {"x": torch.ones(3)}
    write, changed = Checkpoints.write, threading.Event()
    monkeypatch.setattr(Checkpoints, "write", lambda *a: (changed.wait(60), write(*a)))
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path, keep=2, tokenizer=corpus.tokenizer) as writer:
        writer.save(1, model, tensors, {"seconds": 1.0, "evaluations": []})  # returns before it is written
        for value in (*model.state_dict().values(), *tensors.values()):
            value.zero_()
        changed.set()
    saved = tensors_of(tmp_path)
    assert torch.equal(saved.pop("x"), torch.ones(3)) and saved.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())


def test_later_evaluations_are_not_in_a_checkpoint(corpus, tmp_path, monkeypatch):
    write = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda *a: (time.sleep(0.1), write(*a)))
    train_in(tmp_path, dataclasses.replace(TINY, steps=12, eval_every=1, keep=3), corpus)
    evaluated = [[step for step, *_ in checkpoints.Saved.read(folder).evaluations] for folder in saved_in(tmp_path)]
    assert evaluated == [list(range(1, 5)), list(range(1, 9)), list(range(1, 12))]


@contextlib.contextmanager
def failing_write():
    """Writing fails, as on a full disk, from step 8 on."""
    write = Checkpoints.write

    def fail(self, step, *rest):
        if step >= 8:
            raise OSError(28, "No space left on device")
        write(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", fail)
        yield


def test_an_error_of_the_thread_ends_the_run(corpus, tmp_path, monkeypatch):
    """At once, not when the next checkpoint is due."""
    settings, report, failed = dataclasses.replace(TINY, checkpoint_every=8), Interrupt(None), Checkpoints.failed

    def failed_when_written(checkpoints, wait):
        return failed(checkpoints, wait=True)

    with monkeypatch.context() as patch, failing_write(), pytest.raises(OSError, match="No space left on device"):
        patch.setattr(Checkpoints, "failed", failed_when_written)
        train_in(tmp_path, settings, corpus, report=report)
    assert steps_of(tmp_path) == [] and report.seen <= 9
    with failing_write(), pytest.raises(OSError, match="No space left on device"):
        train_in(tmp_path, TINY, corpus)
    assert steps_of(tmp_path) == [4]
    assert train_in(tmp_path, TINY, corpus).losses == train(TINY, corpus).losses


class Diverging:
    """The loss of steps, or its gradient only, is NaN."""

    def __init__(self, *steps, gradient_only=False, before=0):
        self.at, self.gradient_only, self.steps = steps, gradient_only, before

    def __call__(self, model, inputs, targets):
        loss = NextToken().loss(model, inputs, targets)
        self.steps += model.training
        if self.steps not in self.at or not model.training:
            return loss
        bias = model.transformer.ln_f.bias
        return loss + (0 * bias.sum()).sqrt() if self.gradient_only else loss * torch.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_divergence_ends_the_run_and_leaves_the_checkpoint_before_it(corpus, tmp_path, gradient_only):
    settings, report = dataclasses.replace(TINY, grad_clip=0.0, max_skipped=3), Interrupt(None)
    with pytest.raises(ValueError, match=r"lr: expected a learning rate with finite .* of step 11, its .* is nan"):
        diverging = Diverging(*range(9, 40), gradient_only=gradient_only)
        train_in(tmp_path, settings, corpus, loss=diverging, report=report)
    assert steps_of(tmp_path)[-1] == 8 and report.seen == 11
    assert train_in(tmp_path, settings, corpus).losses == train(settings, corpus).losses


def test_weights_that_are_not_finite_are_not_saved(corpus, tmp_path):
    model = build(TINY, corpus.tokenizer)
    (tmp_path / "checkpoints").mkdir()
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"at step 1 model.transformer.wte.weight is not finite"):
        with Checkpoints(tmp_path, keep=2, tokenizer=corpus.tokenizer) as writer:
            writer.save(1, model, {"losses": torch.tensor([torch.nan])}, {"seconds": 1.0, "evaluations": []})
            writer.wait()
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_found(dtype):
    x = torch.cat([torch.randn(2**20 + 5), torch.tensor([torch.finfo(torch.float16).max])]).to(dtype)
    assert checkpoints.is_finite(x) and checkpoints.is_finite(x[0]) and checkpoints.is_finite(x[:0])
    for value in (torch.inf, -torch.inf, torch.nan):
        for place in (0, 2**20 + 4):
            changed = x.clone()
            changed[place] = value
            assert not checkpoints.is_finite(changed.view(3, -1) if changed.numel() % 3 == 0 else changed)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_that_checks_weights_starts_no_other():
    """With more threads than cores OpenMP's threads sleep between two parallel loops: training took 13 % longer."""
    x = torch.ones(2**21)

    def check():
        """The threads that are new."""
        known = set(os.listdir("/proc/self/task"))
        checkpoints.check_finite({"x": x}, 1)
        return set(os.listdir("/proc/self/task")) - known

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x.isfinite().all()  # this thread has its own
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            new = thread.submit(check).result()
    finally:
        torch.set_num_threads(before)
    assert not new


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_damage_is_found(corpus, tmp_path, name, kind):
    train_in(tmp_path, dataclasses.replace(TINY, steps=8), corpus)
    first, last = saved_in(tmp_path)
    assert damage_of(last) is None
    content = bytearray((last / name).read_bytes())
    content[len(content) // 2] ^= 1
    if kind == "missing":
        (last / name).unlink()
    else:
        (last / name).write_bytes(content if kind == "flipped" else content[: len(content) // 2])
    assert str(last) in damage_of(last)
    saved, damages = newest(tmp_path)
    assert saved.folder == first and len(damages) == 1 and str(last) in damages[0]
    content = json.loads((first / "training.json").read_text())
    (first / "training.json").write_text(json.dumps(content | {"step": 5}))
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint that is not damaged, got .*step-00000008"):
        newest(tmp_path)
