"""Finding the modules of a model that a family describes."""

import inspect
from collections.abc import Iterator

from torch import nn

from fastlm.integrations.families import FAMILIES, Family, Head


def families_of(module: nn.Module) -> Iterator[tuple[Family, str]]:
    """The family whose module defines the forward of a module's class, with each class that the module has there.

    A subclass that inherits the forward counts as the class that it inherits it from.
    """
    home = getattr(inspect.unwrap(type(module).forward), "__module__", "")
    if home in FAMILIES:
        for kind in type(module).__mro__:
            if kind.__module__ == home:
                yield FAMILIES[home], kind.__name__


def layer_family(module: nn.Module) -> Family | None:
    return next((family for family, name in families_of(module) if name == family.layer), None)


def norm_family(module: nn.Module) -> Family | None:
    """Of norms that have a class of their own."""
    family = FAMILIES.get(type(module).__module__)
    return family if family is not None and family.has_norm(type(module)) else None


def encoder_family(module: nn.Module) -> Family | None:
    return next((family for family, name in families_of(module) if name == family.encoder), None)


def head_of(module: nn.Module) -> Head | None:
    return next((family.heads[name] for family, name in families_of(module) if name in family.heads), None)
