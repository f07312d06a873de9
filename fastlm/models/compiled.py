"""When the layers of a model may run in one call of compiled code, which reads their weights and calls no module.

They may where nothing asks for their modules: no gradients, hooks, tracing, autocast, and modules and parameters of the
usual types. Compiled code is told of the layers once. That holds as long as everything that it was made of is the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlm.backends.cpu import kernels
from fastlm.core.autocast import autocast_enabled
from fastlm.core.tracing import needs_custom_op


def may_skip_modules(x: Tensor) -> bool:
    """Whether nothing around a call on x asks for modules, and there is compiled code for it."""
    return (
        not needs_custom_op(x)  # first: what follows would add guards to a compiled graph
        and kernels is not None
        and not torch.is_grad_enabled()
        and x.is_cpu
        and x.is_contiguous()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not autocast_enabled(x)
        and not torch_module._has_any_global_hook()
    )


def forwards_of(*kinds: Any) -> dict[Any, Any]:
    """The forward of each class of modules. A caller may replace it, for all modules of the class."""
    return {kind: kind.forward for kind in kinds}


def is_part(module: nn.Module, parts: dict[Any, Any]) -> bool:
    """Whether a module is of one of these classes, with the forward that the class was written with."""
    return parts.get(type(module)) is type(module).forward


class Skipping(NamedTuple):
    """What may stand in modules that are not called."""

    forwards: tuple[type, ...]  # classes of objects in the place of `forward`
    is_idle: Callable[[Any], bool]  # whether a forward hook does nothing


NOTHING = Skipping((), lambda hook: False)


class Unchanged(NamedTuple):
    """What must not change.

    The entry of each of `dicts` at the key is the value; None: there is no such entry. Those of `empty` are empty, and
    the dicts of `hooks` have so many. `classes` are those of the modules, and `forwards` their methods.
    """

    num_layers: int
    modules: list[nn.Module]
    classes: list[Any]
    dicts: tuple[dict[Any, Any], ...]
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    empty: tuple[dict[Any, Any], ...]
    hooks: list[tuple[dict[Any, Any], int]]
    forwards: dict[Any, Any]

    @classmethod
    def of(cls, layers: nn.ModuleList, skipping: Skipping = NOTHING) -> "Unchanged | None":
        """All that is in some layers; None if a module must be called."""
        entries: list[tuple[dict[Any, Any], Any, Any]] = []
        registries: list[dict[Any, Any]] = []
        siblings: Any = layers._modules
        for name, layer in siblings.items():
            if must_be_called(layer, skipping):
                return None
            entries.append((siblings, name, layer))
            for module in layer.modules():
                attributes = vars(module)
                entries += [(attributes, key, value) for key, value in attributes.items() if not key.startswith("_")]
                entries.append((attributes, "forward", attributes.get("forward")))
                registries += [module._forward_hooks, module._forward_pre_hooks]
                for mapping in (module._parameters, module._modules, *registries[-2:]):
                    entries += [(mapping, key, value) for key, value in mapping.items()]
        if not entries:
            return None
        dicts, keys, values = zip(*entries, strict=True)
        modules = [module for layer in siblings.values() for module in layer.modules()]
        classes = [*map(type, modules)]
        return cls(
            len(siblings),
            modules,
            classes,
            dicts,
            keys,
            values,
            empty=tuple(each for each in registries if not each),
            hooks=[(each, len(each)) for each in registries if each],
            forwards=forwards_of(*classes),
        )

    def holds(self, layers: nn.ModuleList) -> bool:
        """Whether these are the layers, and nothing in them has changed."""
        siblings: Any = layers._modules
        return (
            self.dicts[0] is siblings
            and self.num_layers == len(siblings)
            and [*map(type, self.modules)] == self.classes
            and all(kind.forward is forward for kind, forward in self.forwards.items())
            and all(len(each) == size for each, size in self.hooks)
            and kernels.unchanged(self.dicts, self.keys, self.values, self.empty)
        )


def must_be_called(layer: nn.Module, skipping: Skipping = NOTHING) -> bool:
    """Whether a module of a layer has a hook, another forward than its class, or tensors of unusual types."""
    for module in layer.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(skipping.is_idle(hook) for hook in hooks.values()):
                return True
        forward = vars(module).get("forward")
        if forward is not None and not isinstance(forward, skipping.forwards):
            return True
        if needs_custom_op(*module._parameters.values()):
            return True
    return False
