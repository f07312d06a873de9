"""The description of a decoder layer, and whether the backend `cpu` is selected for the operators in it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastlm.backends import selection
from fastlm.backends.registry import Registered
from fastlm.ops.activation import NUMBERS
from fastlm.ops.attention.autograd import operator as attention
from fastlm.ops.attention.spec import UNLIMITED
from fastlm.ops.gelu_mlp.autograd import operator as gelu_mlp
from fastlm.ops.glu_mlp.autograd import operator as glu_mlp
from fastlm.ops.layernorm_residual.autograd import operator as layernorm_residual
from fastlm.ops.linear.autograd import operator as linear
from fastlm.ops.rms_norm_residual.autograd import operator as rms_norm_residual
from fastlm.ops.rotary.autograd import operator as rotary


class Layer(NamedTuple):
    """What a layer computes, and with which weights. The fields are arguments of the compiled function.

    Without key and value, query projects all three; without gate, the MLP is a GELU-MLP.
    """

    attention_norm: Tensor
    attention_norm_bias: Tensor | None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    attention_output_norm: Tensor | None
    mlp_output_norm: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Tensor
    query_bias: Tensor | None
    key: Tensor | None
    key_bias: Tensor | None
    value: Tensor | None
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    conv1d: bool  # weights are (in, out), as GPT-2's Conv1D has them
    layer_norm: bool  # else RMSNorm
    unit_offset: bool  # of RMSNorm
    eps: float
    activation: int  # NUMBERS of fastlm/ops/activation.py
    num_heads: int
    rotates: bool
    scale: float
    softcap: float  # 0: none
    window: int  # to how many keys before its own a query attends; UNLIMITED: to all

    @classmethod
    def of(cls, *, activation: str, softcap: float | None, window: int | None, **fields: Any) -> "Layer":
        absent = {name: None for name in cls._fields if name not in fields}
        given = {
            **absent,
            **fields,
            "activation": NUMBERS[activation],
            "softcap": softcap or 0.0,
            "window": UNLIMITED if window is None else window,
        }
        return cls(**given)

    def calls(self, batch: int, head_dim: int, key_len: int, masked: bool) -> Iterator[tuple[Registered, Any]]:
        """The operators that it consists of, with the sizes of their calls."""
        width, heads = self.attention_norm.shape[0], self.num_heads
        norm = layernorm_residual if self.layer_norm else rms_norm_residual
        yield norm, norm.Sizes(batch, width, False)
        for weight in (self.query, self.key, self.value, self.output):
            if weight is not None:
                inputs, outputs = weight.shape if self.conv1d else weight.shape[::-1]
                yield linear, linear.Sizes(batch, inputs, outputs, self.conv1d)
        if self.query_norm is not None:
            yield norm, norm.Sizes(batch * heads, head_dim, False)
        if self.rotates:
            yield rotary, rotary.Sizes(batch, heads, 1, head_dim)
        masked = masked or key_len > self.window + 1
        flags = False, masked, False, False, False, self.softcap > 0
        yield attention, attention.Sizes(batch, heads, 1, key_len, head_dim, *flags)
        if self.gate is not None:
            yield glu_mlp, glu_mlp.Sizes(batch, width, self.gate.shape[0], width)
        else:
            hidden = self.up.shape[self.conv1d]
            yield gelu_mlp, gelu_mlp.Sizes(batch, width, hidden, width, self.conv1d)


def is_selected(layer: Layer, x: Tensor, head_dim: int, key_len: int, masked: bool) -> bool:
    """Whether the layer runs in one call: the backend `cpu` is forced, or selected for each of its operators."""
    return selection.is_selected("cpu", layer.calls(x.shape[0], head_dim, key_len, masked), x)
