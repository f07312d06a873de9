"""The wording of errors and the checks of arguments that the operators share."""

import difflib
from collections.abc import Iterable

from torch import Tensor


class Unsupported(RuntimeError):
    """No backend, or not the forced one, supports a call."""


def mismatch(argument: str, expected: str, got: object) -> ValueError:
    """The error for an argument that does not fit; the caller raises it.

    It is built only on failure: formatting a size earlier would specialise the graph on it under torch.compile.
    """
    return ValueError(f"{argument}: expected {expected}, got {got}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """The end of a message about a value that is none of the choices: names the closest one, if any is close."""
    found = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def check_rows(x: Tensor) -> None:
    """x must be (..., width) and floating point."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise mismatch("x", "at least one dimension, the last of size 1 or more", tuple(x.shape))
    if not x.dtype.is_floating_point:
        raise mismatch("x", "a floating-point tensor", x.dtype)


def check_like(argument: str, tensor: Tensor, x: Tensor, name: str = "x") -> None:
    """The tensor must have the dtype and device of x, which the caller knows as `name`."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise mismatch(argument, f"{x.dtype} on {x.device}, as {name}", f"{tensor.dtype} on {tensor.device}")


def check_vector(argument: str, tensor: Tensor, size: int, reason: str) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise mismatch(argument, f"shape ({size},), {reason}", tuple(tensor.shape))


def check_choice(argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        expected = f"one of {', '.join(map(repr, choices))}"
        raise mismatch(argument, expected, f"{value!r}{did_you_mean(value, choices)}")


def check_probability(argument: str, p: float) -> None:
    if not 0 <= p < 1:
        raise mismatch(argument, "a probability in [0, 1)", p)
