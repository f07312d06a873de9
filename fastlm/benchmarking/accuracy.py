"""What is timed is right: no further from float64 than twice as far as PyTorch is."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def error_over_theirs(true: Sequence[Tensor], theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """How many times as far from the truth ours are as theirs: root mean squares, relative to each tensor's; over all tensors the geometric mean. Half a unit
    in the last place counts as the least there is, or a single number would be compared with another's luck.
    """

    def relative(x: Tensor, truth: Tensor) -> float:
        return max(rms(x.double() - truth) / max(rms(truth), 1e-30), torch.finfo(x.dtype).eps / 2)

    own, other = (
        statistics.geometric_mean(relative(x, truth) for x, truth in zip(found, true, strict=True))
        for found in (ours, theirs)
    )
    return own / other


def checked(error: float, what: str) -> float:
    """The error that it is given; ArithmeticError where it is more than twice PyTorch's."""
    if not error <= 2:
        raise ArithmeticError(f"{what}: {error:.2f} times PyTorch's own error, more than twice")
    return error
