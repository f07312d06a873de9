"""A layer of an encoder, as the family's layout describes it.

Residual additions are fused into the norms: a pre-norm layer returns its output and the residual sum separately, and
the next norm adds and normalises in one pass over memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.models.compiled import is_part, parts_of
from fastlm.models.config import GELUS
from fastlm.models.decoder_config import ACTIVATIONS
from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.layers import FeedForward, LayerNorm, Linear, RMSNorm, merge_heads
from fastlm.models.packing import Packed, attention_with_bias
from fastlm.ops import activation
from fastlm.ops.attention import attention, attention_varlen
from fastlm.ops.encoder_layer import Layer
from fastlm.ops.gelu_mlp import gelu_mlp
from fastlm.ops.glu_mlp import glu_mlp
from fastlm.ops.rotary import rotary

Tables = tuple[Tensor, Tensor] | None  # cos and sin of the positions
Padding = Packed | Tensor | None  # of a packed batch its sequences, of a padded one the mask

FUNCTIONS = {name: pair.value for name, pair in activation.ACTIVATIONS.items()} | {"tanh": torch.tanh}
FUNCTIONS["gelu_none"] = FUNCTIONS["gelu"]


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Adds a module under a path such as "attention.self.query", with the containers above it."""
    *containers, name = path.split(".")
    for container in containers:
        if container not in root._modules:
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    root.add_module(name, module)


def part(root: nn.Module, path: str | None) -> Any:
    """The module under a path. A family without it does not ask for it."""
    assert path is not None
    module: Any = root
    for name in path.split("."):
        module = module._modules[name]
    return module


def new_norm(config: EncoderConfig, width: int) -> nn.Module:
    layout = config.layout
    eps = config.setting(layout.eps)
    if layout.norm == "layer":
        return LayerNorm(width, eps=eps, bias=config.setting(layout.norm_bias))
    return RMSNorm(width, eps, unit_offset=layout.norm == "rms_offset")


