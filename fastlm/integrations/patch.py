"""A forward put on one module in place of its class's, and what must be known of a module before its own forward may be skipped."""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.integrations.capture import idle
from fastlm.ops.boundary import opaque

GLOBAL_HOOKS = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
is_compiling, traced_by, transformed_by = (
    torch.compiler.is_compiling,
    torch._C._get_tracing_state,
    torch._C._functorch.peek_interpreter_stack,
)
REPLICATE = "_replicate_for_data_parallel"  # a method of nn.Module
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class Patch:
    """Stands as `forward` in a module's own __dict__. Deep copies and pickles with its module, and has the signature of the forward that it stands for."""

    module: Any
    parts: Any  # of a layer: its modules, as they were found last (blocks.py)
    cache: str  # of a layer: what it calls the cache, what it does not, the mask, and whether it returns a tuple
    not_cache: frozenset[str]
    rare: tuple[
        str, ...
    ]  # of a layer: names of arguments that, where they are given, may mean that nothing is replaced
    mask: str
    as_tuple: bool
    fused: bool  # of a layer: no part is left out
    held: bool  # of an output projection: whether it hands its input on; of a token embedding: whether it hands its table on (loss.py)
    table: Tensor | None  # the one that was handed on

    def __init__(self, module: nn.Module, function: Callable, family: Any, options: dict[str, bool]) -> None:
        self.module, self.function, self.family, self.options = module, function, family, options
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of the module's parts, which a copy finds again."""
        return {**self.__dict__, "parts": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, args, kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """All arguments by name."""
        if len(args) > len(self.names):
            raise TypeError(
                f"{type(self.module).__name__}.forward: expected at most {len(self.names)} positional arguments, got {len(args)}"
            )
        given = dict(zip(self.names, args))  # noqa: B905  # fewer arguments than names
        given.update(kwargs)
        return given

    def replicate(self) -> Any:
        """For torch.nn.DataParallel, whose replicas are shallow copies: each gets a patch of its own, or it would compute on the original's device."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        attach(replica, copy.copy(self))
        return replica

    @property
    def __code__(self) -> types.CodeType:  # torch.export asks every forward where it stands
        return type(self).__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


def put(module: nn.Module, function: Callable, family: Any, options: dict[str, bool]) -> Patch:
    return attach(module, Patch(module, function, family, options))


def attach(module: nn.Module, patch: Patch) -> Patch:
    patch.module, patch.parts = module, None
    module.__dict__["forward"], module.__dict__[REPLICATE] = patch, patch.replicate
    return patch


def detach(module: nn.Module) -> None:
    del module.__dict__["forward"], module.__dict__[REPLICATE]


def patch_of(module: nn.Module) -> Patch | None:
    found = module.__dict__.get("forward")
    return found if type(found) is Patch and found.module is module else None


def touched(module: nn.Module) -> str:
    """Why a module must be called, and not only what it holds be used; "" if nobody would notice."""
    own = module.__dict__
    if own["_forward_hooks"] and not all(idle(hook) for hook in own["_forward_hooks"].values()):
        return "has a forward hook"
    if own["_forward_pre_hooks"]:
        return "has a forward pre-hook"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has a backward hook"
    forward = own.get("forward")
    if (
        forward is not None
        and type(forward) is not Patch
        and getattr(forward, "__func__", None) is not type(module).forward
    ):
        return "has a forward of its own"
    return ""


def watched(tensor: Any) -> str:
    """Why nothing at all may be replaced in a call on this; "" if it may."""
    if not isinstance(tensor, Tensor):  # a proxy that records
        return "does not compute on tensors"
    if any(GLOBAL_HOOKS):
        return "every module has a global hook"
    return "" if traced_by() is None and transformed_by() is None else transformed()


def transformed() -> str:
    """Who turns PyTorch's own operators, and nothing else, into something of theirs."""
    if is_compiling():
        return ""
    if traced_by() is not None:
        return "torch.jit traces it"
    if transformed_by() is not None:
        return "torch.func transforms it"
    return ""


def eager(*tensors: Tensor) -> bool:
    """Whether sizes may depend on values: nobody traces, and no CUDA graph is captured."""
    if opaque(*tensors) or transformed():
        return False
    return not tensors[0].is_cuda or not torch.cuda.is_current_stream_capturing()
