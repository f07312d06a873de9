"""Walks over the modules of a model at a small cost: encoding one short text takes little longer than these."""

import contextlib
from collections.abc import Iterator

from torch import nn


def submodules(model: nn.Module) -> Iterator[nn.Module]:
    """A model and all modules in it, outer ones first, a shared one as often as it occurs.

    `nn.Module.modules` takes several times as long, since it makes a name and a generator for each.
    """
    found = [model]
    for module in found:  # which grows
        yield module
        found.extend([child for child in module._modules.values() if child is not None])


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
