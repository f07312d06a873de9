"""Decoders with RMSNorm, rotary positions, grouped queries and a gated MLP: Llama and the families described in
decoder_config.py.

Residual additions are fused into the norms: each sub-block returns its output and the residual sum separately, and
the next norm adds and normalises in one pass over memory.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlm.core.errors import check_flag, check_integer, mismatch, wrong_type
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel
from fastlm.models.cache import KVCache
from fastlm.models.compiled import is_part, parts_of
from fastlm.models.decode_step import decode_step
from fastlm.models.decoder_config import ACTIVATIONS, DecoderConfig
from fastlm.models.language_model import LanguageModel
from fastlm.models.layers import (
    Embedding,
    FeedForward,
    Linear,
    RMSNorm,
    attention_packed,
    embed_tokens,
    merge_heads,
    split_heads,
)
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.models.packing import check_alone, check_cu_seqlens, positions_of
from fastlm.models.rope import Rope
from fastlm.ops.attention import attention
from fastlm.ops.decoder_layer import Layer
from fastlm.ops.glu_mlp import glu_mlp
from fastlm.ops.rotary import rotary

Tables = tuple[Tensor, Tensor]  # cos and sin of the positions


def norm_of(width: int, config: DecoderConfig) -> RMSNorm:
    return RMSNorm(width, config.rms_norm_eps, config.unit_offset)


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        assert head_dim is not None and config.num_key_value_heads is not None
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        query_bias = config.attention_bias if config.query_bias is None else config.query_bias
        output_bias = config.attention_bias if config.output_bias is None else config.output_bias
        self.q_proj = Linear(width, self.num_heads * head_dim, bias=query_bias)
        self.k_proj = Linear(width, self.num_kv_heads * head_dim, bias=query_bias)
        self.v_proj = Linear(width, self.num_kv_heads * head_dim, bias=query_bias)
        self.o_proj = Linear(self.num_heads * head_dim, width, bias=output_bias)
        self.query_key_norm = config.query_key_norm
        if self.query_key_norm:
            self.q_norm, self.k_norm = norm_of(head_dim, config), norm_of(head_dim, config)
        self.layer, self.window = layer, config.window(layer)
        self.scale, self.softcap = config.scale(), config.score_softcap()
        self.pdrop, self.rotates = config.attention_dropout, config.rotates(layer)

    def forward(
        self,
        x: Tensor,
        tables: Tables,
        key_padding: Tensor | None,
        cache: KVCache | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        query = split_heads(self.q_proj(x), self.num_heads)
        key, value = (split_heads(project(x), self.num_kv_heads) for project in (self.k_proj, self.v_proj))
        if self.query_key_norm:
            query, key = self.q_norm(query)[0], self.k_norm(key)[0]
        if self.rotates:
            query, key = rotary(query, key, *tables)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        options: dict[str, Any] = {
            "causal": True,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.pdrop if self.training else 0.0,
        }
        if cu_seqlens is not None:
            context = attention_packed(query, key, value, cu_seqlens, **options)
        else:
            # A cache with a window returns the last keys only.
            key_padding = key_padding if key_padding is None else key_padding[:, -key.shape[2] :]
            context = attention(query, key, value, key_padding=key_padding, **options)
        return self.o_proj(merge_heads(context))


class DecoderMLP(FeedForward):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, hidden, bias=config.mlp_bias)
        self.up_proj = Linear(width, hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return glu_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            gate.bias,
            up.bias,
            down.bias,
            activation=self.activation,
            recompute=self.recompute,
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = DecoderAttention(config, layer)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = norm_of(width, config)
        self.post_attention_layernorm = norm_of(width, config)
        self.output_norms = config.output_norms
        if self.output_norms:
            self.pre_feedforward_layernorm = norm_of(width, config)
            self.post_feedforward_layernorm = norm_of(width, config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        tables: Tables,
        key_padding: Tensor | None,
        cache: KVCache | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x, residual) for the next layer.

        Args:
            x: the output of the previous layer, not yet added to the residual sum; for the first layer the embeddings.
            residual: the residual sum; None for the first layer.
        """
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, tables, key_padding, cache, cu_seqlens)
        if not self.output_norms:
            x, residual = self.post_attention_layernorm(x, residual)
            return self.mlp(x), residual
        x, residual = self.pre_feedforward_layernorm(self.post_attention_layernorm(x)[0], residual)
        return self.post_feedforward_layernorm(self.mlp(x))[0], residual

    def describe(self) -> tuple[int, Layer] | None:
        """forward() on one token, for fastlm.models.decode_step; None if a part is not as this class makes it."""
        if not all(is_part(module, PARTS) for module in self.modules()):
            return None
        attention, mlp = self.self_attn, self.mlp
        before_mlp, output_norms = self.post_attention_layernorm, {}
        if self.output_norms:
            before_mlp = self.pre_feedforward_layernorm
            output_norms = {
                "attention_output_norm": self.post_attention_layernorm.weight,
                "mlp_output_norm": self.post_feedforward_layernorm.weight,
            }
        if attention.query_key_norm:
            output_norms |= {"query_norm": attention.q_norm.weight, "key_norm": attention.k_norm.weight}
        norms = [module for module in self.modules() if isinstance(module, RMSNorm)]
        if len({(norm.eps, norm.unit_offset) for norm in norms}) > 1:
            return None
        found = Layer.of(
            attention_norm=self.input_layernorm.weight,
            mlp_norm=before_mlp.weight,
            **output_norms,
            query=attention.q_proj.weight,
            query_bias=attention.q_proj.bias,
            key=attention.k_proj.weight,
            key_bias=attention.k_proj.bias,
            value=attention.v_proj.weight,
            value_bias=attention.v_proj.bias,
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            gate=mlp.gate_proj.weight,
            gate_bias=mlp.gate_proj.bias,
            up=mlp.up_proj.weight,
            up_bias=mlp.up_proj.bias,
            down=mlp.down_proj.weight,
            down_bias=mlp.down_proj.bias,
            conv1d=False,
            layer_norm=False,
            unit_offset=self.input_layernorm.unit_offset,
            eps=self.input_layernorm.eps,
            activation=mlp.activation,
            num_heads=attention.num_heads,
            rotates=attention.rotates,
            scale=attention.scale,
            softcap=attention.softcap,
            window=None if attention.window is None else attention.window[0],
        )
        return attention.layer, found


