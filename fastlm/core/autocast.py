"""What torch.autocast does to an operator's inputs, done once, by the rules of the PyTorch operator that it replaces.

Under autocast on a CPU the operators with weights round float32 weights for the one call. The gradients of these
weights are accumulated in float32: rounded like the weights, as PyTorch returns them, they would be less accurate and
cost a pass over memory to convert. So an autograd.Function takes, after its other inputs, the original float32 weights,
to which the gradients belong; the rounded copies have no autograd history.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm.core.tracing import needs_custom_op


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device. (PyTorch raises for the meta device.)"""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Every floating-point tensor in the autocast dtype of x's device, except float64: as for a matrix product."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        t.to(dtype) if t is not None and t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in (x, *others)
    ]


def cast_with_originals(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """(x cast, originals, *weights cast). originals is () where gradients take the ordinary path through the casts."""
    if needs_custom_op(x, *weights) or any(w is not None and w.dtype != torch.float32 for w in weights):
        cast, *rounded = cast_for_autocast(x, *weights)
        return cast, (), *rounded
    with torch.no_grad():
        _, *rounded = cast_for_autocast(x, *weights)
    return *cast_for_autocast(x), weights, *rounded


def no_autocast(function: Callable) -> Callable:
    """Disable autocast inside: the operator has cast its inputs once, and products in here must not cast them again.

    The first argument is a tensor or a call, which is a tuple with tensors in it.
    """

    @functools.wraps(function)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(first, *args, **kwargs)
        tensor = first if isinstance(first, Tensor) else next(x for x in first if isinstance(x, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return call
