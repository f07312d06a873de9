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
from fastlm.training.whole import Loss, Objective, Whole, is_sharded, local_of


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


@torch.no_grad()
def fill(x: Any, value: Tensor) -> None:
    """Copies a stored value, whole or sharded, into a tensor of this process, whole or sharded."""
    local = local_of(x)
    if is_sharded(x) and not is_sharded(value):
        size = -(-len(value) // x.device_mesh.size())
        begin = min(len(value), size * dist.get_rank())
        value = value[begin : begin + len(local)]
    local.copy_(local_of(value))


def check_parallel(group: Group, *, batch: int) -> None:
    if batch < group.size:
        raise mismatch("batch", f"at least {group.size}, the number of processes", batch)
