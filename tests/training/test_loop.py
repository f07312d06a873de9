import dataclasses
import math
import os
import signal
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.commands.comparison import side_by_side
from fastlm.training import data
from fastlm.training.baseline import PlainGPT2
from fastlm.training.batches import training_batch
from fastlm.training.loop import has_stalled, scheduled, train
from fastlm.training.models import build, build_gpt2
from fastlm.training.objectives import NextToken
from fastlm.training.report import Report
from fastlm.training.settings import Settings
from fastlm.training.stopping import stop_requests
from fastlm.training.trainer import Trainer


class RecordingReport(Report):
    def __init__(self):
        self.steps, self.evaluations = [], []

    def on_step(self, step):
        assert step.tokens_per_second > 0 and step.mean_tokens_per_second > 0
        self.steps.append((step.step, step.loss))

    def on_evaluation_end(self, step, train_loss, val_loss):
        self.evaluations.append((step, train_loss, val_loss))


@pytest.fixture(scope="module")
def trained(small, corpus):
    report = RecordingReport()
    return train(small, corpus, report=report), report


def test_loss_decreases(trained, corpus):
    result, _ = trained
    assert result.losses[0] == pytest.approx(
        math.log(corpus.tokenizer.get_vocab_size()), abs=0.3
    )  # uniform predictions
    frequency = corpus.train[:].bincount() / len(corpus.train)
    unigram_entropy = -torch.xlogy(frequency, frequency).sum()
    assert result.val_loss < unigram_entropy - 0.5
    assert abs(result.train_loss - result.val_loss) < 0.1  # no overfitting in so few steps


def test_report(trained, small):
    result, report = trained
    assert report.steps == list(enumerate(result.losses, 1)) and len(report.steps) == small.steps
    assert [step for step, _, _ in report.evaluations] == [25, 50, 60]
    assert result.evaluations == report.evaluations
    assert (result.train_loss, result.val_loss) == result.evaluations[-1][1:]
    assert not result.interrupted


def test_training_is_bit_reproducible(trained, small, corpus):
    result, _ = trained
    torch.manual_seed(123)  # the state of the default generator does not matter
    again = train(small, corpus)
    assert again.losses == result.losses and again.evaluations == result.evaluations
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"dropout": 0.1}], ids=str)
def test_results_depend_on_the_settings(trained, small, corpus, change):
    settings = dataclasses.replace(small, steps=3, **change)
    losses = train(settings, corpus).losses
    assert losses != trained[0].losses[:3]
    assert losses == train(settings, corpus).losses


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_recomputation_keeps_the_bits(small, text, tmp_path, architecture):
    (tmp_path / "text.txt").write_text(text[:2000])
    masked = architecture == "bert"
    objective = "masked-token" if masked else "next-token"
    changes = {"architecture": architecture, "objective": objective, "steps": 2, "width": 32, "dropout": 0.1}
    settings = dataclasses.replace(small, **changes)
    corpus = data.load([tmp_path / "text.txt"], tokenizer="char", masked=masked)
    losses = train(settings, corpus).losses
    for level in (0, 2, 3):
        model = build(dataclasses.replace(settings, recompute=level), corpus.tokenizer)
        assert model.gradient_checkpointing == (level == 3)
        assert train(settings, corpus, model).losses == losses


def test_loss_equals_that_of_the_baseline(trained, small, corpus):
    result, _ = trained
    plain = train(small, corpus, PlainGPT2.like(build(small, corpus.tokenizer)), PlainGPT2.loss, native=True)
    # The first loss, before any update, differs by rounding only.
    assert result.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert result.val_loss == pytest.approx(plain.val_loss, abs=0.02)


def test_masked_token_training(small, tmp_path):
    """In this text all tokens are equally frequent, and the neighbours of a token determine it."""
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 900)
    corpus = data.load([tmp_path / "text.txt"], tokenizer="char", masked=True)
    result = train(dataclasses.replace(small, objective="masked-token", steps=400, eval_every=400), corpus)
    assert result.losses[0] == pytest.approx(math.log(11), abs=0.3)
    assert result.val_loss < 0.25 * math.log(9)


def test_bfloat16_has_float32_weights_and_a_similar_loss(trained, small, corpus):
    result = train(dataclasses.replace(small, dtype="bfloat16"), corpus)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert result.losses != trained[0].losses  # bfloat16 was used
    assert result.val_loss == pytest.approx(
        trained[0].val_loss, abs=0.05
    )  # one rounding to bfloat16: 2^-9, about 0.005


