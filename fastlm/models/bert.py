"""BERT (Devlin et al., 2018, arXiv:1810.04805): a post-norm encoder with learned positions and token types.

Every residual addition is followed by a LayerNorm; one operator applies dropout, adds and normalises in one pass over
memory. Of its two results only the normalised one is used.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.core.errors import check_flag
from fastlm.core.tracing import needs_custom_op
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel
from fastlm.models.classification import check_labels, classify
from fastlm.models.config import GELUS
from fastlm.models.encoder_config import BertConfig
from fastlm.models.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    embed,
    embed_tokens,
    loss_and_logits,
    merge_heads,
    split_heads,
)
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.ops.attention import attention
from fastlm.ops.gelu_mlp import gelu_mlp


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pdrop = config.hidden_dropout_prob

    def forward(self, word_embeds: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """word_embeds: (batch, tokens, hidden_size)."""
        # Without token_type_ids every token has type 0.
        x = word_embeds + embed(self.token_type_embeddings, token_type_ids, slice(0, 1))
        x = x + embed(self.position_embeddings, position_ids, slice(0, word_embeds.shape[1]))
        return F.dropout(self.LayerNorm(x)[0], self.pdrop, self.training)


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # Three products: concatenating the weights at every call costs at least as much as one product saves.
        self.query, self.key, self.value = (Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.num_heads, self.pdrop = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, x: Tensor, key_padding: Tensor | None) -> Tensor:
        query, key, value = (
            split_heads(projection(x), self.num_heads) for projection in (self.query, self.key, self.value)
        )
        dropout_p = self.pdrop if self.training else 0.0
        return merge_heads(attention(query, key, value, key_padding=key_padding, dropout_p=dropout_p))


class BertOutput(nn.Module):
    """The parameters at the end of a sub-block: a projection to hidden_size and the LayerNorm after the addition."""

    def __init__(self, config: BertConfig, in_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)


class BertLayer(FeedForward):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)
        self.pdrop, self.approximate = config.hidden_dropout_prob, GELUS[config.hidden_act]

    def forward(self, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        dropout_p = self.pdrop if self.training else 0.0
        attention_output = self.attention.output.dense(self.attention.self(x, key_padding))
        x, _ = self.attention.output.LayerNorm(attention_output, x, dropout_p)
        up, down = self.intermediate.dense, self.output.dense
        mlp_output = gelu_mlp(
            x, up.weight, up.bias, down.weight, down.bias, approximate=self.approximate, recompute=self.recompute
        )
        return self.output.LayerNorm(mlp_output, x, dropout_p)[0]


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])


class BertPooler(nn.Module):
    """Pools a sequence: the hidden state of its first token, projected, through tanh."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class BertPretrainedModel(PretrainedModel):
    config_class = BertConfig
    base_model_prefix = "bert"

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        super().initialise(root)
        for module in root.modules():
            if isinstance(module, BertPredictions):
                module.bias.zero_()


class BertModel(BertPretrainedModel):
    """BERT without a head: token ids → hidden states after the last layer, and the pooled output."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if check_flag("add_pooling_layer", add_pooling_layer) else None
        self.initialise(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> ModelOutput:
        """The arguments have Hugging Face's names and meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, hidden_size).
            attention_mask: (batch, tokens), 0 at padding.
            token_type_ids: (batch, tokens); None: all 0.
            position_ids: (batch, tokens); None: 0, 1, 2, …
        """
        words = self.embeddings.word_embeddings
        context = self.config.max_position_embeddings
        batch, tokens = inputs.check_tokens(input_ids, inputs_embeds, words.weight, 0, context)
        device = words.weight.device
        for name, ids, below in (
            ("token_type_ids", token_type_ids, self.config.type_vocab_size),
            ("position_ids", position_ids, context),
        ):
            if ids is not None:
                inputs.check_ids(name, ids, below=below, device=device, shape=(batch, tokens))
        key_padding = inputs.key_padding_mask(attention_mask, batch, tokens, device)

        x, table = embed_tokens(words, input_ids, inputs_embeds)
        x = self.embeddings(x, token_type_ids, position_ids)
        for layer in self.encoder.layer:
            x = self.run_layer(layer, x, key_padding)
        output = ModelOutput(x, self.pooler(x) if self.pooler is not None else None)
        output.shared_table = table
        return output


class BertPredictions(nn.Module):
    """The parameters of the masked-token head: a dense layer with GELU and LayerNorm, then the output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertOutput(config, config.hidden_size)
        # A tied weight is replaced by the embedding's, so none is allocated.
        device = "meta" if config.tie_word_embeddings else None
        self.decoder = Linear(config.hidden_size, config.vocab_size, device=device)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.approximate = GELUS[config.hidden_act]

    def transformed(self, x: Tensor) -> Tensor:
        """The input of the output projection."""
        return self.transform.LayerNorm(F.gelu(self.transform.dense(x), approximate=self.approximate))[0]


class BertMaskedLMHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertPredictions(config)


class BertForMaskedLM(BertPretrainedModel):
    """BERT with the masked-token head."""

    tied: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertMaskedLMHead(config)
        self.initialise(self.cls)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of BertModel, and labels: (batch, tokens), the original token at masked positions, else -100.

        In training mode with labels the loss is computed without materialising the logits, which are then None, and
        the head runs on the labelled positions only.
        """
        hidden = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        x = hidden.last_hidden_state
        if labels is not None:
            inputs.check_ids(
                "labels",
                labels,
                below=self.config.vocab_size,
                device=x.device,
                shape=tuple(x.shape[:2]),
                ignore_index=inputs.IGNORE_INDEX,
            )
            # Selecting rows needs their number, which on a GPU synchronises and under torch.compile breaks the graph.
            if self.training and x.device.type == "cpu" and not needs_custom_op(x, labels):
                labelled = (labels != inputs.IGNORE_INDEX).flatten().nonzero()[:, 0]
                x, labels = x.flatten(0, 1).index_select(0, labelled), labels.flatten()[labelled]
        head = self.cls.predictions
        weight = self.output_projection(head.decoder.weight, self.bert.embeddings.word_embeddings, hidden)
        return HeadOutput(*loss_and_logits(head.transformed(x), weight, head.decoder.bias, labels, self.training))


class BertForSequenceClassification(BertPretrainedModel):
    """BERT with a linear classifier on the pooled output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.pdrop = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.initialise(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of BertModel, and labels. config.problem_type, or else the labels, select the loss:

        - integers (batch,): one of num_labels classes; cross-entropy, in training mode without materialised logits.
        - floating point (batch,), with num_labels = 1: regression; mean squared error.
        - floating point (batch, num_labels): independent labels; mean binary cross-entropy.
        """
        check_labels(labels)
        hidden = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        x = F.dropout(hidden.pooler_output, self.pdrop, self.training)
        return classify(x, self.classifier, labels, self.config, self.training)
