"""How the processes of a run share a model: each has all of it (DDP), or a part of every parameter (FSDP).

The trainer updates `parameters`, plain tensors of this process: of a model that is sharded, the shards.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlm.core.errors import mismatch
from fastlm.training.distributed import Group

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # (model, inputs, targets) → mean loss of the targets


class Whole:
    """A model in one process.

    Attributes:
        parameters: by name, those that are trained.
        factor: what the loss of a process is multiplied by, so that the gradients of all processes add up.
        sharded: whether `parameters` are parts of those of the model.
    """

    factor, sharded = 1, False

    def __init__(self, model: nn.Module, loss: Loss):
        self.model, self.loss_function = model, loss
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss_function(self.model, inputs, targets)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward pass of a micro-batch; with the last one the processes add up gradients."""
        return contextlib.nullcontext()

    def find_unused(self, run: Callable[[], None]) -> None:
        """Before the first step. run: a forward and a backward pass."""

    def collect_gradients(self) -> None:
        """The gradients become those of `parameters`."""

    def clear_gradients(self) -> None:
        """After those of `parameters` were cleared."""

    def end_evaluation(self) -> None:
        """After forward passes without backward passes."""

    def sum_squares(self) -> Callable[[float | Tensor], Tensor] | None:
        """What turns the sum of squares of the gradients of `parameters` into that of the model's gradients."""
        return None

    def stored(self, name: str, x: Tensor) -> Tensor:
        """A tensor of optimiser or average for the parameter with this name, as it is stored in a checkpoint."""
        return x

    def whole_state(self) -> dict[str, Tensor] | None:
        """The state dict of the whole model, in the first process; None: that of the model. A collective call."""
        return None

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module | None]:
        """The whole model in the first process, None in the others. A collective call."""
        yield self.model


class Objective(nn.Module):
    """The model and its loss as one module, whose forward pass DDP and FSDP need."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model, inputs, targets)


class Replicated(Whole):
    """Each process has the model; gradients are added up while the backward pass runs."""

    def __init__(self, model: nn.Module, loss: Loss, group: Group):
        super().__init__(model, loss)
        self.group, self.factor = group, group.size  # DDP divides by the number of processes
        self.objective = replicated(Objective(model, loss))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.objective(inputs, targets)
        return found

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.objective.no_sync()

    def find_unused(self, run: Callable[[], None]) -> None:
        with self.objective.no_sync():
            run()
        if any(p.grad is None for p in self.parameters.values()):  # DDP would wait for it in every step
            self.objective = replicated(self.objective.module, find_unused_parameters=True)
        for p in self.parameters.values():
            p.grad = None

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module | None]:
        yield self.model if self.group.rank == 0 else None


def replicated(objective: nn.Module, **options: Any) -> DistributedDataParallel:
    # Buffers are constants; the option that says so has another name since PyTorch 2.13.
    names = inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"] = False
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, **options)


def parallel(model: nn.Module, loss: Loss, group: Group, kind: str, device: torch.device | None = None) -> Whole:
    """kind: "ddp" or "fsdp", of several processes."""
    if group.size == 1:
        return Whole(model, loss)
    if kind == "ddp":
        return Replicated(model, loss, group)
    from fastlm.training.sharded import Sharded  # takes as long to import as the rest of this package

    return Sharded(model, loss, group, device or next(model.parameters()).device)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the members of its outermost lists of modules."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                visit(child)

    visit(model)
    return found


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(x, "to_local")


def local_of(x: Any) -> Tensor:
    """The part of this process."""
    return x.to_local() if is_sharded(x) else x


@torch.no_grad()
def fill(x: Any, value: Tensor) -> None:
    """Copies a stored value, whole or sharded, into a tensor of this process, whole or sharded."""
    local = local_of(x)
    if is_sharded(x) and not is_sharded(value):
        size = -(-len(value) // x.device_mesh.size())
        begin = min(len(value), size * dist.get_rank())
        value = value[begin : begin + len(local)]
    local.copy_(local_of(value))


def check_parallel(kind: str, group: Group, *, batch: int, lora: int = 0) -> None:
    if batch < group.size:
        raise mismatch("batch", f"at least {group.size}, the number of processes", batch)
    if lora and kind == "fsdp" and group.size > 1:
        raise mismatch("parallel", "ddp with lora", kind)
