"""Wrong values of an argument, made from its type hint and a value that is right."""

import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

Values = Iterator[tuple[str, Callable[[], Any]]]  # (what is wrong, a function that makes the value)

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself; of a generic type its origin."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for member in typing.get_args(hint) for kind in kinds_of(member))
    return (typing.get_origin(hint) or hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a hint's types. A bool is no number, and a number is no bool."""
    return any(fits_kind(value, kind) for kind in kinds_of(hint))


def fits_kind(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is bool:
        return isinstance(value, bool | numpy.bool_)
    if kind in (int, float) and isinstance(value, bool | numpy.bool_):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and not value.is_complex()
        return (isinstance(value, numbers.Real) or scalar) and -math.inf < value < math.inf
    if kind is Tensor:
        return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested and has_memory(value)
    if kind is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, kind) if isinstance(kind, type) else True


def has_memory(x: Tensor) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or x.untyped_storage().nbytes() >= (x.storage_offset() + last + 1) * x.element_size()


def wrong_values(hint: Any, right: Any) -> Values:
    kinds = kinds_of(hint)
    if Tensor in kinds and isinstance(right, Tensor):
        yield from wrong_tensors(right)
    else:
        yield from SCALARS
    if tuple in kinds:
        yield from PAIRS


class Other:
    """An object that no argument takes."""


def constant(value: Any) -> Callable[[], Any]:
    return lambda: value


HUGE = 10**400
SCALARS = [
    *((repr(value), constant(value)) for value in (None, True, False, 0, 1, -1, 2, 7, 0.0, 0.5, 1.0, 1.5, -0.5, 1j)),
    *((repr(value), constant(value)) for value in (math.nan, math.inf, -math.inf, 1e300, 1e-300, -1e300, 5e-324)),
    *((repr(value), constant(value)) for value in (2**31, 2**32, 2**62, sys.maxsize, 2**63, -(2**63), -(2**63) - 1)),
    *(
        (repr(value), constant(value))
        for value in ("", "x", "false", "0.5", "1", b"x", [], [0.5], (), (1,), {}, {1: 2})
    ),
    *((repr(value), constant(value)) for value in (float, print, numpy.float32(0.5), numpy.int64(1), numpy.True_)),
    ("10**400", constant(HUGE)),
    ("-10**400", constant(-HUGE)),
    ("a long text", constant("x" * 100_000)),
    ("an object", Other),
    ("tensor(0.5)", lambda: torch.tensor(0.5)),
    ("tensor(nan)", lambda: torch.tensor(math.nan)),
    ("tensor(1)", lambda: torch.tensor(1)),
    ("tensor(True)", lambda: torch.tensor(True)),
    ("tensor([0.5])", lambda: torch.tensor([0.5])),
    ("tensor of two", lambda: torch.tensor([0.1, 0.2])),
    ("tensor(0.5), requires a gradient", lambda: torch.tensor(0.5, requires_grad=True)),
    ("tensor(1j)", lambda: torch.tensor(1j)),
    ("tensor on meta", lambda: torch.tensor(0.5, device="meta")),
    ("numpy array", lambda: numpy.ones(3)),
    ("nan array", lambda: numpy.full((), math.nan)),
]
PAIRS = [
    (repr(value), constant(value))
    for value in (
        (1, 2, 3),
        (1.5, 0),
        ("a", 0),
        (-1, 0),
        (0, -1),
        (True, 0),
        [0, 0],
        (sys.maxsize, 0),
        (0, sys.maxsize),
        (2**62, 2**62),
        (2**62 - 1, 2**62 - 1),
        (None, None),
        (math.nan, 0),
        "ab",
        (0.5, math.nan),
        (0.9, 1.0),
        (-0.1, 0.5),
        ("0.9", 0.5),
        (None, 0.5),
    )
] + [
    ("(10**400, 0)", constant((HUGE, 0))),
    ("(tensor, 0)", lambda: (torch.tensor(1), 0)),
    ("tensor of two integers", lambda: torch.tensor([1, 1])),
    ("a generator", lambda: (side for side in (0, 0))),
]


def freed(x: Tensor, left: int = 0) -> Tensor:
    """A copy of x of whose storage so many bytes are left."""
    x = x.detach().clone()
    x.untyped_storage().resize_(left)
    return x


def freed_view(x: Tensor) -> Tensor:
    """Like x, but from the middle of a storage that was freed."""
    wide = torch.zeros(x.numel() + 64, dtype=x.dtype)
    view = wide.as_strided(x.shape, x.contiguous().stride(), 64)
    wide.untyped_storage().resize_(0)
    return view


def shortened_view(x: Tensor) -> Tensor:
    """Like x, from a storage that lacks its last byte, behind an offset."""
    wide = torch.zeros(x.numel() + 64, dtype=x.dtype)
    view = wide.as_strided(x.shape, x.contiguous().stride(), 64)
    wide.untyped_storage().resize_(wide.nbytes - 1)
    return view


def overlong(x: Tensor) -> Tensor:
    """Like x, with a row stride that its storage, cut after the strides were set, does not have."""
    if x.dim() == 0:
        return freed(x)
    strides = [8 * stride for stride in x.contiguous().stride()]
    wide = torch.zeros(8 * x.numel() + 8, dtype=x.dtype)
    view = wide.as_strided(x.shape, strides)
    wide.untyped_storage().resize_(x.nbytes)
    return view if x.numel() > 1 else freed(x)


def wrong_tensors(right: Tensor) -> Values:
    def of(function: Callable[[Tensor], Any], *arguments: Any) -> Callable[[], Any]:
        return functools.partial(function, right, *arguments)

    yield from (pair for pair in SCALARS if not pair[0].startswith("tensor"))
    yield "a list of numbers", of(lambda x: x.tolist())
    yield "an array", of(lambda x: x.float().numpy() if x.is_floating_point() else x.numpy())
    yield "a list of tensors", of(lambda x: [x])
    for dtype in DTYPES:
        if dtype != right.dtype:
            yield f"{dtype}", of(lambda x, dtype: x.to(dtype), dtype)
    yield "one more dimension in front", of(lambda x: x[None])
    yield "one more dimension behind", of(lambda x: x.unsqueeze(-1))
    yield "no dimensions", of(lambda x: x.sum().to(x.dtype))
    for dimension in range(right.dim()):
        yield f"dimension {dimension} removed", of(lambda x, d: x.select(d, 0), dimension)
        yield f"dimension {dimension} longer", of(lambda x, d: torch.cat([x, x.narrow(d, 0, 1)], d), dimension)
        yield f"dimension {dimension} shorter", of(lambda x, d: x.narrow(d, 0, x.shape[d] - 1), dimension)
        yield f"dimension {dimension} empty", of(lambda x, d: x.narrow(d, 0, 0), dimension)
        yield f"dimension {dimension} twice as long", of(lambda x, d: torch.cat([x, x], d), dimension)
        yield f"dimension {dimension} of stride 0", of(lambda x, d: x.narrow(d, 0, 1).expand(x.shape), dimension)
        yield f"dimension {dimension} of size 1", of(lambda x, d: x.narrow(d, 0, 1), dimension)
    yield "transposed", of(lambda x: x.transpose(0, -1) if x.dim() else x)
    yield "strided", of(lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x)
    yield "on meta", of(lambda x: x.to("meta"))
    yield "sparse", of(lambda x: x.to_sparse())
    if right.dim() == 2:
        yield "sparse rows", of(lambda x: x.to_sparse_csr())
    if right.dtype == torch.float32:
        if right.dim():
            yield "in oneDNN's layout", of(lambda x: x.to_mkldnn())
        yield "quantised", of(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8))
    if right.dim() > 1:
        for layout in (torch.strided, torch.jagged):
            yield f"nested, {layout}", of(lambda x, to: torch.nested.nested_tensor([x[0], x[0]], layout=to), layout)
    if right.numel():
        yield "freed", of(freed)
        yield "freed view", of(freed_view)
        yield "one byte left", of(freed, 1)
        yield "one byte too few", of(lambda x: freed(x, x.nbytes - 1))
        yield "one byte too few behind an offset", of(shortened_view)
        yield "strides that leave the storage", of(overlong)
    if right.is_floating_point():
        for value in (math.nan, math.inf):
            yield f"full of {value}", of(torch.full_like, value)
        yield "requires a gradient", of(lambda x: x.detach().clone().requires_grad_())
    if right.dtype in (torch.int64, torch.int32):
        for value in (-1, -100, 10**6, 2**31 - 1, -(2**31)):
            yield f"full of {value}", of(torch.full_like, value)
        yield "reversed", of(lambda x: x.flip(0) if x.dim() else x)
