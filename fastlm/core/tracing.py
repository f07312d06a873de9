"""Whether a call must stay one torch.library operator, and what such an operator may return."""

import torch
from torch import Tensor

PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}


def needs_custom_op(*tensors: Tensor | None) -> bool:
    """True under torch.compile or export, under a dispatch mode, and for tensor subclasses and meta tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_meta):
            return True
    return False


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors, repeated ones as views: under torch.compile an autograd.Function takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.view_as(x) if x is not None and any(x is earlier for earlier in tensors[:i]) else x
        for i, x in enumerate(tensors)
    )


def none_to_empty(like: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The results of a torch.library operator, which must all be tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)
