"""The contract between operators and backends.

A backend (PyTorch, the C++ kernels, Triton, …) says where it is available and which devices and dtypes it supports. An
operator has one implementation for each backend that supports it. Both refuse a call with a list of reasons; an empty
list means that they support it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor | None, ...]
Reasons = list[str]

ForwardCall = TypeVar("ForwardCall")  # a Call; of an operator that updates its arguments, any description
BackwardCall = TypeVar("BackwardCall")


class Call(Protocol):
    """A frozen description of one call of an operator, forward or backward.

    It is a NamedTuple: tensors (or None) come first, then numbers and flags. A torch.library operator's schema is made
    of its fields.
    """

    def subject(self) -> tuple[Tensor, torch.dtype, Any]:
        """(a tensor on the device of the call, the dtype it computes in, its sizes).

        The sizes are a NamedTuple of integers and bools: all that backend selection may depend on.
        """

    def empty_results(self) -> Results:
        """Uninitialised results with the right shapes, dtypes and strides; None for a result that does not exist."""

    def flops(self) -> int:
        """Two per multiply-add of the matrix products, as PyTorch counts them."""

    def bytes(self) -> int:
        """The least memory traffic: every operand read once, every result written once."""


class Backend(Protocol):
    """What computes."""

    name: str
    description: str  # one line, for `fastlm info` and --help

    def unavailable(self) -> Reasons:
        """Why it supports nothing in this process."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> Reasons:
        """Why it supports no call on this device or in this dtype, being available."""


def accepts_all_sizes(sizes: Any, device: torch.device, dtype: torch.dtype) -> Reasons:
    return []


@dataclasses.dataclass(frozen=True, eq=False)
class Implementation(Generic[ForwardCall, BackwardCall]):
    """One operator on one backend.

    forward and backward take a call and return its results in the order of call.empty_results(). They write to nothing
    but their results. The same call gives bitwise the same results, on any number of threads.

    Where a call has fp32_grads set, gradients of weights may be returned in float32, as they were accumulated, instead
    of the weights' dtype.
    """

    backend: Backend
    forward: Callable[[ForwardCall], Results]
    backward: Callable[[BackwardCall], Results] | None = None  # None: the operator has none
    refuses: Callable[[Any, torch.device, torch.dtype], Reasons] = accepts_all_sizes  # by sizes, beyond the backend's
    # The call made of PyTorch's differentiable operators, for which autograd needs no function of ours: what the public
    # function returns, or NotImplemented for a call that they do not compute as promised.
    composite: Callable[..., Any] | None = None
