"""A model of which each process has a part (FSDP2)."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from fastlm.core.copies import without_data
from fastlm.training.distributed import Group
from fastlm.training.whole import Loss, Objective, Whole, is_sharded, layers_of


class Sharded(Whole):
    """Each process has a part of every parameter and of its state, cut along the first dimension.

    The parameters of a layer are gathered for its forward and again for its backward pass. The model may be on the CPU:
    each layer is cut before the next one is copied to the device.

    A model of which a part only is in its state dict (LoraModel) has merged_model(), which makes the whole model from
    it, and forget_base(), which frees what merged_model() and write_files() need.
    """

    sharded = True

    def __init__(self, model: nn.Module, loss: Loss, group: Group, device: torch.device):
        self.group, self.factor = group, group.size  # FSDP divides by the number of processes
        self.device = device
        self.merged_model: Any = getattr(model, "merged_model", None)
        if self.merged_model is None:
            self.copied = without_data(model)
        elif group.rank:
            cast(Any, model).forget_base()
        mesh = mesh_of(self.device.type, group.size)
        mesh_of("cpu", group.size)  # of the copies for checkpoints, made in all processes at the same time
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        self.objective: Any = fully_shard(Objective(model, loss), mesh=mesh)
        self.model, self.loss_function = model, loss
        self.dtensors: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # They share memory with the parameters of the model.
        self.parameters = {name: nn.Parameter(p.to_local().detach()) for name, p in self.dtensors.items()}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.objective(inputs, targets)
        return found

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        self.objective.set_requires_gradient_sync(last)
        self.objective.set_is_last_backward(last)
        return contextlib.nullcontext()

    def collect_gradients(self) -> None:
        for name, p in self.dtensors.items():
            self.parameters[name].grad = None if p.grad is None else p.grad.to_local()

    def clear_gradients(self) -> None:
        for p in self.dtensors.values():
            p.grad = None

    def end_evaluation(self) -> None:
        self.objective.reshard()  # FSDP leaves the outermost parameters gathered until a backward pass

    def sum_squares(self) -> Callable[[float | Tensor], Tensor]:
        return lambda squares: self.group.add(torch.as_tensor(squares, dtype=torch.float64, device=self.device).clone())

    def stored(self, name: str, x: Tensor) -> Tensor:
        p = self.dtensors[name]
        return sharded_like(p, x) if x.dim() else x

    def whole_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # tied parameters are gathered once
        for name, x in self.model.state_dict(keep_vars=True).items():
            if id(x) not in known:
                gathered = x.detach().full_tensor() if is_sharded(x) else x.detach()
                known[id(x)] = gathered.cpu() if self.group.rank == 0 else x
            found[name] = known[id(x)]
        return found if self.group.rank == 0 else {}

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module | None]:
        state = self.whole_state()
        if self.group.rank:
            yield None
            return
        if self.merged_model is not None:
            yield self.merged_model(state, self.device)
            return
        self.copied.load_state_dict({name: x.to(self.device) for name, x in state.items()}, assign=True)
        try:
            yield self.copied
        finally:
            self.copied = without_data(self.copied)


@functools.cache
def mesh_of(device: str, size: int) -> DeviceMesh:
    return init_device_mesh(device, (size,))


def sharded_like(p: DTensor, local: Tensor) -> DTensor:
    """The tensor of which each process has such a part as of p, on the CPU or on the device of p."""
    mesh = mesh_of(local.device.type, p.device_mesh.size())
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
