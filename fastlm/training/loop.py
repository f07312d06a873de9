"""The training loop: the same settings and corpus give the same model, whichever module computes it."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.device import choose_device
from fastlm.ops.boundary import mismatch
from fastlm.optim import AdamW
from fastlm.training.data import Corpus, check_length, random_windows, spread_windows
from fastlm.training.models import build, objective_of
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of a model on (inputs, targets)

READ_EVERY = 0.2  # seconds between readings of the loss on a GPU


class Trainer:
    """A model, its optimiser and one step, on the device that the model is on; where the rate and the batches come from is the caller's affair.

    native: with PyTorch's own clipping and fused AdamW, for what fastlm is compared with.
    """

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, *, native: bool = False):
        self.model, self.settings, self.loss = model, settings, loss
        self.device = next(model.parameters()).device
        self.unread: list[Tensor] = []  # losses of the steps that were begun since the last reading
        self.last_read = time.monotonic()
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {
                "params": [p for p in parameters if p.dim() < 2],
                "weight_decay": 0.0,
            },  # biases and norms: decay would pull them to 0, where they are not at home
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

    def autocast(self) -> contextlib.AbstractContextManager:
        return (
            torch.autocast(self.device.type, dtype=torch.bfloat16)
            if self.settings.dtype == "bfloat16"
            else contextlib.nullcontext()
        )

    def placed(self, *batch: Tensor) -> list[Tensor]:
        """On the model's device. To a GPU from memory that is pinned, so that nobody waits for the copy."""
        if self.device.type == "cuda":
            batch = tuple(x.pin_memory() if x.is_cpu else x for x in batch)
        return [x.to(self.device, non_blocking=True) for x in batch]

    def warm_up(self) -> None:
        """Where kernels are compiled when they are first called, on anything but a CPU, they are called before a clock runs. No weight or gradient changes."""
        if self.device.type == "cpu":
            return
        tokens = torch.zeros((self.settings.batch, self.settings.context), dtype=torch.int64, device=self.device)
        with self.autocast():
            loss = self.loss(self.model.train(), tokens, tokens)
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> float:
        """One update of the weights, waited for; returns the loss before it."""
        self.begin_step(inputs, targets, lr)
        return self.read()[-1]

    def begin_step(self, inputs: Tensor, targets: Tensor, lr: float) -> None:
        """One update of the weights, for which a GPU is not waited for; read() has the loss before it."""
        if not self.model.training:  # which walks over all of its modules
            self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self.placed(inputs, targets)
        with self.autocast():
            loss = self.loss(self.model, inputs, targets)
        loss.backward()
        if self.native and self.settings.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.unread.append(loss.detach())

    @property
    def due(self) -> bool:
        """Whether to read now: on a CPU after every step; a GPU would stand idle after each, so there a few times a second."""
        return self.device.type != "cuda" or time.monotonic() - self.last_read >= READ_EVERY

    def read(self) -> list[float]:
        """The losses of the steps begun since the last time, for all of which it waits."""
        losses = torch.stack(self.unread).tolist() if self.unread else []
        self.unread, self.last_read = [], time.monotonic()
        return losses

    @torch.no_grad()
    def evaluate(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """The mean loss over all targets of the pairs."""
        self.model.eval()
        losses, counts = [], []
        for inputs, targets in pairs:
            counts.append(int((targets >= 0).sum()))
            inputs, targets = self.placed(inputs, targets)
            with self.autocast():
                losses.append(self.loss(self.model, inputs, targets))
        return sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True)) / sum(counts)


@dataclasses.dataclass
class Result:
    model: nn.Module
    train_loss: float
    val_loss: float
    tokens_per_second: float  # of the training steps alone
    steps: int  # fewer than asked for when interrupted
    interrupted: bool
    losses: list[float]  # of every step's batch, before its update
    evaluations: list[tuple[int, float, float]]  # (steps taken, train loss, validation loss)


class Report:
    """What the loop tells while it runs; a progress bar overrides what it shows."""

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None: ...

    def evaluating(self) -> None: ...

    def evaluated(self, step: int, train_loss: float, val_loss: float) -> None: ...


def train(
    settings: Settings,
    corpus: Corpus,
    model: nn.Module | None = None,
    loss: Loss | None = None,
    report: Report | None = None,
    *,
    native: bool = False,
) -> Result:
    """Train a fastlm model of the size that the settings give, on the GPU where there is one; or `model`, any module, where it is, with
    `loss(model, inputs, targets)`, on the same batches; native: with PyTorch's own clipping and optimiser.

    Ctrl-C ends it after the running step, with the losses and weights of what was learnt so far; a second Ctrl-C ends it at once.
    """
    check_length(corpus, settings.context)
    report = report or Report()
    objective = objective_of(settings, corpus.tokenizer)
    trainer = Trainer(
        model or build(settings, corpus.tokenizer).to(choose_device()), settings, loss or objective.loss, native=native
    )
    length = settings.context + 1
    draw = torch.Generator().manual_seed(settings.seed)
    held = [
        [
            objective.pairs(w, torch.Generator().manual_seed(i))
            for i, w in enumerate(spread_windows(ids, length, settings.batch))
        ]
        for ids in (corpus.train, corpus.validation)
    ]
    begun = 0  # steps, of which the last losses may still be unread
    losses: list[float] = []
    evaluations: list[tuple[int, float, float]] = []
    start = spent = 0.0

    def read() -> None:
        nonlocal spent
        if not trainer.unread:
            return
        values = trainer.read()
        spent += time.perf_counter() - start
        for loss in values:
            losses.append(loss)
            if loss != loss or loss == float("inf"):
                raise mismatch(
                    "lr",
                    f"one at which the loss stays finite (it is {loss} at step {len(losses)}: try a smaller one)",
                    settings.lr,
                )
            report.stepped(len(losses), loss, begun * settings.tokens_per_step / spent)

    def evaluate() -> None:
        report.evaluating()
        train_loss, val_loss = (trainer.evaluate(pairs) for pairs in held)
        evaluations.append((len(losses), train_loss, val_loss))
        report.evaluated(len(losses), train_loss, val_loss)

    trainer.warm_up()
    torch.manual_seed(settings.seed)  # dropout's
    with stop_requests() as stop:
        while begun < settings.steps and not stop.is_set():
            if not trainer.unread:
                start = time.perf_counter()
            inputs, targets = objective.pairs(random_windows(corpus.train, length, settings.batch, draw), draw)
            trainer.begin_step(inputs, targets, scheduled(settings, begun))
            begun += 1
            evaluating = begun % settings.eval_every == 0 and begun < settings.steps
            if trainer.due or evaluating:
                read()
            if evaluating and not stop.is_set():
                evaluate()
        read()
        interrupted = stop.is_set()
        evaluate()
    _, train_loss, val_loss = evaluations[-1]
    return Result(
        model=trainer.model,
        train_loss=train_loss,
        val_loss=val_loss,
        tokens_per_second=len(losses) * settings.tokens_per_step / spent if spent else 0.0,
        steps=len(losses),
        interrupted=interrupted,
        losses=losses,
        evaluations=evaluations,
    )


def scheduled(settings: Settings, step: int) -> float:
    decay_steps = settings.steps if settings.decay_steps is None else settings.decay_steps
    return learning_rate(step, lr=settings.lr, min_lr=settings.min_lr, warmup=settings.warmup, decay_steps=decay_steps)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that no step is torn in the middle; the second raises KeyboardInterrupt as always."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield stop
        return
    usual = signal.getsignal(signal.SIGINT)

    def request(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)