class EncoderLayer(FeedForward):
    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        layout, setting = config.layout, config.setting
        self.layout = layout
        width, hidden = config.hidden_size, config.intermediate_size
        self.num_heads, self.num_kv_heads = config.num_attention_heads, setting(layout.num_kv_heads)
        self.head_dim = setting(layout.head_dim) or width // self.num_heads
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        widths = [count * self.head_dim for count in heads]
        for path, size in zip(layout.qkv, widths if len(layout.qkv) == 3 else [sum(widths)], strict=True):
            place(self, path, Linear(width, size, bias=setting(layout.qkv_bias)))
        place(self, layout.out, Linear(self.num_heads * self.head_dim, width, bias=setting(layout.out_bias)))
        self.has_attention_norm = layer > 0 or layout.first_attention_norm
        if self.has_attention_norm:
            place(self, layout.attention_norm, new_norm(config, width))
        for norm, size in (
            (layout.query_norm, self.head_dim),
            (layout.key_norm, self.head_dim),
            (layout.attention_output_norm, width),
        ):
            if norm is not None:
                place(self, norm, new_norm(config, size))
        self.is_gate_fused = layout.gate == layout.up
        if layout.gate is not None and not self.is_gate_fused:
            place(self, layout.gate, Linear(width, hidden, bias=setting(layout.up_bias)))
        up_width = 2 * hidden if self.is_gate_fused else hidden
        place(self, layout.up, Linear(width, up_width, bias=setting(layout.up_bias)))
        place(self, layout.down, Linear(hidden, width, bias=setting(layout.down_bias)))
        place(self, layout.mlp_norm, new_norm(config, width))
        if layout.mlp_output_norm is not None:
            place(self, layout.mlp_output_norm, new_norm(config, width))

        self.activation = (GELUS if layout.gate is None else ACTIVATIONS)[setting(layout.activation)]
        scale = setting(layout.scale)
        self.scale, self.window = (self.head_dim if scale is None else scale) ** -0.5, config.window(layer)
        self.attention_pdrop, self.out_pdrop = setting(layout.attention_dropout), setting(layout.out_dropout)
        self.hidden_pdrop, self.mlp_pdrop = setting(layout.hidden_dropout), setting(layout.mlp_dropout)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        tables: Tables = None,
        padding: Padding = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x, residual) for the next layer.

        Args:
            x: (batch, tokens, width): the output of the previous layer, of a pre-norm layer not yet added to the
                residual sum.
            residual: the residual sum of pre-norm layers; None for the first.
            bias: (1, heads, tokens, tokens), added to the scores.
        """
        layout, training = self.layout, self.training
        out_pdrop, mlp_pdrop = (self.out_pdrop, self.mlp_pdrop) if training else (0.0, 0.0)
        if layout.norm_place == "post":
            x, _ = part(self, layout.attention_norm)(self.attend(x, tables, padding, bias), x, out_pdrop)
            return part(self, layout.mlp_norm)(self.feed_forward(x), x, mlp_pdrop)[0], None
        if self.has_attention_norm:
            x, residual = part(self, layout.attention_norm)(x, residual)
        else:
            residual = x
        x = self.attend(x, tables, padding, bias)
        if layout.attention_output_norm is not None:
            x = part(self, layout.attention_output_norm)(x)[0]
        x, residual = part(self, layout.mlp_norm)(x, residual, out_pdrop)
        x = self.feed_forward(x)
        if layout.mlp_output_norm is not None:
            x = part(self, layout.mlp_output_norm)(x)[0]
        return x, residual

    def describe(self) -> Layer | None:
        """forward() of a post-norm layer, for fastlm.models.encode_layers; None if it computes anything else."""
        layout, activation = self.layout, COMPILED_ACTIVATIONS.get(self.activation)
        if (
            (layout.norm_place, layout.norm) != ("post", "layer")
            or layout.rotary
            or layout.gate is not None
            or layout.query_norm is not None
            or self.window is not None
            or activation is None
            or type(self.scale) is not float
            or (self.training and (self.attention_pdrop or self.out_pdrop or self.mlp_pdrop))
            or not all(is_part(module, PARTS) for module in self.modules())
        ):
            return None
        first, second = part(self, layout.attention_norm), part(self, layout.mlp_norm)
        out, up, down = part(self, layout.out), part(self, layout.up), part(self, layout.down)
        qkv = [part(self, path) for path in layout.qkv]
        width = out.weight.shape[-1]
        if first.eps != second.eps or type(self.head_dim) is not int or self.head_dim < 1 or width % self.head_dim:
            return None
        return Layer.of(
            [(projection.weight, projection.bias) for projection in qkv],
            attention_norm=first.weight,
            attention_norm_bias=first.bias,
            mlp_norm=second.weight,
            mlp_norm_bias=second.bias,
            output=out.weight,
            output_bias=out.bias,
            up=up.weight,
            up_bias=up.bias,
            down=down.weight,
            down_bias=down.bias,
            eps=first.eps,
            activation=activation,
            num_heads=width // self.head_dim,
            head_dim=self.head_dim,
            scale=self.scale,
        )

    def attend(self, x: Tensor, tables: Tables, padding: Padding, bias: Tensor | None) -> Tensor:
        layout = self.layout
        projected = [part(self, path)(x).unflatten(-1, (-1, self.head_dim)) for path in layout.qkv]
        if len(projected) == 1:
            projected = list(projected[0].unflatten(-2, (3, -1)).unbind(-3))
        query, key, value = projected  # (batch, tokens, heads, head_dim)
        if layout.query_norm is not None:
            query, key = part(self, layout.query_norm)(query)[0], part(self, layout.key_norm)(key)[0]
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if tables is not None:
            query, key = rotary(query, key, *tables)
        dropout_p = self.attention_pdrop if self.training else 0.0
        options: Any = {"scale": self.scale, "dropout_p": dropout_p}
        if isinstance(padding, Packed):
            ends = padding.cu_seqlens
            query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
            if bias is None:
                context = attention_varlen(query, key, value, ends, ends, window=self.window, **options)
            else:
                context = attention_with_bias(query, key, value, padding, bias, **options)
            context = context.flatten(1)[None]
        else:
            out = attention(query, key, value, mask=bias, key_padding=padding, window=self.window, **options)
            context = merge_heads(out)
        projection: Tensor = part(self, layout.out)(context)
        return projection

    def feed_forward(self, x: Tensor) -> Tensor:
        layout = self.layout
        up, down = part(self, layout.up), part(self, layout.down)
        if layout.gate is None:
            return gelu_mlp(
                x, up.weight, up.bias, down.weight, down.bias, approximate=self.activation, recompute=self.recompute
            )
        if self.hidden_pdrop and self.training:
            dropped: Tensor = down(F.dropout(self.gated(x), self.hidden_pdrop))
            return dropped
        if self.is_gate_fused:
            gate_weight, up_weight = up.weight.chunk(2)
            gate_bias, up_bias = (None, None) if up.bias is None else up.bias.chunk(2)
        else:
            gate = part(self, layout.gate)
            gate_weight, up_weight, gate_bias, up_bias = gate.weight, up.weight, gate.bias, up.bias
        return glu_mlp(
            x,
            gate_weight,
            up_weight,
            down.weight,
            gate_bias,
            up_bias,
            down.bias,
            activation=self.activation,
            recompute=self.recompute,
        )

    def gated(self, x: Tensor) -> Tensor:
        """What the down projection takes."""
        layout, up = self.layout, part(self, self.layout.up)(x)
        gate, up = up.chunk(2, -1) if self.is_gate_fused else (part(self, layout.gate)(x), up)
        return FUNCTIONS[self.activation](gate) * up


PARTS = parts_of(EncoderLayer, Linear, LayerNorm, nn.Module)
COMPILED_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # by the argument `approximate` of gelu_mlp


def describe(layer: nn.Module) -> Layer | None:
    """Not of a subclass or another module, which may compute anything."""
    return layer.describe() if type(layer) is EncoderLayer else None
