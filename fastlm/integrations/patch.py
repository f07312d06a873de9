"""Replacing the forward of one module, and the conditions under which a module's own forward may be skipped.

A patch is an object that stands as `forward` in the module's `__dict__`, where it hides the method of the class. Each
role (layer, encoder, head, output projection, token embedding) is a subclass of Patch with the state that it needs.
"""

import copy
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.core.tracing import needs_custom_op
from fastlm.integrations.capture import is_idle

GLOBAL_HOOKS = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
is_compiling = torch.compiler.is_compiling
tracing_state = torch._C._get_tracing_state
functorch_stack = torch._C._functorch.peek_interpreter_stack
MASK_ARGUMENTS = ("attention_mask", "attn_mask")  # the second in DistilBERT of transformers 4
REPLICATE = "_replicate_for_data_parallel"  # a method of nn.Module


class Patch:
    """A forward for one module. It is copied and pickled with the module and has the signature of the class's forward.

    Attributes:
        module: the module.
        options: the arguments of `accelerate`: which parts to replace.
        names: the positional arguments of the class's forward.
    """

    def __init__(self, module: Any, options: dict[str, bool]) -> None:
        self.module, self.options = module, options
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def attach(self, module: nn.Module) -> None:
        self.module = module
        module.__dict__["forward"], module.__dict__[REPLICATE] = self, self.replicate

    def detach(self) -> None:
        del self.module.__dict__["forward"], self.module.__dict__[REPLICATE]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """All arguments by name."""
        if len(args) > len(self.names):
            raise TypeError(
                f"{type(self.module).__name__}.forward: expected at most {len(self.names)} positional arguments, "
                f"got {len(args)}"
            )
        arguments = dict(zip(self.names, args))  # noqa: B905  # there may be fewer arguments than names
        arguments.update(kwargs)
        return arguments

    def replicate(self) -> Any:
        """For torch.nn.DataParallel, whose replicas are shallow copies: a replica's patch must refer to the replica."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        copy.copy(self).attach(replica)
        return replica

    @property
    def __code__(self) -> types.CodeType:  # torch.export reads the source location of every forward
        return type(self).__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


def put(patch: Patch) -> Patch:
    patch.attach(patch.module)
    return patch


def patch_of(module: nn.Module) -> Any:
    """The patch of a module, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, Patch) and found.module is module else None


def descend(module: Any, path: str) -> Any:
    """The submodule at a path, or None. `get_submodule` calls nn.Module.__getattr__, which is several times slower."""
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module


# When a module's own forward may be skipped: "" if it may, or the reason why it may not.


def call_reason(module: nn.Module) -> str:
    """Why a module must be called, so that its parts may not be computed without it."""
    own = module.__dict__
    if own["_forward_hooks"] and not all(is_idle(hook) for hook in own["_forward_hooks"].values()):
        return "has a forward hook"
    if own["_forward_pre_hooks"]:
        return "has a forward pre-hook"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has a backward hook"
    return "has a forward of its own" if has_foreign_forward(module) else ""


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether the module's forward is neither its class's nor a patch."""
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(forward, Patch):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward


def observed_reason(tensor: Any) -> str:
    """Why no module may be replaced in a call on this tensor."""
    if not isinstance(tensor, Tensor):  # a proxy that records operations
        return "does not compute on tensors"
    if any(GLOBAL_HOOKS):
        return "every module has a global hook"
    return "" if tracing_state() is None and functorch_stack() is None else transform_reason()


def transform_reason() -> str:
    """Which transformation is active that understands PyTorch's operators only."""
    if is_compiling():
        return ""
    if tracing_state() is not None:
        return "torch.jit traces it"
    if functorch_stack() is not None:
        return "torch.func transforms it"
    return ""


def sizes_may_depend_on_values(*tensors: Tensor) -> bool:
    """Whether nothing is traced and no CUDA graph is captured."""
    if needs_custom_op(*tensors) or transform_reason():
        return False
    return not tensors[0].is_cuda or not torch.cuda.is_current_stream_capturing()
