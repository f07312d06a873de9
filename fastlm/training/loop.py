"""The training loop. It trains fastlm's models and, for comparisons, any other module on the same batches."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlm.core.errors import mismatch
from fastlm.device import choose_device
from fastlm.models.base import PretrainedModel
from fastlm.optim import AdamW
from fastlm.training.batches import evaluation_batches, training_batch
from fastlm.training.checkpoints import Checkpoints, Evaluation, Saved
from fastlm.training.data import Corpus, check_length
from fastlm.training.models import build, objective_of
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings

T = TypeVar("T")
Loss = Callable[[Any, Tensor, Tensor], Tensor]  # (model, inputs, targets) → loss

LOSSES = "losses"  # the name of their tensor in a checkpoint
READ_INTERVAL = 0.2  # seconds between two reads of the losses on a GPU; a read synchronises


class Trainer:
    """A model with its optimiser; runs training steps on the model's device.

    The caller provides batches and learning rates.

    Args:
        loss: (model, inputs, targets) → loss.
        native: use PyTorch's gradient clipping and fused AdamW, for the baseline.
    """

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, *, native: bool = False):
        self.model, self.settings, self.loss = model, settings, loss
        self.device = next(model.parameters()).device
        self.pending_losses: list[Tensor] = []  # of the steps since the last read
        self.last_read = time.monotonic()
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},  # biases and norms are not decayed
        ]
        self.optimizer: torch.optim.Optimizer
        betas = (settings.beta1, settings.beta2)
        if native:
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)
        else:
            self.optimizer = optimizer = AdamW(
                groups, lr=settings.lr, betas=betas, max_grad_norm=settings.grad_clip or None
            )
            optimizer.begin()
        self.parameters, self.native = parameters, native

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's state by the names of the parameters."""
        named, state = self.model.named_parameters(), self.optimizer.state
        return {f"optimizer.{name}.{key}": value for name, p in named if p in state for key, value in state[p].items()}

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.optimizer_state().items():
            value.copy_(tensors[name])

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.dtype == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def to_device(self, *batch: Tensor) -> list[Tensor]:
        """Copies a batch to the model's device; to a GPU from pinned memory, asynchronously."""
        if self.device.type == "cuda":
            batch = tuple(x.pin_memory() if x.is_cpu else x for x in batch)
        return [x.to(self.device, non_blocking=True) for x in batch]

    def warm_up(self) -> None:
        """On a GPU, runs forward and backward once so that all kernels are compiled before timing starts.

        Weights and gradients do not change.
        """
        if self.device.type == "cpu":
            return
        tokens = torch.zeros((self.settings.batch, self.settings.context), dtype=torch.int64, device=self.device)
        with self.autocast():
            loss = self.loss(self.model.train(), tokens, tokens)
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> float:
        """One optimiser step; waits for it and returns the loss before the update."""
        self.begin_step(inputs, targets, lr)
        return self.read()[-1]

    def begin_step(self, inputs: Tensor, targets: Tensor, lr: float) -> None:
        """One optimiser step, without waiting for a GPU; read() returns its loss."""
        if not self.model.training:  # train() visits every module
            self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self.to_device(inputs, targets)
        with self.autocast():
            loss = self.loss(self.model, inputs, targets)
        loss.backward()
        if self.native and self.settings.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending_losses.append(loss.detach())

    @property
    def should_read(self) -> bool:
        """Whether to read losses now: on a CPU after every step; on a GPU a few times a second, to keep it busy."""
        return self.device.type != "cuda" or time.monotonic() - self.last_read >= READ_INTERVAL

    def read(self) -> list[float]:
        """Waits for all steps; returns the losses of those since the last read."""
        losses = torch.stack(self.pending_losses).tolist() if self.pending_losses else []
        self.pending_losses, self.last_read = [], time.monotonic()
        return losses

    @torch.no_grad()
    def evaluate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The mean loss over all targets of (inputs, targets) pairs."""
        self.model.eval()
        losses, counts = [], []
        for inputs, targets in pairs:
            counts.append(int((targets >= 0).sum()))
            inputs, targets = self.to_device(inputs, targets)
            with self.autocast():
                losses.append(self.loss(self.model, inputs, targets))
        return sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True)) / sum(counts)


@dataclasses.dataclass
class Result:
    model: nn.Module
    train_loss: float
    val_loss: float
    tokens_per_second: float  # of the training steps, without evaluation
    steps: int  # fewer than settings.steps if interrupted
    interrupted: bool
    losses: list[float]  # of every step, before the update
    evaluations: list[Evaluation]
    failure: OSError | None = None  # why the last checkpoint could not be saved


class Report:
    """Callbacks of the training loop; a progress bar overrides them."""

    def on_step(self, step: int, loss: float, tokens_per_second: float) -> None: ...

    def on_evaluation_start(self) -> None: ...

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None: ...


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
) -> Result:
    """Trains a model on a corpus.

    SIGINT (Ctrl-C) and SIGTERM stop training after the current step; the result is that of the steps until then. If
    there are `checkpoints`, one is saved before the last evaluation. A second signal raises KeyboardInterrupt after it.

    The batch of a step is a function of the seed and the number of the step (data/order.py). All else that the next
    step depends on is in a checkpoint, so that a run that goes on from it gives the same bits.

    Args:
        model: any module, trained on the device it is on; None: a fastlm model for the settings, on a GPU if available.
        loss: (model, inputs, targets) → loss; None: that of settings.objective.
        report: receives progress.
        native: use PyTorch's gradient clipping and AdamW.
        checkpoints: where fastlm's models are saved, every settings.checkpoint_every steps and at the end.
        start: the checkpoint to go on from, which `model` was loaded from.
    """
    check_length(corpus, settings.context)
    report = report or Report()
    objective = objective_of(settings, corpus.tokenizer)
    model = model or build(settings, corpus.tokenizer).to(choose_device())
    trainer = Trainer(model, settings, loss or objective.loss, native=native)
    evaluation_pairs = [
        list(evaluation_batches(tokens, settings, objective)) for tokens in (corpus.train, corpus.validation)
    ]
    losses: list[float] = []
    evaluations: list[Evaluation] = []
    began = elapsed = 0.0
    trainer.warm_up()
    torch.manual_seed(settings.seed)  # for dropout
    if start is not None:
        tensors = start.tensors()
        losses, evaluations, elapsed = tensors[LOSSES].tolist(), list(start.evaluations), start.seconds
        trainer.load_optimizer_state(tensors)
        set_generator_states(trainer.device, tensors)
    if checkpoints is not None:
        checkpoints.copy(model, trainer.optimizer_state())  # allocates: otherwise the first save waits for new pages
    started = saved = len(losses)  # steps; the losses of the last ones may not have been read yet

    def read() -> None:
        nonlocal elapsed
        if not trainer.pending_losses:
            return
        values = trainer.read()
        elapsed += time.perf_counter() - began
        for loss in values:
            losses.append(loss)
            if loss != loss or loss == float("inf"):
                expected = f"a learning rate with a finite loss (at step {len(losses)} it is {loss}; use a smaller one)"
                raise mismatch("lr", expected, settings.lr)
            report.on_step(len(losses), loss, started * settings.tokens_per_step / elapsed)

    def evaluate(stop: threading.Event | None = None) -> None:
        report.on_evaluation_start()
        train_loss, val_loss = (trainer.evaluate(until(stop, pairs)) for pairs in evaluation_pairs)
        evaluations.append((len(losses), train_loss, val_loss))
        report.on_evaluation_end(len(losses), train_loss, val_loss)

    def save() -> None:
        nonlocal saved
        if checkpoints is None or saved == started:
            return
        tensors = trainer.optimizer_state() | generator_states(trainer.device)
        tensors[LOSSES] = torch.tensor(losses, dtype=torch.float64)
        assert isinstance(model, PretrainedModel)
        checkpoints.save(started, model, tensors, {"seconds": elapsed, "evaluations": list(evaluations)})
        saved = started

    def is_due(interval: int) -> bool:
        return interval > 0 and started % interval == 0 and 0 < started < settings.steps

    with stop_requests() as stop:
        while True:
            if is_due(settings.eval_every) and (not evaluations or evaluations[-1][0] != started):
                read()
                with contextlib.suppress(Stopped):
                    evaluate(stop)
            if started == settings.steps or stop.is_set():
                break
            if is_due(settings.checkpoint_every):
                read()
                save()
            if not trainer.pending_losses:
                began = time.perf_counter()
            inputs, targets = training_batch(corpus.train, settings, objective, started)
            trainer.begin_step(inputs, targets, scheduled(settings, started))
            started += 1
            if trainer.should_read:
                read()
            if checkpoints is not None:
                checkpoints.check()
        read()
        failure: OSError | None = None
        try:
            save()
            if checkpoints is not None:
                checkpoints.wait()
        except OSError as error:  # the model alone may still fit on the disk
            failure = error
    evaluate()
    _, train_loss, val_loss = evaluations[-1]
    return Result(
        model=trainer.model,
        train_loss=train_loss,
        val_loss=val_loss,
        tokens_per_second=len(losses) * settings.tokens_per_step / elapsed if elapsed else 0.0,
        steps=len(losses),
        interrupted=stop.is_set() and started < settings.steps,
        losses=losses,
        evaluations=evaluations,
        failure=failure,
    )


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators, from which dropout draws."""
    states = {"random.cpu": torch.get_rng_state()}
    return states | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if device.type == "cuda" and "random.cuda" in states:  # not if the run was started on a CPU
        torch.cuda.set_rng_state(states["random.cuda"], device)


def scheduled(settings: Settings, step: int) -> float:
    decay_steps = settings.steps if settings.decay_steps is None else settings.decay_steps
    return learning_rate(step, lr=settings.lr, min_lr=settings.min_lr, warmup=settings.warmup, decay_steps=decay_steps)


class Stopped(Exception):
    """An evaluation was ended early."""


def until(stop: threading.Event | None, items: Iterable[T]) -> Iterator[T]:
    """The items; raises Stopped as soon as the event is set."""
    for item in items:
        if stop is not None and stop.is_set():
            raise Stopped
        yield item


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that SIGINT (Ctrl-C) and SIGTERM set. After a second one the block raises KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop
        return
    received = 0

    def handle(number: int, frame: object) -> None:
        nonlocal received
        received += 1
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received > 1:
        raise KeyboardInterrupt
