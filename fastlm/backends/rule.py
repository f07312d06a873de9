"""A row of the table behind backend selection."""

import dataclasses
from typing import Any

import torch

from fastlm.backends import registry
from fastlm.backends.registry import Registered

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Rule:
    operator: str
    dtype: str  # of DTYPES
    where: dict[str, tuple[int | None, int | None]] = dataclasses.field(default_factory=dict)  # {} = always
    first: str = "torch"  # the backend, of the device's ORDER

    def matches(self, operator: Registered, dtype: torch.dtype, sizes: Any) -> bool:
        if self.operator != operator.name or self.dtype != str(dtype).removeprefix("torch."):
            return False
        return all(
            (low is None or getattr(sizes, name) >= low) and (high is None or getattr(sizes, name) <= high)
            for name, (low, high) in self.where.items()
        )

    def __str__(self) -> str:
        where = ", ".join(self._range(name, low, high) for name, (low, high) in self.where.items())
        return f"{self.operator} in {self.dtype}" + f" ({where})" * bool(where)

    def _range(self, name: str, low: int | None, high: int | None) -> str:
        if low == high and low in (0, 1) and name in registry.operators()[self.operator].flag_names:
            return name if low else f"not {name}"
        return f"{'' if low is None else f'{low} ≤ '}{name}{'' if high is None else f' ≤ {high}'}"