@pytest.mark.nightly
def test_bfloat16_loss_curve_equals_that_of_the_baseline(small, corpus):
    """Validation losses differ from the baseline's by less than its standard deviation between seeds."""
    settings = dataclasses.replace(small, dtype="bf16", steps=40, eval_every=20)
    assert settings.dtype == "bfloat16"
    ours, theirs = [], []
    for seed in range(3):
        seeded = dataclasses.replace(settings, seed=seed)
        ours.append([val_loss for _, _, val_loss in train(seeded, corpus).evaluations])
        plain = PlainGPT2.like(build(seeded, corpus.tokenizer))
        theirs.append(
            [val_loss for _, _, val_loss in train(seeded, corpus, plain, PlainGPT2.loss, native=True).evaluations]
        )
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    assert ((ours - theirs).abs() <= theirs.std(0)).all(), f"fastlm {ours}, baseline {theirs}"
    assert (ours[:, 0] - ours[:, 1] > 5 * theirs.std(0)[0]).all()  # and the loss decreases


def test_bfloat16_accumulates_in_float32(small, corpus):
    trainer = Trainer(build(small, corpus.tokenizer), dataclasses.replace(small, dtype="bf16"), NextToken().loss)
    seen = []
    trainer.parallel.loss_function = lambda model, inputs, targets: (
        seen.append(NextToken().loss(model, inputs, targets)) or seen[0]
    )
    hidden = []
    trainer.model.transformer.h[0].mlp.register_forward_hook(lambda module, arguments, result: hidden.append(result))
    trainer.step(*training_batch(corpus.train, small, NextToken(), 0), lr=0.01)
    assert seen[0].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in trainer.parameters)
    assert all(value.dtype == torch.float32 for state in trainer.optimizer.state.values() for value in state.values())
    assert all(result.dtype == torch.bfloat16 for result in hidden)


@pytest.mark.parametrize("native", [False, True])
def test_step_is_adamw_with_clipping_and_decay_of_matrices(small, corpus, native):
    """Compares one step with its formula."""
    settings = dataclasses.replace(small, weight_decay=0.5, grad_clip=0.1)
    model, copy = build(settings, corpus.tokenizer), build(settings, corpus.tokenizer)
    inputs, targets = training_batch(corpus.train, small, NextToken(), 0)
    trainer = Trainer(model, settings, NextToken().loss, native=native)
    assert type(trainer.optimizer) is (torch.optim.AdamW if native else fastlm.optim.AdamW)
    trainer.step(inputs, targets, lr=0.01)
    NextToken().loss(copy.train(), inputs, targets).backward()
    norm = torch.stack([p.grad.square().sum() for p in copy.parameters()]).sum().sqrt()
    assert norm > 0.1
    for after, before in zip(model.parameters(), copy.parameters(), strict=True):
        gradient = before.grad * 0.1 / (norm + 1e-6)
        decayed = before * (1 - 0.01 * 0.5 * (before.dim() >= 2))
        # AdamW's first step: after bias correction both moments equal those of the first gradient.
        torch.testing.assert_close(after, decayed - 0.01 * gradient / (gradient.abs() + 1e-8), rtol=1e-4, atol=1e-5)


def test_schedule(small):
    assert scheduled(small, small.warmup) == small.lr
    assert scheduled(small, small.steps) == small.min_lr
    assert scheduled(dataclasses.replace(small, decay_steps=20), 20) == small.min_lr


def test_diverging_loss_is_an_error(small, corpus):
    with pytest.raises(
        ValueError,
        match=r"lr: expected a learning rate with finite losses and gradients \(10 steps in a row were skipped; "
        r"of step \d+, its loss is (nan|inf); use a smaller one, .*\), got 1e\+30",
    ):
        train(dataclasses.replace(small, lr=1e30, grad_clip=0.0), corpus)


def test_a_skipped_step_is_reported_and_the_run_goes_on(small, corpus):
    """The loss of step 4 is not finite."""
    settings, seen = dataclasses.replace(small, steps=8), []

    def loss(model, inputs, targets):
        loss = NextToken().loss(model, inputs, targets)
        seen.append(model.training)
        return loss * math.inf if model.training and sum(seen) == 4 else loss

    class Steps(Report):
        steps = ()

        def on_step(self, step):
            self.steps = (*self.steps, step)

    report = Steps()
    result = train(settings, corpus, loss=loss, report=report)
    assert result.skipped == [4] and result.steps == 8 and math.isfinite(result.val_loss)
    assert [step.skipped for step in report.steps] == [*[""] * 3, "its loss is inf", *[""] * 4]
    assert all(step.grad_norm > 0 for step in report.steps if not step.skipped)
    assert [step.lr for step in report.steps] == [scheduled(settings, i) for i in range(8)]


