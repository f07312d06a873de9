"""What transformers 5 collects from inside a model by hooks that stay on its modules once they were needed. Only while it collects do they matter."""

import importlib
from collections.abc import Callable
from typing import Any

try:
    collector: Any = importlib.import_module("transformers.utils.output_capturing")._active_collector
except ImportError:  # older ones: layers hand everything on themselves, or are wrapped for the call
    collector = None

MODULE = "transformers.utils.output_capturing"


def collecting() -> dict:
    """What is being collected just now, by kind ("hidden_states", "attentions", …)."""
    return (collector.get() or {}) if collector is not None else {}


def attentions_wanted() -> bool:
    kinds = collecting()
    return bool(kinds) and any("attentions" in kind for kind in kinds)


def idle(hook: Callable) -> bool:
    """Whether a hook is one of these, and does nothing in this call."""
    return getattr(hook, "__module__", None) == MODULE and not collecting()
