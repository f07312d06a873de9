"""GPT-2 (Radford et al., 2019): pre-norm decoder blocks, causal attention, learned positions.

Residual additions are fused into the norms: each sub-block returns its output and the residual sum separately, and
the next LayerNorm applies dropout, adds and normalises in one pass over memory.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.core.errors import check_flag, check_integer, mismatch, wrong_type
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel, draw_normal
from fastlm.models.cache import KVCache
from fastlm.models.compiled import is_part, parts_of
from fastlm.models.config import GELUS, GPT2Config
from fastlm.models.decode_step import decode_step
from fastlm.models.language_model import LanguageModel
from fastlm.models.layers import (
    Conv1D,
    Embedding,
    FeedForward,
    LayerNorm,
    attention_packed,
    embed,
    embed_tokens,
    merge_heads,
    split_heads,
)
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.models.packing import check_alone, check_cu_seqlens, positions_of
from fastlm.ops.attention import attention
from fastlm.ops.decoder_layer import Layer
from fastlm.ops.gelu_mlp import gelu_mlp


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.layer, self.num_heads, self.pdrop = layer, config.n_head, config.attn_pdrop
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(
        self, x: Tensor, key_padding: Tensor | None, cache: KVCache | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, -1)).unbind(-2)  # views: attention takes strided inputs
        query, key, value = (split_heads(part, self.num_heads) for part in qkv)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        dropout_p = self.pdrop if self.training else 0.0
        if cu_seqlens is not None:
            context = attention_packed(
                query, key, value, cu_seqlens, causal=True, scale=self.scale, dropout_p=dropout_p
            )
            return self.c_proj(merge_heads(context))
        context = attention(
            query, key, value, causal=True, key_padding=key_padding, scale=self.scale, dropout_p=dropout_p
        )
        return self.c_proj(merge_heads(context))


class GPT2MLP(FeedForward):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        hidden_size = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, hidden_size)
        self.c_proj = Conv1D(hidden_size, config.n_embd)
        self.approximate = GELUS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            self.c_proj.bias,
            approximate=self.approximate,
            layout="conv1d",
            recompute=self.recompute,
        )


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)
        self.pdrop = config.resid_pdrop

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x, residual) for the next block.

        Args:
            x: the output of the previous block, not yet added to the residual sum; for the first block the embeddings.
            residual: the residual sum; None for the first block.
        """
        dropout_p = self.pdrop if self.training else 0.0
        x, residual = self.ln_1(x, residual, dropout_p if residual is not None else 0.0)
        x, residual = self.ln_2(self.attn(x, key_padding, cache, cu_seqlens), residual, dropout_p)
        return self.mlp(x), residual

    def describe(self) -> tuple[int, Layer] | None:
        """forward() on one token, for fastlm.models.decode_step; None if a part is not as this class makes it."""
        attention, mlp = self.attn, self.mlp
        if not all(is_part(module, PARTS) for module in self.modules()) or self.ln_1.eps != self.ln_2.eps:
            return None
        found = Layer.of(
            attention_norm=self.ln_1.weight,
            attention_norm_bias=self.ln_1.bias,
            mlp_norm=self.ln_2.weight,
            mlp_norm_bias=self.ln_2.bias,
            query=attention.c_attn.weight,
            query_bias=attention.c_attn.bias,
            output=attention.c_proj.weight,
            output_bias=attention.c_proj.bias,
            up=mlp.c_fc.weight,
            up_bias=mlp.c_fc.bias,
            down=mlp.c_proj.weight,
            down_bias=mlp.c_proj.bias,
            conv1d=True,
            layer_norm=True,
            unit_offset=False,
            eps=self.ln_1.eps,
            activation="gelu" if mlp.approximate == "none" else "gelu_tanh",
            num_heads=attention.num_heads,
            rotates=False,
            scale=attention.scale,
            softcap=None,
            window=None,
        )
        return attention.layer, found


PARTS = parts_of(GPT2Block, GPT2Attention, GPT2MLP, LayerNorm, Conv1D)


