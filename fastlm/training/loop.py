"""The training loop. It trains fastlm's models and, for comparisons, any other module on the same batches."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastlm.core.errors import Ended
from fastlm.device import choose_device, seed_generator
from fastlm.training.average import Average
from fastlm.training.batches import evaluation_batches, filled, share_of, training_batch
from fastlm.training.checkpoint import Trained
from fastlm.training.checkpoints import LOSSES, Checkpoints, Evaluation, Saved
from fastlm.training.data import Corpus, check_length
from fastlm.training.data.order import dropout_seed
from fastlm.training.distributed import Group
from fastlm.training.guard import Guard
from fastlm.training.models import build, objective_of
from fastlm.training.parallel import check_parallel
from fastlm.training.report import Report, Step
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings
from fastlm.training.stopping import Stopped, stop_requests, until
from fastlm.training.trainer import Trainer, count_of
from fastlm.training.whole import Loss

SAMPLED = "sampled"  # the name of the step of the last sample in a checkpoint


@dataclasses.dataclass
class Result:
    model: nn.Module  # with settings.ema, with the averaged weights
    state: dict[str, Tensor] | None  # of a sharded model, the state dict of all of it in the first process
    train_loss: float
    val_loss: float
    tokens_per_second: float  # of the training steps, without evaluation
    steps: int  # fewer than settings.steps if interrupted or stopped early
    interrupted: bool
    losses: list[float]  # of every step, before the update
    evaluations: list[Evaluation]
    skipped: list[int]  # the steps whose loss or gradient was not learned from
    overflows: list[int]  # the steps in float16 that lowered the scale of the gradients
    stopped_early: bool
    failure: OSError | None = None  # why the last checkpoint could not be saved


def train(
    settings: Settings,
    corpus: Corpus,
    model: nn.Module | None = None,
    loss: Loss | None = None,
    report: Report | None = None,
    *,
    native: bool = False,
    checkpoints: Checkpoints | None = None,
    start: Saved | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    group: Group | None = None,
    device: torch.device | None = None,
) -> Result:
    """Trains a model on a corpus.

    Each process of a process group of PyTorch calls it with the same arguments, and a model with the same weights on
    its device. They divide each batch, and the result is that of one process up to rounding.

    SIGINT (Ctrl-C) and SIGTERM stop training after the current step, those of one process in all; the result is that
    of the steps until then. If there are `checkpoints`, one is saved before the last evaluation. A second signal raises
    KeyboardInterrupt after it.

    The batch of a step is a function of the seed and the number of the step (data/order.py), and so is the dropout of
    each process. All else that the next step depends on is in a checkpoint, so that a run that goes on from it gives
    the same bits.

    Args:
        model: any module, trained on the device it is on; None: a fastlm model for the settings, on a GPU if available.
        loss: (model, inputs, targets) → mean loss of the targets; None: that of settings.objective.
        report: receives progress, in the first process.
        native: use PyTorch's gradient clipping and AdamW.
        checkpoints: where the model is saved, which has to be a Trained; its training_state(), if it has one, is
            saved too. Every settings.checkpoint_every steps and at the end. Of several processes the first one has
            them, or with settings.parallel "fsdp" all.
        start: the checkpoint to go on from, which `model` was loaded from.
        sample: the text that a model generates, every settings.sample_every steps; it draws from no generator that
            training uses.
        group: the processes; None: those of PyTorch's process group, if it is initialised.
        device: where a model is trained whose parts (settings.parallel "fsdp") alone fit there; None: where it is.

    Raises:
        ValueError: settings.max_skipped steps in a row were skipped.
        OSError: a checkpoint could not be saved, in the processes that save one.
        Ended: the same, in the others.
    """
    check_length(corpus, settings.context)
    group = group or Group.current()
    check_parallel(group, batch=settings.batch)
    report = Report() if report is None or group.rank else report
    objective = objective_of(settings, corpus.tokenizer)
    model = build(settings, corpus.tokenizer).to(choose_device()) if model is None else model
    trainer = Trainer(model, settings, loss or objective.loss, native=native, group=group, device=device)
    guard = Guard(settings)
    average = Average(trainer.parallel, settings.ema) if settings.ema else None
    evaluation_pairs = [
        [share_of(group, pair) for pair in evaluation_batches(tokens, settings, objective)]
        for tokens in (corpus.train, corpus.validation)
    ]
    losses: list[float] = []
    evaluations: list[Evaluation] = []
    began = elapsed = 0.0
    sampled = 0  # the step of the last sample
    trainer.warm_up()

    def evaluated_model() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if average is None else average.applied()

    def state() -> dict[str, Tensor]:
        """What is not in the model that is evaluated."""
        own: dict[str, Tensor] = getattr(model, "training_state", dict)()
        return trainer.state() | guard.state() | (average.state() if average is not None else {}) | own

    if start is not None:
        tensors = start.tensors(state())
        losses, evaluations, elapsed = tensors[LOSSES].tolist(), list(start.evaluations), start.seconds
        sampled = int(tensors[SAMPLED])
        trainer.load_state(tensors)
        guard.load_state(tensors, losses)
        if average is not None:
            average.load_state(tensors)
    if checkpoints is not None:
        # Allocates memory: otherwise the first save waits for new pages.
        checkpoints.copy(cast(Trained, model), state(), trainer.parallel.whole_state())
    started = saved = len(losses)  # steps; the losses of the last ones may not have been read yet

    def read() -> None:
        nonlocal elapsed
        if not trainer.pending:
            return
        outcomes = trainer.read()
        seconds = time.perf_counter() - began
        elapsed += seconds
        speed = len(outcomes) * settings.tokens_per_step / seconds
        for outcome in outcomes:
            losses.append(outcome.loss)
            mean = started * settings.tokens_per_step / elapsed
            lr, reason = scheduled(settings, len(losses) - 1), "" if outcome.overflow else outcome.skipped
            report.on_step(
                Step(len(losses), outcome.loss, lr, outcome.grad_norm, speed, mean, reason, outcome.overflow)
            )
            guard.record(len(losses), outcome)

    def evaluate(stopping: Callable[[], bool] | None = None) -> None:
        report.on_evaluation_start()
        with evaluated_model():
            train_loss, val_loss = (trainer.evaluate(until(stopping, pairs)) for pairs in evaluation_pairs)
        evaluations.append((len(losses), train_loss, val_loss))
        report.on_evaluation_end(len(losses), train_loss, val_loss)

    def save() -> None:
        nonlocal saved
        if checkpoints is None or saved == started:
            return
        tensors = {LOSSES: torch.tensor(losses, dtype=torch.float64), SAMPLED: torch.tensor(sampled)}
        metrics = {"seconds": elapsed, "evaluations": list(evaluations), "report": report.on_save()}
        with evaluated_model():
            whole = trainer.parallel.whole_state()
            checkpoints.save(started, cast(Trained, model), state() | tensors, metrics, whole)
        saved = started

    def is_due(interval: int) -> bool:
        return interval > 0 and started % interval == 0 and 0 < started < settings.steps

    interrupted = False
    with stop_requests() as stop:
        while True:
            if is_due(settings.eval_every) and (not evaluations or evaluations[-1][0] != started):
                read()
                with contextlib.suppress(Stopped):
                    evaluate(lambda: group.any(stop.is_set()))
            stopped_early = has_stalled(evaluations, settings.patience)
            if started == settings.steps or stopped_early:
                break
            failed = checkpoints is not None and checkpoints.failed(wait=is_due(settings.checkpoint_every))
            begin = time.perf_counter()
            share = training_batch(corpus.train, settings, objective, started, group.share(settings.batch))
            flags = stop.is_set(), trainer.should_read, failed
            count, (interrupted, reading, failed) = agreed(group, count_of(share[1]), *flags)
            if interrupted:
                break
            if failed:
                if checkpoints is not None:
                    checkpoints.wait()
                raise Ended
            spent = time.perf_counter() - begin
            if sample is not None and is_due(settings.sample_every) and sampled != started:
                read()
                with evaluated_model(), trainer.parallel.whole_model() as whole_model:
                    if whole_model is not None:
                        report.on_sample(started, sample(whole_model))
                sampled = started
            if is_due(settings.checkpoint_every):
                read()
                save()
            if not trainer.pending:
                began = time.perf_counter() - spent
            seed_generator(trainer.device, dropout_seed(settings.seed, started, group.rank))
            trainer.max_loss = guard.max_loss
            trainer.begin_step(*filled(group, settings.batch, share), scheduled(settings, started), count)
            if average is not None:
                average.update()
            started += 1
            if reading:
                read()
        read()
        failure: OSError | None = None
        try:
            save()
            if checkpoints is not None:
                checkpoints.wait()
        except OSError as error:  # the model alone may still fit on the disk
            failure = error
    if not evaluations or evaluations[-1][0] != started:
        evaluate()
    if average is not None:
        average.swap()
    _, train_loss, val_loss = evaluations[-1]
    return Result(
        model=trainer.model,
        state=trainer.parallel.whole_state(),
        train_loss=train_loss,
        val_loss=val_loss,
        tokens_per_second=len(losses) * settings.tokens_per_step / elapsed if elapsed else 0.0,
        steps=len(losses),
        interrupted=interrupted,
        losses=losses,
        evaluations=evaluations,
        skipped=guard.skipped,
        overflows=guard.overflows,
        stopped_early=stopped_early and started < settings.steps,
        failure=failure,
    )


def has_stalled(evaluations: Sequence[Evaluation], patience: int) -> bool:
    """Whether none of the last `patience` evaluations has a lower validation loss than those before; 0: never."""
    if not patience or len(evaluations) <= patience:
        return False
    val_losses = [math.inf if math.isnan(val_loss) else val_loss for _, _, val_loss in evaluations]
    lowest = min(val_losses[:-patience])
    return not any(val_loss < lowest for val_loss in val_losses[-patience:])


def agreed(group: Group, targets: int, *flags: bool) -> tuple[int, list[bool]]:
    """For a step: number of targets of all processes, and for each flag whether it is set in one of them."""
    total, *counts = group.total(targets, *flags)
    return int(total), [count > 0 for count in counts]


def scheduled(settings: Settings, step: int) -> float:
    """The learning rate of step 0, 1, …"""
    return learning_rate(
        step,
        lr=settings.lr,
        min_lr=settings.min_lr,
        warmup=settings.warmup,
        decay_steps=settings.steps if settings.decay_steps is None else settings.decay_steps,
        schedule=settings.schedule,
        decay_fraction=settings.decay_fraction,
    )
