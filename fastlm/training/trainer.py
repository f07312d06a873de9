"""A model with its optimiser: training steps and evaluations on the batches of the caller."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.optim import AdamW
from fastlm.training.distributed import Group
from fastlm.training.parallel import fill, parallel
from fastlm.training.settings import Settings
from fastlm.training.whole import Loss, Whole

READ_INTERVAL = 0.2  # seconds between two reads of the losses on a GPU; a read synchronises
FOUND_INF = "found_inf"  # where AdamW, as PyTorch's, finds the flag of a step that is to be skipped
SCALER = "scaler"  # the name of the gradient scaler's state in a checkpoint


class Outcome(NamedTuple):
    """Of a step."""

    loss: float  # before the update
    grad_norm: float  # before clipping; NaN if it was not computed
    skipped: str = ""  # why weights and optimiser state were left as they were
    overflow: bool = False  # skipped because a gradient in float16 overflowed, for which the scale was lowered


class Trainer:
    """A model with its optimiser; runs training steps on the model's device.

    Of several processes each has its share of the sequences of a batch; losses are those of the whole batch. The
    caller provides batches and learning rates. A step whose loss or gradient norm is not finite, or whose loss is
    above max_loss, changes neither the weights nor the optimiser's state.

    Args:
        loss: (model, inputs, targets) → mean loss of the targets that are not negative.
        native: use PyTorch's gradient clipping and fused AdamW, for the baseline; no step is skipped.
        group: the processes that train the model; None: this one alone.
        device: of the parts of a sharded model; None: that of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        loss: Loss,
        *,
        native: bool = False,
        group: Group | None = None,
        device: torch.device | None = None,
    ):
        self.group = group = group or Group()
        self.parallel: Whole = parallel(model, loss, group, settings.parallel, device)
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        self.max_loss = math.inf
        self.pending: list[tuple[Tensor, Tensor | None, float, bool]] = []  # steps since the last read
        self.last_read = time.monotonic()
        parameters = list(self.parallel.parameters.values())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},  # biases and norms are not decayed
        ]
        self.optimizer: torch.optim.Optimizer
        betas = (settings.beta1, settings.beta2)
        if native:
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)
        else:
            clip = settings.grad_clip or torch.finfo(torch.float32).max
            self.optimizer = optimizer = AdamW(
                groups,
                lr=settings.lr,
                betas=betas,
                max_grad_norm=clip,
                skip_nonfinite=True,
                sum_squares=self.parallel.sum_squares(),
            )
            optimizer.begin()
        self.scaler: torch.amp.GradScaler | None = None
        if settings.dtype == "float16":
            kind = self.device.type
            self.scaler = ShardedScaler(kind, group) if self.parallel.sharded else torch.amp.GradScaler(kind)
        self.parameters, self.native = parameters, native

    def state(self) -> dict[str, Tensor]:
        """The optimiser's state by the names of the parameters, and the gradient scaler's."""
        named, state = self.parallel.parameters.items(), self.optimizer.state
        tensors = {
            f"optimizer.{name}.{key}": self.parallel.stored(name, x)
            for name, p in named
            if p in state
            for key, x in state[p].items()
        }
        if self.scaler is not None:
            scaler = self.scaler.state_dict()
            tensors[SCALER] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.state().items():
            if name != SCALER:
                fill(value, tensors[name])
        if self.scaler is not None:
            scale, tracker = tensors[SCALER].tolist()
            own = self.scaler.state_dict()
            self.scaler.load_state_dict(own | {"scale": scale, "_growth_tracker": int(tracker)})

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.dtype != "float32":
            return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.dtype))
        return contextlib.nullcontext()

    def to_device(self, *batch: Tensor) -> list[Tensor]:
        """Copies a batch to the model's device; to a GPU from pinned memory, asynchronously."""
        if self.device.type == "cuda":
            batch = tuple(x.pin_memory() if x.is_cpu else x for x in batch)
        return [x.to(self.device, non_blocking=True) for x in batch]

    def warm_up(self) -> None:
        """On a GPU, runs forward and backward once so that all kernels are compiled before timing starts.

        With several processes it does so on every device, because DDP adds up gradients in another order after its
        first backward pass. Weights do not change.
        """
        if self.device.type == "cpu" and self.group.size == 1:
            return
        count = min(self.settings.at_once, self.group.largest_share(self.settings.batch))
        tokens = torch.zeros((count, self.settings.context), dtype=torch.int64, device=self.device)
        self.model.train()

        def run() -> None:
            with self.autocast():
                loss = self.parallel.loss(tokens, tokens)
            loss.backward()

        self.parallel.find_unused(run)
        with self.parallel.accumulating(True):
            run()
        self.clear_gradients()

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> float:
        """One optimiser step; waits for it and returns the loss before the update."""
        self.begin_step(inputs, targets, lr)
        return self.read()[-1].loss

    def begin_step(self, inputs: Tensor, targets: Tensor, lr: float, whole: int | None = None) -> None:
        """One optimiser step, without waiting for a GPU; read() returns its outcome.

        Args:
            inputs, targets: the share of this process.
            whole: number of targets of all processes; None: those of this one.
        """
        if not self.model.training:  # train() visits every module
            self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.group.add(self.accumulate(inputs, targets, whole))
        self.parallel.collect_gradients()
        norm, overflow = self.update(loss)
        self.clear_gradients()
        self.pending.append((loss, norm, self.max_loss, overflow))

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.parallel.clear_gradients()

    def accumulate(self, inputs: Tensor, targets: Tensor, whole: int | None = None) -> Tensor:
        """Adds up the gradients of the micro-batches, then of all processes; returns this process's part of the loss.

        Micro-batches are weighted by their numbers of targets, so that loss and gradients are those of the whole batch.
        """
        whole = count_of(targets) if whole is None else whole
        total: Tensor | None = None
        parts = list(self.micro_batches(inputs, targets)) or [(inputs, targets, 0)]
        for i, (some_inputs, some_targets, count) in enumerate(parts):
            with self.parallel.accumulating(i == len(parts) - 1):
                with self.autocast():
                    loss = self.parallel.loss(*self.to_device(some_inputs, some_targets))
                if count != whole:
                    loss = loss * (count / whole if whole else math.nan)
                scaled = loss if self.group.size == 1 else loss * self.parallel.factor
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(inputs, targets, number of targets) of at most settings.at_once sequences.

        One without targets is left out. Of several processes, which have to run the same number of passes, it is run
        with arbitrary targets and a count of 0, as the mean loss of no targets is not a number.
        """
        for some, wanted in zip(inputs.split(self.settings.at_once), targets.split(self.settings.at_once), strict=True):
            if count := count_of(wanted):
                yield some, wanted, count
            elif self.group.size > 1:
                yield some, (some if some.dim() == 2 else some[:, 0]), 0

    def update(self, loss: Tensor) -> tuple[Tensor | None, bool]:
        """Updates the weights unless the step is to be skipped; returns the gradient norm and Outcome.overflow."""
        optimizer, scaler = self.optimizer, self.scaler
        if self.native:
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip = self.settings.grad_clip
            norm = nn.utils.clip_grad_norm_(self.parameters, clip) if clip else None
            self.step_optimizer()
            return norm, False
        assert isinstance(optimizer, AdamW)
        if loss.is_cpu:
            if self.refusal(loss.item()):
                return None, False
        elif scaler is None:  # the optimiser skips the step on the device, where the loss is
            setattr(optimizer, FOUND_INF, (~(loss.isfinite() & (loss <= self.max_loss))).float())
        elif self.refusal(loss.item()):  # the scaler has to know
            return None, False
        before = scaler.get_scale() if scaler is not None else 1.0
        try:
            self.step_optimizer()
        finally:
            if scaler is None and hasattr(optimizer, FOUND_INF):
                delattr(optimizer, FOUND_INF)
        # A scale of 1 cannot be what made a gradient overflow.
        return optimizer.grad_norm, scaler is not None and scaler.get_scale() < before and before > 1

    def step_optimizer(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def refusal(self, loss: float, norm: float = 0.0, max_loss: float | None = None) -> str:
        """Why a step with this loss and gradient norm is skipped, or ""."""
        max_loss = self.max_loss if max_loss is None else max_loss
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if loss > max_loss:
            return f"its loss {loss:.4g} is above {max_loss:.4g}"
        return "" if math.isfinite(norm) else f"its gradient norm is {norm}"

    @property
    def should_read(self) -> bool:
        """Whether to read losses now: on a GPU a few times a second, to keep it busy; else after every step.

        The largest accepted loss depends on the losses before.
        """
        return (
            self.device.type != "cuda"
            or self.settings.skip_spikes > 0
            or time.monotonic() - self.last_read >= READ_INTERVAL
        )

    def read(self) -> list[Outcome]:
        """Waits for all steps; returns the outcomes of those since the last read."""
        pending, self.pending, self.last_read = self.pending, [], time.monotonic()
        if not pending:
            return []
        losses = torch.stack([loss for loss, *_ in pending]).tolist()
        known = [norm for _, norm, *_ in pending if norm is not None]
        norms = iter(torch.stack(known).tolist() if known else [])
        outcomes = []
        for loss, (_, norm_tensor, max_loss, overflow) in zip(losses, pending, strict=True):
            norm = math.nan if norm_tensor is None else next(norms)
            refusal = "" if self.native else self.refusal(loss, 0.0 if norm_tensor is None else norm, max_loss)
            outcomes.append(Outcome(loss, norm, refusal, overflow))
        return outcomes

    @torch.no_grad()
    def evaluate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The mean loss over all targets of (inputs, targets) pairs, of which each process has its share."""
        self.model.eval()
        losses, counts = [], []
        try:
            for pair in pairs:
                for inputs, targets, count in self.micro_batches(*pair):
                    counts.append(count)
                    with self.autocast():
                        losses.append(self.parallel.loss(*self.to_device(inputs, targets)))
        finally:
            self.parallel.end_evaluation()
        own = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
        total, number = self.group.total(own, sum(counts))
        return total / number


class ShardedScaler(torch.amp.GradScaler):
    """A gradient that overflows in the part of one process counts in all."""

    def __init__(self, device: str, group: Group):
        super().__init__(device)
        self.group = group

    def _unscale_grads_(self, *arguments: Any, **options: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*arguments, **options)
        for x in found.values():
            self.group.add(x)
        return found


def count_of(targets: Tensor) -> int:
    """Number of positions that are predicted."""
    return int((targets >= 0).sum())
