"""When the layers of a model may run in one call of compiled code, which reads their weights and calls no module.

They may in calls without gradients, hooks, tracing and autocast, if modules and parameters are of the usual types.
Layers are described to compiled code once. A description is valid until a module, attribute or parameter changes.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlm.backends.cpu import kernels
from fastlm.core.autocast import autocast_enabled
from fastlm.core.tracing import needs_custom_op

# The methods by which modules compute, where their classes have them. A caller may replace each of them.
METHODS = ("forward", "attend", "feed_forward", "__call__")
CALL = nn.Module.__call__


def may_skip_modules(x: Tensor) -> bool:
    """Whether a call on x needs no module to be called, and compiled code can read x."""
    return (
        not needs_custom_op(x)  # first: what follows would add guards to a compiled graph
        and kernels is not None
        and not torch.is_grad_enabled()
        and x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not autocast_enabled(x)
        and not torch_module._has_any_global_hook()
    )


def methods_of(kind: Any) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in METHODS if hasattr(kind, name)}


def parts_of(*kinds: Any) -> dict[Any, dict[str, Any]]:
    """The methods of each class of modules, as the class was written."""
    return {kind: methods_of(kind) for kind in kinds}


def is_part(module: nn.Module, parts: dict[Any, dict[str, Any]]) -> bool:
    """Whether a module is of one of these classes, with the methods that the class was written with."""
    return parts.get(type(module)) == methods_of(type(module))


class Conditions(NamedTuple):
    """Under which a module need not be called."""

    forwards: tuple[type, ...] = ()  # classes of objects in the place of `forward`
    calls: tuple[Any, ...] = (CALL,)  # methods `__call__` of classes
    is_idle: Callable[[Any], bool] = lambda hook: False  # whether a forward hook does nothing


USUAL = Conditions()


class Unchanged(NamedTuple):
    """What must not change.

    The entry of each of `dicts` at the key is the value; None: there is no such entry. Those of `empty` are empty, and
    those of `sized` have as many entries as `sizes` says. `classes` are those of the modules, and `methods` what each
    of `owners` has by a name.
    """

    modules: list[nn.Module]
    classes: list[Any]
    owners: tuple[Any, ...]
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    dicts: tuple[dict[Any, Any], ...]
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    empty: tuple[dict[Any, Any], ...]
    sized: list[Any]
    sizes: list[int]

    @classmethod
    def of(cls, layers: nn.ModuleList, only: nn.Module | None = None) -> "Unchanged":
        """All that is in some layers, of which there is at least one. only: in this one of them."""
        siblings: Any = layers._modules
        entries = [(siblings, name, layer) for name, layer in siblings.items() if only is None or layer is only]
        modules = [module for _, _, layer in entries for module in layer.modules()]
        return cls.watch(modules, entries, sized=[siblings])

    @classmethod
    def watch(
        cls,
        modules: list[nn.Module],
        entries: list[tuple[Any, Any, Any]],
        *,
        methods: Iterable[tuple[Any, str, Any]] = (),
        sized: Iterable[Any] = (),
        registries: Iterable[dict[Any, Any]] = (),
    ) -> "Unchanged":
        """Attributes, parameters, children, hooks, classes and methods of modules; and what else is given.

        Args:
            entries: dict, key and value of each.
            methods: class, name and method of each.
            sized: dicts that keep their number of entries; most of `registries`, which do too, are empty.
        """
        entries, registries = [*entries], [*registries]
        for module in modules:
            attributes = vars(module)
            entries += [(attributes, key, value) for key, value in attributes.items() if not key.startswith("_")]
            entries += [(attributes, name, attributes.get(name)) for name in methods_of(type(module))]
            hooks: list[dict[Any, Any]] = [module._forward_hooks, module._forward_pre_hooks]
            registries += hooks
            mappings: list[dict[Any, Any]] = [module._parameters, module._modules, *hooks]
            for mapping in mappings:
                entries += [(mapping, key, value) for key, value in mapping.items()]
        dicts, keys, values = zip(*entries, strict=True)
        classes = [*map(type, modules)]
        of_classes = ((kind, name, method) for kind in {*classes} for name, method in methods_of(kind).items())
        owners, names, functions = zip(*methods, *of_classes, strict=True)
        sized = [*sized, *filter(None, registries)]
        return cls(
            modules,
            classes,
            owners,
            names,
            functions,
            dicts,
            keys,
            values,
            empty=tuple(each for each in registries if not each),
            sized=sized,
            sizes=[*map(len, sized)],
        )

    def holds(self, layers: nn.ModuleList) -> bool:
        """Whether these are the layers, and nothing in them has changed."""
        return self.dicts[0] is layers._modules and self.still_holds()

    def still_holds(self) -> bool:
        return (
            [*map(type, self.modules)] == self.classes
            and (*map(getattr, self.owners, self.names, itertools.repeat(None)),) == self.methods
            and [*map(len, self.sized)] == self.sizes
            and kernels.unchanged(self.dicts, self.keys, self.values, self.empty)
        )


def must_be_called(layer: nn.Module, conditions: Conditions = USUAL) -> bool:
    """Whether a module of a layer has a hook, another method than its class, or tensors of unusual types."""
    for module in layer.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(conditions.is_idle(hook) for hook in hooks.values()):
                return True
        kind, attributes = type(module), vars(module)
        for name in methods_of(kind):
            if name in attributes and not (name == "forward" and isinstance(attributes[name], conditions.forwards)):
                return True
        if kind.__call__ not in conditions.calls or needs_custom_op(*module._parameters.values()):
            return True
    return False
