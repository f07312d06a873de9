"""BERT with its masked-token head in plain PyTorch: the baseline that fastlm is compared with.

It has the state-dict keys and initial weights of fastlm.models.BertForMaskedLM and uses PyTorch's fastest operator for
each part. As in Hugging Face's model, logits are computed at every position, and the loss ignores positions without a
target.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Output(nn.Module):
    """A projection, dropout, the residual addition and LayerNorm."""

    def __init__(self, in_features: int, width: int, epsilon: float, dropout: float):
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return (
            F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
            .transpose(1, 2)
            .flatten(2)
        )


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, epsilon, dropout = config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob
        self.attention = nn.ModuleDict(
            {
                "self": SelfAttention(width, config.num_attention_heads, config.attention_probs_dropout_prob),
                "output": Output(width, width, epsilon, dropout),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = Output(config.intermediate_size, width, epsilon, dropout)

    def forward(self, x):
        x = self.attention["output"](self.attention["self"](x), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class PlainBert(nn.Module):
    def __init__(self, config):
        """config: fastlm's or transformers' BertConfig. Only sizes and dropout may differ from the defaults."""
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.bert = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(
                    {
                        "word_embeddings": nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id),
                        "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
                        "token_type_embeddings": nn.Embedding(config.type_vocab_size, width),
                        "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps),
                    }
                ),
                "encoder": nn.ModuleDict(
                    {"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}
                ),
            }
        )
        predictions = nn.ModuleDict(
            {
                "transform": nn.ModuleDict(
                    {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)}
                ),
                "decoder": nn.Linear(width, config.vocab_size),
            }
        )
        predictions.bias = predictions["decoder"].bias
        predictions["decoder"].weight = self.bert["embeddings"]["word_embeddings"].weight
        self.cls = nn.ModuleDict({"predictions": predictions})

    @classmethod
    def like(cls, model: nn.Module) -> "PlainBert":
        """A copy of a fastlm.models.BertForMaskedLM, on the same device."""
        plain = cls(model.config).to(next(model.parameters()).device)
        plain.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        return plain

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, (batch, tokens, vocabulary)."""
        embeddings, head = self.bert["embeddings"], self.cls["predictions"]
        x = embeddings["word_embeddings"](input_ids) + embeddings["token_type_embeddings"].weight[0]
        x = embeddings["LayerNorm"](x + embeddings["position_embeddings"].weight[: input_ids.shape[1]])
        x = F.dropout(x, self.config.hidden_dropout_prob, self.training)
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x)
        x = head["transform"]["LayerNorm"](F.gelu(head["transform"]["dense"](x)))
        return head["decoder"](x)

    @staticmethod
    def loss(model: "PlainBert", inputs: Tensor, targets: Tensor) -> Tensor:
        """targets: the original token at positions to predict, -100 elsewhere."""
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
