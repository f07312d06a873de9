"""The description of encoder layers, and whether the backend `cpu` is selected for the operators in them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastlm.backends import selection
from fastlm.backends.registry import Registered
from fastlm.ops.activation import NUMBERS
from fastlm.ops.attention.autograd import operator as attention
from fastlm.ops.gelu_mlp.autograd import operator as gelu_mlp
from fastlm.ops.linear.autograd import operator as linear


class Layer(NamedTuple):
    """What a layer computes, and with which weights. The fields are arguments of the compiled function.

    Weights are (out, in). Without key and value, query projects all three.
    """

    attention_norm: Tensor
    attention_norm_bias: Tensor | None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    query: Tensor
    query_bias: Tensor | None
    key: Tensor | None
    key_bias: Tensor | None
    value: Tensor | None
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    eps: float
    activation: int  # NUMBERS of fastlm/ops/activation.py; a GELU
    num_heads: int
    head_dim: int
    scale: float

    @classmethod
    def of(cls, projections: Sequence[tuple[Tensor, Tensor | None]], *, activation: str, **fields: Any) -> "Layer":
        """projections: weight and bias of query, key and value, or of the one that computes all three."""
        names = ("query", "key", "value")[: len(projections)]
        given: dict[str, Any] = dict.fromkeys(("key", "key_bias", "value", "value_bias"))
        for name, (weight, bias) in zip(names, projections, strict=True):
            given |= {name: weight, f"{name}_bias": bias}
        return cls(**given, **fields, activation=NUMBERS[activation])

    @property
    def query_width(self) -> int:
        return self.query.shape[0] // (3 if self.key is None else 1)

    @property
    def scratch_width(self) -> int:
        """Elements per row of the scratch memory, as csrc/cpu/encoder_layer.h divides it."""
        hidden, width = self.up.shape
        return max(4 * self.query_width, hidden, width) + 2 * width

    def calls(self, sequences: int, rows: int) -> Iterator[tuple[Registered, Any]]:
        """Its operators except the norms, with the sizes of their calls: see Layers.are_selected."""
        hidden, width = self.up.shape
        first, inner, heads = self.query.shape[0], self.query_width, self.num_heads
        yield linear, linear.Sizes(rows, width, first, False)
        if inner != first or inner != width:  # otherwise all projections have these sizes
            yield linear, linear.Sizes(rows, inner, width, False)
        flags = True, False, False, False, False, False  # packed
        yield attention, attention.Sizes(sequences, heads, rows, rows, inner // heads, *flags)
        yield gelu_mlp, gelu_mlp.Sizes(rows, width, hidden, width, False)


class Layers(NamedTuple):
    """The layers of an encoder."""

    layers: list[Layer]
    kinds: list[Layer]  # one of each kind, for backend selection
    scratch_width: int
    statistics_width: int

    @classmethod
    def of(cls, layers: list[Layer]) -> "Layers":
        kinds = {(layer.query.shape, layer.key is None, layer.up.shape, layer.num_heads): layer for layer in layers}
        statistics = max(layer.num_heads for layer in layers) + 2
        return cls(layers, [*kinds.values()], max(layer.scratch_width for layer in layers), statistics)

    def are_selected(self, x: Tensor, sequences: int) -> bool:
        """Whether the layers run in one call: the backend `cpu` is forced, or selected for their operators.

        Rows of the backend table for norms do not matter: where they select PyTorch's, its call from Python costs less.
        """
        rows = x.numel() // x.shape[-1]
        return self.layers[0].query.dtype == x.dtype and all(
            selection.is_selected("cpu", kind.calls(sequences, rows), x) for kind in self.kinds
        )
