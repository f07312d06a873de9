"""What a model returns: attributes, and Hugging Face's three other ways to reach them (by key, by place, unpacked after slicing)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastlm.generation.cache import KVCache


class Output:
    """A dataclass whose fields that are None are absent: `out.loss`, `out["loss"]`, `out[0]`, `"loss" in out`, `out.to_tuple()`."""

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

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
    """Of a model without a head."""

    last_hidden_state: Tensor  # (batch, tokens, width)
    pooler_output: Tensor | None = None  # (batch, width)
    past_key_values: KVCache | None = None

    def __post_init__(self) -> None:
        self.table: Tensor | None = (
            None  # not a field: the embedding's, for an output projection that is tied to it; see SharedTable
        )


@dataclasses.dataclass
class HeadOutput(Output):
    """Of a model with a head."""

    loss: Tensor | None = None  # a scalar, where labels were given
    logits: Tensor | None = (
        None  # (batch, tokens, vocabulary) or (batch, labels); None in training mode with labels, where they are never computed
    )
    past_key_values: KVCache | None = None
