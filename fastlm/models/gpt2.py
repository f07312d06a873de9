"""GPT-2 (Radford et al., 2019): pre-norm blocks, causal attention, learned positions.

The residual stream is never added on its own: a sub-block hands on what it computed together with the stream, and the next LayerNorm adds the two, drops out
and normalises in one pass over memory.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.generation.cache import KVCache
from fastlm.generation.decode import Streamer, generate
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel
from fastlm.models.config import GELUS, GPT2Config
from fastlm.models.layers import (
    Conv1D,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    embed,
    heads_of,
    joined,
    look_up,
    loss_and_logits,
)
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.ops.boundary import mismatch


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.layer, self.heads, self.pdrop = layer, config.n_head, config.attn_pdrop
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, key_padding: Tensor | None, cache: KVCache | None) -> Tensor:
        # The attention reads the three where the projection left them, side by side in every token's row.
        query, key, value = (heads_of(part, self.heads) for part in self.c_attn(x).unflatten(-1, (3, -1)).unbind(-2))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        dropout_p = self.pdrop if self.training else 0.0
        return self.c_proj(
            joined(
                fastlm.attention(
                    query, key, value, causal=True, key_padding=key_padding, scale=self.scale, dropout_p=dropout_p
                )
            )
        )


class GPT2MLP(FeedForward):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        hidden_width = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, hidden_width)
        self.c_proj = Conv1D(hidden_width, config.n_embd)
        self.approximate = GELUS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return fastlm.gelu_mlp(
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
        self, x: Tensor, stream: Tensor | None, key_padding: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: what the block before computed, not yet added to the stream; or the embeddings, and no stream. Returns the same pair for the next."""
        dropout_p = self.pdrop if self.training else 0.0
        x, stream = self.ln_1(x, stream, dropout_p if stream is not None else 0.0)
        x, stream = self.ln_2(self.attn(x, key_padding, cache), stream, dropout_p)
        return self.mlp(x), stream


class GPT2PretrainedModel(PretrainedModel):
    config_class = GPT2Config
    base_model_prefix = "transformer"

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        super().initialise(root)
        for module in root.modules():
            if isinstance(
                module, (GPT2Attention, GPT2MLP)
            ):  # 2 · n_layer of these are added up along the stream; this keeps the variance of the sum
                module.c_proj.weight.normal_(0.0, self.config.initializer_range / math.sqrt(2 * self.config.n_layer))


class GPT2Model(GPT2PretrainedModel):
    """Tokens → hidden states after the last LayerNorm."""

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
    ) -> ModelOutput:
        """Hugging Face's arguments and their meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, n_embd).
            past_key_values: keys and values of earlier tokens; those of this call are written behind them, in place and without gradients.
            attention_mask: (batch, earlier tokens + tokens), 0 at padding.
            token_type_ids: (batch, tokens), looked up in the table of tokens.
            position_ids: (batch, tokens); None: counted from the end of the cache, padding included.
            use_cache: begin a cache, as long as the context.
        """
        past = past_key_values.length if past_key_values is not None else 0
        batch, tokens = inputs.batch_and_tokens(
            input_ids, inputs_embeds, self.wte.weight, past, self.config.n_positions
        )
        device = self.wte.weight.device
        if position_ids is not None:
            inputs.ids(
                "position_ids", position_ids, below=self.config.n_positions, device=device, shape=(batch, tokens)
            )
        key_padding = inputs.key_padding(attention_mask, batch, past + tokens, device)
        cache = past_key_values
        if use_cache and cache is None:
            cache = KVCache(self.config.n_layer, self.config.n_positions)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise mismatch(
                "past_key_values", "no cache while layers are computed twice (gradient checkpointing)", "one"
            )

        x, table = look_up(self.wte, input_ids, inputs_embeds)
        x = x + embed(self.wpe, position_ids, slice(past, past + tokens))
        if token_type_ids is not None:
            inputs.ids(
                "token_type_ids", token_type_ids, below=self.config.vocab_size, device=device, shape=(batch, tokens)
            )
            x = x + self.wte(token_type_ids)
        x, stream = F.dropout(x, self.config.embd_pdrop, self.training), None
        for block in self.h:
            x, stream = self.run(block, x, stream, key_padding, cache)
        x, _ = self.ln_f(x, stream, self.config.resid_pdrop if self.training else 0.0)
        if cache is not None:
            cache.length += tokens
        output = ModelOutput(x, past_key_values=cache)
        output.table = table
        return output


class GPT2LMHeadModel(GPT2PretrainedModel):
    """GPT-2 with the output projection: tokens → a score for every token that could follow each of them."""

    tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(
            config.n_embd, config.vocab_size, bias=False, device="meta" if config.tie_word_embeddings else None
        )
        self.initialise(self.lm_head)
        self.tie_weights()

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
    ) -> HeadOutput:
        """GPT2Model's arguments, and:

        labels: (batch, tokens), usually input_ids themselves: the score after token i is compared with label i + 1; -100 counts for nothing. In training mode
            the loss is computed without the logits, which are then None.
        logits_to_keep: logits of so many last tokens only; 0: of all.
        """
        hidden = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache
        )
        x = hidden.last_hidden_state
        if labels is not None:
            inputs.ids(
                "labels",
                labels,
                below=self.config.vocab_size,
                device=x.device,
                shape=tuple(x.shape[:2]),
                ignore=inputs.IGNORE,
            )
            labels = F.pad(labels[:, 1:], (0, 1), value=inputs.IGNORE)
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        loss, logits = loss_and_logits(x, self.output_weight(hidden), None, labels, self.training)
        if labels is not None and logits is not None and logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return HeadOutput(loss, logits, hidden.past_key_values)

    def output_weight(self, hidden: ModelOutput) -> Tensor:
        """The weight of lm_head for the loss of `hidden`, which the transformer returned; where it is tied, its gradient and the embedding's are one buffer."""
        return self.projection(self.lm_head.weight, self.transformer.wte, hidden)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        streamer: Streamer | None = None,
        pad_token_id: int | None = None,
        cuda_graphs: bool = True,
    ) -> Tensor:
        """Continues every row of input_ids; see fastlm.generation.generate."""
        return generate(
            self,
            input_ids,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            eos_token_id,
            seed,
            attention_mask,
            streamer,
            pad_token_id,
            cuda_graphs,
        )
