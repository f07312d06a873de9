"""The accuracy of what is timed: at most twice PyTorch's error against float64."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


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
