"""Float32 weights under autocast, which rounds them for one call.

Their gradients are added up in float32: rounded like the weights, as PyTorch hands them out, they would be less exact and cost a pass over memory to become
float32 again. So an autograd.Function takes, after its settings, the originals, which the gradients belong to; the rounded weights have no history.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.boundary import lowered, opaque


def lowered_for(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """x as lowered() gives it; the originals, () where gradients go the ordinary way; the weights, rounded."""
    if opaque(x, *weights) or any(w is not None and w.dtype != torch.float32 for w in weights):
        low, *rounded = lowered(x, *weights)
        return low, (), *rounded
    with torch.no_grad():
        _, *rounded = lowered(x, *weights)
    return *lowered(x), weights, *rounded


def needed_by(ctx: Any, count: int) -> tuple[bool, ...]:
    """Which gradients of the first `count` inputs, x and the weights, are wanted; of the originals, where there are any."""
    return (
        ctx.needs_input_grad[:count]
        if not ctx.originals
        else (ctx.needs_input_grad[0], *ctx.needs_input_grad[1 - count :])
    )


def handed_out(ctx: Any, gradients: Sequence[Tensor | None], settings: int) -> tuple[Tensor | None, ...]:
    """What backward returns: gradients of x and the weights, None for each of the settings; of the originals, where there are any."""
    nothing = (None,) * settings
    return (
        (gradients[0], *(None for _ in ctx.originals), *nothing, *gradients[1:])
        if ctx.originals
        else (*gradients, *nothing)
    )


def of_originals(formula: Callable[..., Tensor], originals: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """The formula of rounded weights as one of their originals, which it rounds."""
    return (
        (lambda x, *weights: formula(x, *(w if w is None else w.to(x.dtype) for w in weights)))
        if originals
        else formula
    )


def given_by(backend: ModuleType, function: str, arguments: tuple, wide: bool) -> Sequence[Tensor | None]:
    """The backend's results; wide: gradients of weights as the sums that they are, where the backend hands them out. (Autograd makes others float32.)"""
    sums = {"wide": True} if wide and hasattr(backend, "GRADIENTS_ARE_SUMS") else {}
    return getattr(backend, function)(*arguments, **sums)
