"""A model in one process, and what the ways to share a model between processes have in common."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

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
