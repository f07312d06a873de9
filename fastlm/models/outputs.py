"""Model outputs, with Hugging Face's ways of access: by attribute, by key, by index and by slice."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastlm.models.cache import KVCache


class Output:
    """Base of output dataclasses; fields that are None are left out.

    `out.loss`, `out["loss"]`, `out[0]`, `"loss" in out`, `out.to_tuple()`.
    """

    def keys(self) -> tuple[str, ...]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return tuple(f.name for f in fields if getattr(self, f.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, key) for key in self.keys())

    values = to_tuple

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass
class ModelOutput(Output):
    """The output of a model without a head."""

    last_hidden_state: Tensor  # (batch, tokens, width)
    pooler_output: Tensor | None = None  # (batch, width)
    past_key_values: KVCache | None = None

    def __post_init__(self) -> None:
        # Not a field: the embedding matrix for an output projection that is tied to it; see layers.SharedTable.
        self.shared_table: Tensor | None = None


@dataclasses.dataclass
class HeadOutput(Output):
    """The output of a model with a head."""

    loss: Tensor | None = None  # a scalar; None without labels
    # (batch, tokens, vocabulary) or (batch, labels). None in training mode with labels: they are never materialised.
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
