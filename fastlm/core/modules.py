"""Walks over the modules of a model at a small cost: encoding one short text takes little longer than these."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def submodules(model: nn.Module, *, of_each_list: int | None = None) -> list[nn.Module]:
    """A model and all modules in it, outer ones first, a shared one as often as it occurs.

    `nn.Module.modules` takes several times as long, since it makes a name and a generator for each.

    Args:
        of_each_list: how many modules of a ModuleList, as which models have their layers; None: all.
    """
    found = [model]
    for module in found:  # which grows
        children: Iterable[nn.Module | None] = module._modules.values()
        if of_each_list is not None and isinstance(module, nn.ModuleList):
            children = itertools.islice(children, of_each_list)
        for child in children:
            if child is not None:
                found.append(child)
    return found


def first_parameter(module: nn.Module, default: Any = None) -> Any:
    """The first of `module.parameters()`, which makes a generator for each module until there; or the default."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (parameter := first_parameter(child)) is not None:
            return parameter
    return default


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode; on exit, restores the mode of every module."""
    training = [module for module in submodules(model) if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