class GPT2PretrainedModel(PretrainedModel):
    config_class = GPT2Config
    base_model_prefix = "transformer"

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        super().initialise(root)
        # 2 · n_layer projections are added to the residual stream; this scale keeps its variance independent of depth.
        std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
        for module in root.modules():
            if isinstance(module, (GPT2Attention, GPT2MLP)):
                draw_normal(module.c_proj.weight, std)


class GPT2Model(GPT2PretrainedModel):
    """GPT-2 without a head: token ids → hidden states after the final LayerNorm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([GPT2Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.initialise(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> ModelOutput:
        """The arguments have Hugging Face's names and meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, n_embd).
            past_key_values: the cache; keys and values of this call are appended in place, without gradients.
            attention_mask: (batch, cached tokens + tokens), 0 at padding.
            token_type_ids: (batch, tokens), embedded with the token embedding.
            position_ids: (batch, tokens); None: positions continue from the length of the cache, padding included.
            use_cache: allocate a cache with the capacity of the context.
            cu_seqlens: (sequences + 1,), int32 or int64: 0, then where each of the packed sequences ends in
                batch · tokens; each row begins with a new one. Attention does not cross the boundaries, and
                position_ids count from them if they are None. Excludes padding and the cache.
        """
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            raise wrong_type("past_key_values", "a KVCache", past_key_values)
        use_cache = check_flag("use_cache", use_cache)
        past = past_key_values.length if past_key_values is not None else 0
        batch, tokens = inputs.check_tokens(input_ids, inputs_embeds, self.wte.weight, past, self.config.n_positions)
        device, shape = self.wte.weight.device, (batch, tokens)
        if cu_seqlens is not None:
            check_alone(past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache)
            cu_seqlens = check_cu_seqlens(cu_seqlens, batch, tokens, device)
            position_ids = positions_of(cu_seqlens, batch, tokens) if position_ids is None else position_ids
        if position_ids is not None:
            inputs.check_ids("position_ids", position_ids, below=self.config.n_positions, device=device, shape=shape)
        key_padding = inputs.key_padding_mask(attention_mask, batch, past + tokens, device)
        cache = past_key_values
        if use_cache and cache is None:
            cache = KVCache(self.config.n_layer, self.config.n_positions)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise mismatch("past_key_values", "None with gradient checkpointing", "a cache")

        x, table = embed_tokens(self.wte, input_ids, inputs_embeds)
        x = x + embed(self.wpe, position_ids, slice(past, past + tokens))
        if token_type_ids is not None:
            inputs.check_ids("token_type_ids", token_type_ids, below=self.config.vocab_size, device=device, shape=shape)
            x = x + self.wte(token_type_ids)
        x, residual = F.dropout(x, self.config.embd_pdrop, self.training), None
        stepped = decode_step(self.h, x, cache, [(None, None)] * len(self.h), key_padding)
        if stepped is not None:
            x, residual = stepped
        else:
            for block in self.h:
                x, residual = self.run_layer(block, x, residual, key_padding, cache, cu_seqlens)
        x, _ = self.ln_f(x, residual, self.config.resid_pdrop if self.training else 0.0)
        if cache is not None:
            cache.length += tokens
        output = ModelOutput(x, past_key_values=cache)
        output.shared_table = table
        return output


class GPT2LMHeadModel(GPT2PretrainedModel, LanguageModel):
    """GPT-2 with the language-modelling head: token ids → logits of the next token at every position."""

    tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.add_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of GPT2Model, and:

        labels: (batch, tokens), usually input_ids: logits at position i are compared with label i + 1, and labels of
            -100 are ignored. In training mode the loss is computed without materialising the logits, which are then
            None.
        logits_to_keep: compute the logits of this many last positions only; 0: of all.
        """
        logits_to_keep = check_integer("logits_to_keep", logits_to_keep, "an integer of 0 or more", range(2**63))
        hidden = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache,
            cu_seqlens,
        )
        return self.project(hidden, self.output_weight(hidden), labels, logits_to_keep, cu_seqlens)

    def output_weight(self, hidden: ModelOutput) -> Tensor:
        return self.output_projection(self.lm_head.weight, self.transformer.wte, hidden)
