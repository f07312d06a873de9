import contextlib
import dataclasses
import json
import os
import signal
import time

import pytest
import torch

from fastlm.models import load_model
from fastlm.training import checkpoints, data
from fastlm.training.checkpoints import Checkpoints, damage_of, newest, saved_in
from fastlm.training.loop import Report, Trainer, train
from fastlm.training.models import build
from fastlm.training.objectives import NextToken
from fastlm.training.settings import Settings

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

    def on_step(self, step, loss, tokens_per_second):
        self.seen = step
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
    write = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda *a: (time.sleep(0.2), write(*a)))
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path, keep=2, tokenizer=corpus.tokenizer) as writer:
        start = time.monotonic()
        writer.save(1, model, tensors, {"seconds": 1.0, "evaluations": []})
        assert time.monotonic() - start < 0.2
        for value in (*model.state_dict().values(), *tensors.values()):
            value.zero_()
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


class Slow(Interrupt):
    def on_step(self, step, loss, tokens_per_second):
        super().on_step(step, loss, tokens_per_second)
        time.sleep(0.01)


def test_an_error_of_the_thread_ends_the_run(corpus, tmp_path):
    """At once, not when the next checkpoint is due."""
    settings, report = dataclasses.replace(TINY, checkpoint_every=8), Slow(None)
    with failing_write(), pytest.raises(OSError, match="No space left on device"):
        train_in(tmp_path, settings, corpus, report=report)
    assert steps_of(tmp_path) == [] and report.seen < 16
    with failing_write(), pytest.raises(OSError, match="No space left on device"):
        train_in(tmp_path, TINY, corpus)
    assert steps_of(tmp_path) == [4]
    assert train_in(tmp_path, TINY, corpus).losses == train(TINY, corpus).losses


class Diverging:
    """The loss of a step, or its gradient only, is NaN."""

    def __init__(self, at, *, gradient_only):
        self.at, self.gradient_only, self.steps = at, gradient_only, 0

    def __call__(self, model, inputs, targets):
        loss = NextToken().loss(model, inputs, targets)
        self.steps += model.training
        if self.steps != self.at or not model.training:
            return loss
        bias = model.transformer.ln_f.bias
        return loss + (0 * bias.sum()).sqrt() if self.gradient_only else loss * torch.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_divergence_leaves_the_checkpoint_before_it(corpus, tmp_path, gradient_only):
    """NaN weights are not saved: at step 8 the loss is still finite, but not its gradient."""
    settings = dataclasses.replace(TINY, grad_clip=0.0)
    with pytest.raises(ValueError, match=r"lr: expected a learning rate with .*finite.*at step [89] "):
        train_in(tmp_path, settings, corpus, loss=Diverging(8 + (not gradient_only), gradient_only=gradient_only))
    assert steps_of(tmp_path)[-1] == (4 if gradient_only else 8)
    assert train_in(tmp_path, settings, corpus).losses == train(settings, corpus).losses


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
