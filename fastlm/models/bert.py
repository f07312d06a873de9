"""BERT (Devlin et al., 2018, arXiv:1810.04805): post-norm layers, attention in both directions, learned positions and token types.

Every residual addition is followed by a LayerNorm, so that dropout, addition and normalisation are one pass over memory, here of which only the normalised
result is used.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel
from fastlm.models.config import GELUS, BertConfig
from fastlm.models.layers import (
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
from fastlm.ops.boundary import mismatch, opaque


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pdrop = config.hidden_dropout_prob

    def forward(self, words: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """words: (batch, tokens, hidden_size), looked up already."""
        x = words + embed(
            self.token_type_embeddings, token_type_ids, slice(0, 1)
        )  # without ids all tokens are of type 0
        x = x + embed(self.position_embeddings, position_ids, slice(0, words.shape[1]))
        return F.dropout(self.LayerNorm(x)[0], self.pdrop, self.training)


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # Three products, not one with the weights side by side: putting those together at every call costs what reading x once saves, and more for few rows.
        self.query, self.key, self.value = (Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.heads, self.pdrop = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, x: Tensor, key_padding: Tensor | None) -> Tensor:
        query, key, value = (heads_of(projection(x), self.heads) for projection in (self.query, self.key, self.value))
        return joined(
            fastlm.attention(query, key, value, key_padding=key_padding, dropout_p=self.pdrop if self.training else 0.0)
        )


class BertOutput(nn.Module):
    """The end of a sub-block: a projection back to hidden_size, then the residual addition and its LayerNorm."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
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
        attended = self.attention.output.dense(self.attention.self(x, key_padding))
        x, _ = self.attention.output.LayerNorm(attended, x, dropout_p)
        up, down = self.intermediate.dense, self.output.dense
        fed = fastlm.gelu_mlp(
            x, up.weight, up.bias, down.weight, down.bias, approximate=self.approximate, recompute=self.recompute
        )
        return self.output.LayerNorm(fed, x, dropout_p)[0]


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])


class BertPooler(nn.Module):
    """The first token stands for the sequence."""

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
    """Tokens → hidden states after the last layer, and the pooled first one."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.initialise(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> ModelOutput:
        """Hugging Face's arguments and their meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, hidden_size).
            attention_mask: (batch, tokens), 0 at padding.
            token_type_ids: (batch, tokens); None: 0 everywhere.
            position_ids: (batch, tokens); None: counted from 0.
        """
        words = self.embeddings.word_embeddings
        batch, tokens = inputs.batch_and_tokens(
            input_ids, inputs_embeds, words.weight, 0, self.config.max_position_embeddings
        )
        device = words.weight.device
        for name, given, below in (
            ("token_type_ids", token_type_ids, self.config.type_vocab_size),
            ("position_ids", position_ids, self.config.max_position_embeddings),
        ):
            if given is not None:
                inputs.ids(name, given, below=below, device=device, shape=(batch, tokens))
        key_padding = inputs.key_padding(attention_mask, batch, tokens, device)

        x, table = look_up(words, input_ids, inputs_embeds)
        x = self.embeddings(x, token_type_ids, position_ids)
        for layer in self.encoder.layer:
            x = self.run(layer, x, key_padding)
        output = ModelOutput(x, self.pooler(x) if self.pooler is not None else None)
        output.table = table
        return output


class BertPredictions(nn.Module):
    """The masked-token head: one more layer without attention, then a score for every token of the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertOutput(config, config.hidden_size)
        self.decoder = Linear(
            config.hidden_size, config.vocab_size, device="meta" if config.tie_word_embeddings else None
        )
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.approximate = GELUS[config.hidden_act]

    def transformed(self, x: Tensor) -> Tensor:
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
        """BertModel's arguments, and labels: (batch, tokens), the true token where one was masked, -100 elsewhere.

        In training mode with labels the loss is computed without the logits, which are then None, and the head sees only the tokens that have a label:
        most have none.
        """
        hidden = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
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
            if (
                self.training and x.device.type == "cpu" and not opaque(x, labels)
            ):  # elsewhere counting them would wait for the GPU, or end the graph
                counted = (labels != inputs.IGNORE).flatten().nonzero()[:, 0]
                x, labels = x.flatten(0, 1).index_select(0, counted), labels.flatten()[counted]
        head = self.cls.predictions
        weight = self.projection(head.decoder.weight, self.bert.embeddings.word_embeddings, hidden)
        return HeadOutput(*loss_and_logits(head.transformed(x), weight, head.decoder.bias, labels, self.training))


class BertForSequenceClassification(BertPretrainedModel):
    """BERT with a linear classifier on the pooled first token."""

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
        """BertModel's arguments, and labels, by which the problem is told (or by config.problem_type):

        integers (batch,): one of num_labels classes, cross-entropy, in training mode without logits;
        floating-point (batch,), with num_labels = 1: regression, mean squared error;
        floating-point (batch, num_labels): any of the labels, mean binary cross-entropy.
        """
        x = F.dropout(
            self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds).pooler_output,
            self.pdrop,
            self.training,
        )
        if labels is None or self.problem(labels) == "single_label_classification":
            if labels is not None:
                inputs.ids(
                    "labels",
                    labels,
                    below=self.config.num_labels,
                    device=x.device,
                    shape=(x.shape[0],),
                    ignore=inputs.IGNORE,
                )
            return HeadOutput(*loss_and_logits(x, self.classifier.weight, self.classifier.bias, labels, self.training))
        logits = self.classifier(x)
        wide, truth = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.to(logits.device)
        if self.problem(labels) == "regression":
            if truth.numel() != logits.numel():
                raise mismatch(
                    "labels",
                    f"shape {tuple(logits.shape[: 1 if self.config.num_labels == 1 else 2])}",
                    tuple(labels.shape),
                )
            return HeadOutput(F.mse_loss(wide, truth.view_as(wide).to(wide.dtype)), logits)
        if truth.shape != logits.shape:
            raise mismatch("labels", f"shape {tuple(logits.shape)}", tuple(labels.shape))
        return HeadOutput(F.binary_cross_entropy_with_logits(wide, truth.to(wide.dtype)), logits)

    def problem(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
