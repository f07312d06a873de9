"""The wording of errors and the checks of arguments that the operators share."""

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = {Tensor, torch.nn.Parameter}  # isinstance takes 60 ns for a Parameter
INT64 = range(-(2**63), 2**63)
FLOAT32 = torch.finfo(torch.float32)


class Unsupported(RuntimeError):
    """No backend, or not the forced one, supports a call."""


def mismatch(argument: str, expected: str, got: object) -> ValueError:
    """The error for an argument that does not fit; the caller raises it.

    It is built only on failure: formatting a size earlier would specialise the graph on it under torch.compile.
    """
    return ValueError(f"{argument}: expected {expected}, got {got}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """The end of a message about a value that is none of the choices: names the closest one, if any is close."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(str(value).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


class WrongType(TypeError, ValueError):
    """An argument of another type. As for any argument that does not fit, a caller may catch ValueError."""


def wrong_type(argument: str, expected: str, got: object) -> WrongType:
    """The error for an argument of another type; the caller raises it."""
    return WrongType(f"{argument}: expected {expected}, got {shown(got)}")


def shown(value: object) -> str:
    """A value in an error message: scalars, texts and short tuples of them themselves, of other objects the type."""
    if value is None or isinstance(value, bool | float | complex | torch.dtype):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:60]}…")
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"
    if type(value) in TENSORS and isinstance(value, Tensor):
        gradient = " that requires a gradient" if value.requires_grad else ""
        return f"a {value.dtype} tensor of {value.dim()} dimensions{gradient}"
    if type(value) is tuple and len(value) <= 4 and not any(isinstance(item, tuple) for item in value):
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    return type(value).__name__


def check_tensor(argument: str, x: Any) -> None:
    """x must be a tensor with strides: neither sparse nor nested."""
    if type(x) not in TENSORS and not isinstance(x, Tensor):
        raise wrong_type(argument, "a tensor", x)
    if x.layout is not torch.strided or x.is_nested:
        raise mismatch(argument, "a dense tensor", "a nested one" if x.is_nested else f"one of layout {x.layout}")


def check_storage(argument: str, x: Tensor) -> None:
    """The memory of a tensor must hold all of its elements: sharding frees it, and resizing may leave it too short."""
    if x.numel() == 0:
        return
    given = x.untyped_storage().nbytes()
    if x.is_contiguous():
        extent = x.numel()
    else:
        strides = x.stride()
        extent = sum(map(operator.mul, x.shape, strides)) - sum(strides) + 1
    needed = (x.storage_offset() + extent) * x.itemsize
    if given == 0:
        raise mismatch(argument, "a tensor with storage", "one whose storage was freed")
    if given < needed:
        expected = f"a storage of at least {needed} bytes, for its shape and strides"
        raise mismatch(argument, expected, f"one of {given}")


def check_floating(argument: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        supported = f"one of {', '.join(map(str, FLOATING))}"
        raise mismatch(argument, supported if x.dtype.is_floating_point else "a floating-point tensor", x.dtype)


def check_rows(x: Tensor) -> None:
    """x must be (..., width) and floating point."""
    shape = x.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise mismatch("x", "at least one dimension, the last of size 1 or more", tuple(shape))
    check_floating("x", x)


def check_like(argument: str, tensor: Tensor, x: Tensor, name: str = "x") -> None:
    """The tensor must have the dtype and device of x, which the caller knows as `name`."""
    # Two CPU tensors are the common case; comparing devices takes twice as long.
    if tensor.dtype != x.dtype or (not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device):
        raise mismatch(argument, f"{x.dtype} on {x.device}, as {name}", f"{tensor.dtype} on {tensor.device}")


def check_vector(argument: str, tensor: Tensor, size: int, reason: str) -> None:
    shape = tensor.shape
    if len(shape) != 1 or shape[0] != size:
        raise mismatch(argument, f"shape ({size},), {reason}", tuple(shape))


def check_choice(argument: str, value: object, choices: tuple) -> None:
    """The value must be one of the choices and of their type: True is not 1."""
    if isinstance(value, bool) or not isinstance(value, type(choices[0])) or value not in choices:
        raise mismatch(argument, f"one of {', '.join(map(repr, choices))}", shown(value) + did_you_mean(value, choices))


def check_flag(argument: str, value: Any) -> bool:
    """The value as a bool. Other objects are refused: "false" would count as true."""
    if value is True or value is False:
        return value
    if isinstance(value, numpy.bool_ | torch.SymBool):
        return bool(value)
    raise wrong_type(argument, "True or False", value)


def check_number(argument: str, value: Any, expected: str = "a finite number") -> float:
    """The value as a float, which must be finite."""
    if type(value) is not float:
        value = as_float(argument, value, expected)
    if not -math.inf < value < math.inf:
        raise mismatch(argument, expected, value)
    return value


def check_positive(argument: str, value: Any) -> float:
    """The value as a float, which must be positive and finite."""
    value = check_number(argument, value, "a positive number")
    if value <= 0:
        raise mismatch(argument, "a positive number", value)
    return value


def check_float32(argument: str, value: Any) -> float:
    """The value as a float, which must be positive and in the range of float32, in which the kernels take it."""
    value = check_positive(argument, value)
    if not FLOAT32.tiny <= value <= FLOAT32.max:
        raise mismatch(argument, f"a number between {FLOAT32.tiny:.3g} and {FLOAT32.max:.3g}", value)
    return value


def check_softcap(value: Any) -> float:
    """The cap of scores or logits as a float; 0 for None."""
    return 0.0 if value is None else check_float32("softcap", value)


def as_float(argument: str, value: Any, expected: str) -> float:
    if isinstance(value, Tensor):
        gradient = value.requires_grad and torch.is_grad_enabled()  # none would reach it
        if value.dim() != 0 or value.is_complex() or value.is_meta or gradient:
            raise wrong_type(argument, expected, value)
    elif not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat) or isinstance(value, bool):
        raise wrong_type(argument, expected, value)
    try:
        return float(value)
    except OverflowError:
        raise mismatch(argument, expected, shown(value)) from None


def is_iterable(value: object) -> bool:
    """Whether iter() takes the value, which an array of no dimensions refuses although it has __iter__."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def check_path(argument: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise wrong_type(argument, "a path", value)


def check_probability(argument: str, p: Any) -> float:
    """The value as a float in [0, 1)."""
    if type(p) is float and 0 <= p < 1:
        return p
    expected = "a probability in [0, 1)"
    p = check_number(argument, p, expected)
    if not 0 <= p < 1:
        raise mismatch(argument, expected, p)
    return p


def check_integer(argument: str, value: Any, expected: str = "a 64-bit integer", allowed: range = INT64) -> int:
    """The value as an int in a range."""
    if type(value) is not int:
        if isinstance(value, bool | Tensor) or not hasattr(type(value), "__index__"):
            raise wrong_type(argument, expected, value)
        try:
            value = operator.index(value)
        except TypeError:  # an array, say
            raise wrong_type(argument, expected, value) from None
    if value not in allowed:
        raise mismatch(argument, expected, shown(value))
    return value


class Ended(Exception):
    """Another process of the run has raised an error and reported it; this one ends without a message."""