@pytest.mark.parametrize(
    "val_losses, stalled",
    [
        ([], False),
        ([3.0, 2.0, 2.0], False),  # one of two evaluations
        ([3.0, 2.0, 2.0, 2.5], True),
        ([3.0, 2.0, 2.1, 1.9], False),
        ([3.0, math.nan, math.nan], True),
        ([math.nan, 3.0, 2.0], False),
    ],
)
def test_has_stalled(val_losses, stalled):
    evaluations = [(i, 0.0, val_loss) for i, val_loss in enumerate(val_losses)]
    assert has_stalled(evaluations, 2) == stalled and not has_stalled(evaluations, 0)


def test_early_stopping(small, corpus):
    settings = dataclasses.replace(small, lr=1e-12, min_lr=0.0, eval_every=2, patience=3)
    result = train(settings, corpus)
    best = min(result.evaluations, key=lambda evaluation: evaluation[2])[0]
    assert result.stopped_early and not result.interrupted
    assert result.steps == result.evaluations[-1][0] == best + 6 < 60


def test_samples_do_not_change_training(trained, small, corpus):
    class Samples(Report):
        samples = ()

        def on_sample(self, step, text):
            self.samples = (*self.samples, (step, text))

    report, settings = Samples(), dataclasses.replace(small, steps=30, sample_every=10)
    result = train(settings, corpus, report=report, sample=lambda model: f"{len(list(model.parameters()))} parameters")
    assert [step for step, _ in report.samples] == [10, 20]
    assert result.losses[:10] == trained[0].losses[:10]


class InterruptingReport(Report):
    def on_step(self, step):
        if step.step == 7:
            os.kill(os.getpid(), signal.SIGINT)


def test_first_interrupt_stops_after_the_current_step(trained, small, corpus):
    before = signal.getsignal(signal.SIGINT)
    result = train(small, corpus, report=InterruptingReport())
    assert result.interrupted and result.steps == 7
    assert result.losses == trained[0].losses[:7]
    assert result.val_loss == result.evaluations[-1][2] and result.evaluations[-1][0] == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_raises():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_set()
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_training_in_a_thread(small, corpus):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(dataclasses.replace(small, steps=2), corpus)))
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_side_by_side_trains_as_train_does(trained, small, corpus):
    model = build_gpt2(small, corpus.tokenizer)
    ours, plain = (
        Trainer(model, small, NextToken().loss),
        Trainer(PlainGPT2.like(model), small, PlainGPT2.loss, native=True),
    )
    batches = ((*training_batch(corpus.train, small, NextToken(), i), scheduled(small, i)) for i in range(6))
    *_, comparison = side_by_side(ours, plain, batches)
    assert [loss for loss, _ in comparison.losses] == trained[0].losses[:6]
    assert len(comparison.ours) == len(comparison.plain) == 6
    assert comparison.ratio.low <= comparison.ratio.median <= comparison.ratio.high
    assert comparison.disagreement < 1e-5
    comparison.losses.append((2.0, 2.5))
    assert comparison.disagreement == 0.2


@pytest.mark.nightly
def test_long_training_reaches_the_loss_of_the_baseline(tmp_path):
    """Validation losses on a megabyte of text differ by at most 0.02 (full length: FASTLM_TEST_STEPS=2000)."""
    steps = int(os.environ.get("FASTLM_TEST_STEPS", 200))
    standard_library = Path(sysconfig.get_path("stdlib"))
    text = "".join(file.read_text("utf-8", "replace") for file in sorted(standard_library.glob("*.py")))[:1_000_000]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    corpus = data.load([tmp_path / "text.txt"], tokenizer="char")
    settings = Settings(
        layers=4,
        heads=4,
        width=128,
        context=64,
        batch=12,
        dropout=0.0,
        steps=steps,
        lr=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        warmup=100,
        eval_every=steps,
    )
    ours = train(settings, corpus)
    plain = train(settings, corpus, PlainGPT2.like(build(settings, corpus.tokenizer)), PlainGPT2.loss, native=True)
    assert ours.val_loss == pytest.approx(plain.val_loss, abs=0.02)
