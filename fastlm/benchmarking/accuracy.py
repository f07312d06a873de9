"""The accuracy of what is timed: at most twice PyTorch's error against float64."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def relative_to_baseline(true: Sequence[Tensor], baseline: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """Our error over the baseline's: the geometric mean over all tensors of relative root mean square errors.

    An error counts as half a unit in the last place at least: single numbers are exact by chance.
    """

    def relative_error(x: Tensor, truth: Tensor) -> float:
        return max(rms(x.double() - truth) / max(rms(truth), 1e-30), torch.finfo(x.dtype).eps / 2)

    own, other = (
        statistics.geometric_mean(relative_error(x, truth) for x, truth in zip(found, true, strict=True))
        for found in (ours, baseline)
    )
    return own / other


def checked(error: float, what: str) -> float:
    """The error; ArithmeticError if it is more than twice PyTorch's."""
    if not error <= 2:
        raise ArithmeticError(f"{what}: {error:.2f} times PyTorch's own error, more than twice")
    return error


class KeepFloat64(TorchFunctionMode):
    """Casts of float64 tensors to float32, as in transformers' norms and softmax, do nothing.

    Integers, as those of positions, become float64.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if function is Tensor.float and isinstance(first, Tensor) and not first.dtype.is_floating_point:
            return first.double()
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if function is Tensor.float:
                return first
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)
