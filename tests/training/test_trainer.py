import dataclasses
import math

import pytest
import torch

from fastlm.training import data
from fastlm.training.batches import training_batch
from fastlm.training.models import build, objective_of
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer

SETTINGS = Settings(layers=1, heads=2, width=32, context=16, batch=7)


@pytest.fixture(scope="module", params=["next-token", "masked-token"])
def problem(request, text_file):
    """Settings, corpus and a batch."""
    masked = request.param == "masked-token"
    corpus = data.load([text_file], tokenizer="char", masked=masked)
    settings = dataclasses.replace(SETTINGS, objective=request.param)
    objective = objective_of(settings, corpus.tokenizer)
    return settings, corpus, training_batch(corpus.train, settings, objective, 0)


def trainer_of(settings, corpus, **arguments):
    loss = objective_of(settings, corpus.tokenizer).loss
    return Trainer(build(settings, corpus.tokenizer), settings, loss, **arguments)


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
@pytest.mark.parametrize("native", [False, True])
def test_micro_batches_have_the_loss_and_gradients_of_the_batch(problem, micro_batch, native):
    """Weighted by the number of targets: masked windows differ in it, and the last micro-batch is smaller."""
    settings, corpus, batch = problem
    whole = trainer_of(settings, corpus, native=native)
    parts = trainer_of(dataclasses.replace(settings, micro_batch=micro_batch), corpus, native=native)
    losses = [trainer.accumulate(*batch).item() for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for p, q in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert parts.evaluate([batch]) == pytest.approx(whole.evaluate([batch]), rel=1e-6)


def test_micro_batches_without_targets_do_not_count(problem):
    settings, corpus, (inputs, targets) = problem
    targets = targets.clone()
    targets[3:] = -100
    settings = dataclasses.replace(settings, micro_batch=3)
    trainer = trainer_of(settings, corpus)
    loss = trainer.accumulate(inputs, targets).item()
    assert loss == pytest.approx(trainer_of(settings, corpus).accumulate(inputs[:3], targets[:3]).item(), rel=1e-6)


def test_float16(problem):
    """The losses are those of float32 within rounding to 11 bits; a gradient that overflows lowers the scale."""
    settings, corpus, batch = problem
    half, full = trainer_of(dataclasses.replace(settings, dtype="fp16"), corpus), trainer_of(settings, corpus)
    for _ in range(5):
        assert half.step(*batch, lr=1e-3) == pytest.approx(full.step(*batch, lr=1e-3), rel=2e-3)
    assert half.scaler.get_scale() == 2.0**16
    assert all(p.dtype == torch.float32 for p in half.parameters)
    before = weights(half)
    half.scaler.load_state_dict(half.scaler.state_dict() | {"scale": 2.0**126})
    half.begin_step(*batch, lr=1e-3)
    (outcome,) = half.read()
    assert outcome.overflow and half.scaler.get_scale() == 2.0**125
    assert all(torch.equal(a, b) for a, b in zip(weights(half), before, strict=True))


def spoiled(trainer, kind):
    """The loss or only its gradient is not finite."""
    loss_of = trainer.parallel.loss_function

    def loss(model, inputs, targets):
        loss = loss_of(model, inputs, targets)
        p = trainer.parameters[-1]
        return {"loss": loss * math.inf, "gradient": loss + (0 * p.sum()).sqrt(), "spike": loss}[kind]

    trainer.parallel.loss_function = loss


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(
    "kind, reason", [("loss", "its loss is inf"), ("gradient", "its gradient norm is"), ("spike", "is above 0.5")]
)
def test_a_skipped_step_changes_nothing(problem, kind, reason, clip, dtype):
    settings, corpus, batch = problem
    trainer = trainer_of(dataclasses.replace(settings, grad_clip=clip, dtype=dtype), corpus)
    trainer.step(*batch, lr=1e-3)
    before = weights(trainer), [x.clone() for name, x in trainer.state().items() if name != "scaler"]
    spoiled(trainer, kind)
    trainer.max_loss = 0.5 if kind == "spike" else math.inf
    trainer.begin_step(*batch, lr=1e-3)
    (outcome,) = trainer.read()
    assert reason in outcome.skipped
    after = weights(trainer), [x for name, x in trainer.state().items() if name != "scaler"]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert all(p.grad is None for p in trainer.parameters)
