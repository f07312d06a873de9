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

from fastlm.ops.boundary import mismatch
from fastlm.optim import AdamW
from fastlm.training.data import Corpus, check_length, random_windows, spread_windows
from fastlm.training.models import build, objective_of
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of a model on (inputs, targets)


class Trainer:
    """A model, its optimiser and one step; where the rate and the batches come from is the caller's affair.

    native: with PyTorch's own clipping and fused AdamW, for what fastlm is compared with.
    """

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, *, native: bool = False):
        self.model, self.settings, self.loss = model, settings, loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},  # biases and norms: decay would pull them to 0, where they are not at home
        ]
        self.optimizer: torch.optim.Optimizer
        betas = (settings.beta1, settings.beta2)
        if native:
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)
        else:
            self.optimizer = optimizer = AdamW(groups, lr=settings.lr, betas=betas, max_grad_norm=settings.grad_clip or None)
            optimizer.begin()
        self.parameters, self.native = parameters, native

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.settings.dtype == "bfloat16" else contextlib.nullcontext()

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> float:
        """One update of the weights; returns the loss before it."""
        if not self.model.training:  # which walks over all of its modules
            self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast():
            loss = self.loss(self.model, inputs, targets)
        loss.backward()
        if self.native and self.settings.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def evaluate(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """The mean loss over all targets of the pairs."""
        self.model.eval()
        total, count = 0.0, 0
        for inputs, targets in pairs:
            predicted = int((targets >= 0).sum())
            with self.autocast():
                total += self.loss(self.model, inputs, targets).item() * predicted
            count += predicted
        return total / count


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
    settings: Settings, corpus: Corpus, model: nn.Module | None = None, loss: Loss | None = None, report: Report | None = None, *, native: bool = False
) -> Result:
    """Train a fastlm model of the size that the settings give; or `model`, any module, with `loss(model, inputs, targets)`, on the same batches;
    native: with PyTorch's own clipping and optimiser.

    Ctrl-C ends it after the running step, with the losses and weights of what was learnt so far; a second Ctrl-C ends it at once.
    """
    check_length(corpus, settings.context)
    report = report or Report()
    objective = objective_of(settings, corpus.tokenizer)
    trainer = Trainer(model or build(settings, corpus.tokenizer), settings, loss or objective.loss, native=native)
    length = settings.context + 1
    draw = torch.Generator().manual_seed(settings.seed)
    held = [
        [objective.pairs(w, torch.Generator().manual_seed(i)) for i, w in enumerate(spread_windows(ids, length, settings.batch))]
        for ids in (corpus.train, corpus.validation)
    ]
    losses: list[float] = []
    evaluations: list[tuple[int, float, float]] = []
    spent = 0.0

    def evaluate() -> None:
        report.evaluating()
        train_loss, val_loss = (trainer.evaluate(pairs) for pairs in held)
        evaluations.append((len(losses), train_loss, val_loss))
        report.evaluated(len(losses), train_loss, val_loss)

    torch.manual_seed(settings.seed)  # dropout's
    with stop_requests() as stop:
        while len(losses) < settings.steps and not stop.is_set():
            start = time.perf_counter()
            inputs, targets = objective.pairs(random_windows(corpus.train, length, settings.batch, draw), draw)
            lr = scheduled(settings, len(losses))
            losses.append(trainer.step(inputs, targets, lr))
            spent += time.perf_counter() - start
            if losses[-1] != losses[-1] or losses[-1] == float("inf"):
                raise mismatch("lr", f"one at which the loss stays finite (it is {losses[-1]} at step {len(losses)}: try a smaller one)", settings.lr)
            report.stepped(len(losses), losses[-1], len(losses) * settings.tokens_per_step / spent)
            if len(losses) % settings.eval_every == 0 and len(losses) < settings.steps and not stop.is_set():
                evaluate()
        interrupted = stop.is_set()
        evaluate()
    _, train_loss, val_loss = evaluations[-1]
    return Result(
        model=trainer.model, train_loss=train_loss, val_loss=val_loss, tokens_per_second=len(losses) * settings.tokens_per_step / spent if spent else 0.0,
        steps=len(losses), interrupted=interrupted, losses=losses, evaluations=evaluations,
    )  # fmt: skip


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
