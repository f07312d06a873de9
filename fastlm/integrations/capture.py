"""The hooks by which transformers 5 captures hidden states and attentions inside a model.

They stay on the modules after their first use. A hook that is not capturing has no effect, so it does not prevent a
module from being replaced.
"""

import importlib
from collections.abc import Callable
from typing import Any

try:
    collector: Any = importlib.import_module("transformers.utils.output_capturing")._active_collector
except ImportError:  # older versions: the layers return these outputs, or are wrapped for one call
    collector = None

MODULE = "transformers.utils.output_capturing"


def captured_outputs() -> dict:
    """What the current call captures, by kind ("hidden_states", "attentions", …)."""
    return (collector.get() or {}) if collector is not None else {}


def captures_attentions() -> bool:
    kinds = captured_outputs()
    return bool(kinds) and any("attentions" in kind for kind in kinds)


def is_idle(hook: Callable) -> bool:
    """Whether a hook is one of these and captures nothing in the current call."""
    return getattr(hook, "__module__", None) == MODULE and not captured_outputs()
