"""Which operators and backends there are. An operator registers itself when its package is imported."""

import functools
import importlib
import importlib.util
from typing import Any, get_type_hints

import torch

from fastlm.backends.contract import Backend, Implementation, Reasons

BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")

_operators: dict[str, "Registered"] = {}


class Registered:
    """An operator as the backends, the table and the tools know it.

    Args:
        name: of the operator and of its files everywhere.
        package: where its implementations are: `{package}.{backend}`, a module with an `implementation`. A backend
            without such a module does not implement the operator.
        sizes: the NamedTuple of integers and bools that backend selection depends on.
    """

    def __init__(self, name: str, package: str, sizes: type) -> None:
        self.name, self.package, self.sizes = name, package, sizes
        _operators[name] = self

    @property
    def size_names(self) -> tuple[str, ...]:
        return self.sizes._fields  # type: ignore[attr-defined]

    @functools.cached_property
    def flag_names(self) -> frozenset[str]:
        """Those of size_names that are true or false."""
        return frozenset(name for name, kind in get_type_hints(self.sizes).items() if kind is bool)

    def implements(self, backend: str) -> bool:
        return importlib.util.find_spec(f"{self.package}.{backend}") is not None

    @functools.cache  # noqa: B019 (operators live as long as the process)
    def implementation(self, backend: str) -> Implementation[Any, Any]:
        return importlib.import_module(f"{self.package}.{backend}").implementation

    def refusals(self, backend: str, device: torch.device, dtype: torch.dtype, sizes: Any) -> Reasons:
        """Why a backend does not support a call of this operator; empty if it does."""
        found = load(backend)
        if reasons := found.unavailable():
            return reasons
        if not self.implements(backend):
            return [f"does not implement {self.name}"]
        return [*found.refuses(device, dtype), *self.implementation(backend).refuses(sizes, device, dtype)]

    def __repr__(self) -> str:
        return f"<operator {self.name}>"


def operators() -> dict[str, Registered]:
    """All operators by name."""
    return dict(sorted(_operators.items()))


@functools.cache
def load(name: str) -> Backend:
    return importlib.import_module(f"fastlm.backends.{name}").backend


def unavailable(name: str) -> Reasons:
    """Why a backend supports nothing here; empty if it is available."""
    return load(name).unavailable()
