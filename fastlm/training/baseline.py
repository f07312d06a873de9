"""GPT-2 in plain PyTorch: the baseline that fastlm is compared with.

It has the state-dict keys, initial weights and arguments of fastlm.models.GPT2LMHeadModel, and uses PyTorch's fastest
operator for each part: fused attention, fused layer norm, addmm on the Conv1D layout, GELU, fused cross-entropy.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor | None
    cache: list[tuple[Tensor, Tensor]] | None = None


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as in GPT-2's checkpoints."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, residual_dropout: float):
        super().__init__()
        self.heads, self.dropout, self.residual_dropout = heads, dropout, residual_dropout
        self.c_attn = Conv1D(width, 3 * width)
        self.c_proj = Conv1D(width, width)

    def forward(self, x, past):
        batch, tokens, width = x.shape
        query, key, value = self.c_attn(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, dropout_p=self.dropout if self.training else 0.0
        )
        y = self.c_proj(context.transpose(1, 2).reshape(batch, tokens, width))
        return F.dropout(y, self.residual_dropout, self.training), (key, value)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.c_fc = Conv1D(width, hidden)
        self.c_proj = Conv1D(hidden, width)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attn = Attention(width, config.n_head, config.attn_pdrop, config.resid_pdrop)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.mlp = MLP(width, 4 * width, config.resid_pdrop)

    def forward(self, x, past):
        attention_output, new_past = self.attn(self.ln_1(x), past)
        x = x + attention_output
        return x + self.mlp(self.ln_2(x)), new_past


class PlainGPT2(nn.Module):
    def __init__(self, config):
        """config: fastlm's or transformers' GPT2Config. Only sizes and dropout may differ from the defaults."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    @classmethod
    def like(cls, model: nn.Module) -> "PlainGPT2":
        """A copy of a fastlm.models.GPT2LMHeadModel, on the same device."""
        plain = cls(model.config).to(next(model.parameters()).device)
        plain.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        return plain

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, cache: list | None = None) -> Output:
        """Returns the loss and all logits with targets, else the logits of the last position and the cache.

        Args:
            targets: the next token of every position.
            cache: the cache that the call for the previous tokens returned; input_ids is then (batch, 1).
        """
        start = cache[0][0].shape[2] if cache else 0
        x = self.transformer.wte(input_ids) + self.transformer.wpe.weight[start : start + input_ids.shape[1]]
        x = F.dropout(x, self.config.embd_pdrop, self.training)
        new_cache = []
        for i, block in enumerate(self.transformer.h):
            x, layer_cache = block(x, cache[i] if cache else None)
            new_cache.append(layer_cache)
        x = self.transformer.ln_f(x)
        if targets is None:
            return Output(None, self.lm_head(x[:, -1:]), new_cache)
        logits = self.lm_head(x)
        return Output(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)

    @staticmethod
    def loss(model: "PlainGPT2", inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs, targets).loss

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy decoding with a KV cache that grows by concatenation, as in a short PyTorch script."""
        output = self(input_ids)
        tokens = [input_ids]
        for step in range(max_new_tokens):
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
            if step + 1 < max_new_tokens:
                output = self(tokens[-1], cache=output.cache)
        return torch.cat(tokens, 1)