PARTS = parts_of(DecoderLayer, DecoderAttention, DecoderMLP, RMSNorm, Linear)


class DecoderPretrainedModel(PretrainedModel):
    config_class = DecoderConfig
    base_model_prefix = "model"

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.config.num_hidden_layers, capacity, self.config.windows())


class DecoderModel(DecoderPretrainedModel):
    """A decoder without a head: token ids → hidden states after the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = norm_of(config.hidden_size, config)
        assert config.layer_types is not None
        self.ropes = {kind: Rope(config, kind) for kind in dict.fromkeys(config.layer_types)}
        self.initialise(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> ModelOutput:
        """The arguments have Hugging Face's names and meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, hidden_size).
            past_key_values: the cache; keys and values of this call are appended in place, without gradients.
            attention_mask: (batch, cached tokens + tokens), 0 at padding.
            position_ids: (batch, tokens); None: positions continue from the length of the cache, padding included.
            use_cache: allocate a cache with the capacity of the context.
            cu_seqlens: (sequences + 1,), int32 or int64: 0, then where each of the packed sequences ends in
                batch · tokens; each row begins with a new one. Attention does not cross the boundaries, and
                position_ids count from them if they are None. Excludes padding and the cache.
        """
        config, weight = self.config, self.embed_tokens.weight
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            raise wrong_type("past_key_values", "a KVCache", past_key_values)
        use_cache = check_flag("use_cache", use_cache)
        past = past_key_values.length if past_key_values is not None else 0
        context = config.max_position_embeddings
        batch, tokens = inputs.check_tokens(input_ids, inputs_embeds, weight, past, context)
        if cu_seqlens is not None:
            check_alone(past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache)
            cu_seqlens = check_cu_seqlens(cu_seqlens, batch, tokens, weight.device)
            position_ids = positions_of(cu_seqlens, batch, tokens) if position_ids is None else position_ids
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=weight.device)[None]
        else:
            inputs.check_ids("position_ids", position_ids, below=context, device=weight.device, shape=(batch, tokens))
        key_padding = inputs.key_padding_mask(attention_mask, batch, past + tokens, weight.device)
        cache = past_key_values
        if use_cache and cache is None:
            cache = self.new_cache(context)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise mismatch("past_key_values", "None with gradient checkpointing", "a cache")

        x, table = embed_tokens(self.embed_tokens, input_ids, inputs_embeds)
        if config.scaled_embeddings and inputs_embeds is None:
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)  # rounded, as in transformers
        tables = {kind: self.tables(position_ids, kind) for kind in self.ropes}
        of_layers = [tables[kind] for kind in config.layer_types]
        stepped = decode_step(self.layers, x, cache, of_layers, key_padding)
        if stepped is not None:
            x, residual = stepped
        else:
            residual = None
            for layer, own_tables in zip(self.layers, of_layers, strict=True):
                x, residual = self.run_layer(layer, x, residual, own_tables, key_padding, cache, cu_seqlens)
        x, _ = self.norm(x, residual)
        if cache is not None:
            cache.length += tokens
        output = ModelOutput(x, past_key_values=cache)
        output.shared_table = table
        return output

    def tables(self, position_ids: Tensor, layer_type: str) -> Tables:
        cos, sin = self.ropes[layer_type].tables(position_ids)
        return (cos.double(), sin.double()) if self.dtype == torch.float64 else (cos, sin)


class CausalLM(DecoderPretrainedModel, LanguageModel):
    """A decoder with the language-modelling head: token ids → logits of the next token at every position.

    The config's class describes the family: LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config,
    Gemma2Config or Gemma3Config. from_pretrained takes it from config.json.
    """

    tied: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.add_head()

    @property
    def logit_softcap(self) -> float | None:
        softcap: float | None = self.config.logit_softcap()
        return softcap

    @property
    def architecture(self) -> str:
        return str(self.config.architecture)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of DecoderModel, and:

        labels: (batch, tokens), usually input_ids: logits at position i are compared with label i + 1, and labels of
            -100 are ignored. In training mode the loss is computed without materialising the logits, which are then
            None.
        logits_to_keep: compute the logits of this many last positions only; 0: of all.
        """
        logits_to_keep = check_integer("logits_to_keep", logits_to_keep, "an integer of 0 or more", range(2**63))
        hidden = self.model(
            input_ids, past_key_values, attention_mask, position_ids, inputs_embeds, use_cache, cu_seqlens
        )
        return self.project(hidden, self.output_weight(hidden), labels, logits_to_keep, cu_seqlens)

    def output_weight(self, hidden: ModelOutput) -> Tensor:
        return self.output_projection(self.lm_head.weight, self.model.embed_tokens, hidden)
