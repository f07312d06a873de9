"""A model's configuration as it is, but for the attention implementation that it names.

Two models made from one configuration object share it. So it is not written to: the modules of an accelerated model look at it through a view, an object
of a subclass whose attributes are the configuration's own, both ways, except that attn_implementation reads "fastlm" for as long as nobody sets another.
"""

import functools
from typing import Any

from fastlm.integrations.attention import NAME

KEY = "_attn_implementation"


@functools.cache
def kind(config_class: Any, replaced: str | None) -> type:
    own = getattr(config_class, KEY)

    def get(self: Any) -> str | None:
        current = own.fget(self)
        return NAME if current == replaced else current

    def reduce(self: Any, protocol: Any = None) -> Any:
        return view, (original(self), replaced)

    def new(cls: Any, *args: Any, **settings: Any) -> Any:
        """Calling a view's class makes a configuration, with no view: transformers 4 does it to see what differs from the defaults."""
        return config_class(*args, **settings)

    def write(self: Any, name: str, value: Any) -> None:
        """Checked as if there were no view: transformers allows some settings for "eager" alone, and writes back what a new model read here."""
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
    seen: Any = object.__new__(kind(config.__class__, replaced))
    object.__setattr__(seen, "fastlm_original", config)
    object.__setattr__(seen, "__dict__", config.__dict__)
    return seen


def is_view(config: Any) -> bool:
    return hasattr(type(config), "fastlm_original")


def original(config: Any) -> Any:
    return config.fastlm_original
