"""A view of a model's configuration that differs only in the name of the attention implementation.

Models made from one configuration object share it, so accelerating one of them must not write to it. Its modules get a
view instead: an object of a subclass that reads and writes the configuration's attributes. `attn_implementation` reads
"fastlm" until another one is set.
"""

import functools
from typing import Any

from fastlm.integrations.attention import NAME, is_view

__all__ = ["is_view", "original", "view"]

KEY = "_attn_implementation"


@functools.cache
def view_class(config_class: Any, replaced: str | None) -> type:
    own = getattr(config_class, KEY)

    def get(self: Any) -> str | None:
        current = own.fget(self)
        return NAME if current == replaced else current

    def reduce(self: Any, protocol: Any = None) -> Any:
        return view, (original(self), replaced)

    def new(cls: Any, *args: Any, **settings: Any) -> Any:
        """Calling the class makes a configuration: transformers 4 does so to compare settings with the defaults."""
        return config_class(*args, **settings)

    def write(self: Any, name: str, value: Any) -> None:
        """Writes to the configuration, where transformers checks the value.

        Writing "fastlm" has no effect: for a new model transformers reads the name here and writes it back, and it
        allows some settings with "eager" only.
        """
        if not (name in (KEY, f"{KEY}_internal") and value == NAME):
            setattr(original(self), name, value)

    def validate(self: Any) -> None:
        original(self).validate()

    members = {
        KEY: property(get),
        "__new__": new,
        "__setattr__": write,
        "__reduce_ex__": reduce,
        "__module__": config_class.__module__,
        "__slots__": ("fastlm_original",),
    }
    if hasattr(config_class, "validate"):
        members["validate"] = validate
    return type(config_class.__name__, (config_class,), members)


def view(config: Any, replaced: Any) -> Any:
    """replaced: the implementation that reads as "fastlm"."""
    result: Any = object.__new__(view_class(config.__class__, replaced))
    object.__setattr__(result, "fastlm_original", config)
    object.__setattr__(result, "__dict__", config.__dict__)
    return result


def original(config: Any) -> Any:
    return config.fastlm_original
