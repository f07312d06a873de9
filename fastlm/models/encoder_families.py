"""BERT and its descendants with learned positions. A family is a class: settings, and where its modules are.

rotary_encoder_families.py has those with rotary positions.
"""

import dataclasses
from typing import Any, ClassVar

from fastlm.core.errors import mismatch
from fastlm.models.config import (
    Config,
    check_epsilon,
    check_probabilities,
    check_sizes,
)
from fastlm.models.encoder_config import EncoderConfig, Head, Layout


@dataclasses.dataclass(kw_only=True)
class BertLikeConfig(EncoderConfig):
    """Settings of BERT and its descendants."""

    fixed: ClassVar = Config.fixed | {"is_decoder": False, "position_embedding_type": "absolute"}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        self.check_types()
        check_probabilities(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        if self.classifier_dropout is not None:
            check_probabilities(self, "classifier_dropout")
        check_epsilon(self, "layer_norm_eps")
        super().__post_init__()

    def check_types(self) -> None:
        check_sizes(self, "type_vocab_size")

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


def classifier(output: str = "classifier", **changes: Any) -> Head:
    """A classifier of dropout and a linear layer."""
    return Head(**{"output": output, "dropout": "config.head_dropout", **changes})


BERT_HEADS = {
    "MaskedLM": Head(
        dense="cls.predictions.transform.dense",
        activation="config.hidden_act",
        norm="cls.predictions.transform.LayerNorm",
        output="cls.predictions.decoder",
        bias="cls.predictions.bias",
    ),
    "SequenceClassification": classifier(pooled=True),
    "TokenClassification": classifier(),
}
BERT = Layout(
    prefix="bert",
    learned_positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    pooler="pooler.dense",
    has_pooler=True,
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)


@dataclasses.dataclass(kw_only=True)
class BertConfig(BertLikeConfig):
    """BERT (Devlin et al., 2018, arXiv:1810.04805). The defaults are those of "bert-base", uncased."""

    model_type = "bert"
    presets: ClassVar = {
        "bert-base": {},
        "bert-large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    }
    family: ClassVar = "Bert"
    layout: ClassVar = BERT
    heads: ClassVar = BERT_HEADS


ROBERTA = dataclasses.replace(BERT, prefix="roberta", positions_after_padding=True)
ROBERTA_HEADS = {
    "MaskedLM": Head(dense="lm_head.dense", norm="lm_head.layer_norm", output="lm_head.decoder", bias="lm_head.bias"),
    "SequenceClassification": classifier(
        "classifier.out_proj", dense="classifier.dense", activation="tanh", input_dropout="config.head_dropout"
    ),
    "TokenClassification": classifier(),
}


@dataclasses.dataclass(kw_only=True)
class RobertaConfig(BertLikeConfig):
    """RoBERTa (Liu et al., 2019, arXiv:1907.11692): BERT whose positions begin after pad_token_id."""

    model_type = "roberta"
    family: ClassVar = "Roberta"
    layout: ClassVar = ROBERTA
    heads: ClassVar = ROBERTA_HEADS

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None:
            raise mismatch("pad_token_id", "a token id, after which positions begin", "null")
        if self.context < 1:
            expected = f"more than pad_token_id + 1 = {self.pad_token_id + 1}"
            raise mismatch("max_position_embeddings", expected, self.max_position_embeddings)


@dataclasses.dataclass(kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """XLM-RoBERTa (Conneau et al., 2019, arXiv:1911.02116), which is RoBERTa's layer: multilingual E5, BGE M3."""

    model_type = "xlm-roberta"
    family: ClassVar = "XLMRoberta"

    vocab_size: int = 30522


@dataclasses.dataclass(kw_only=True)
class MPNetConfig(BertLikeConfig):
    """MPNet (Song et al., 2020, arXiv:2004.09297): RoBERTa with a bias of the scores by distance. Without
    padding, it is only padded for the attention, as packed attention takes no bias."""

    model_type = "mpnet"
    fixed: ClassVar = BertLikeConfig.fixed | {"pad_token_id": 1, "relative_attention_num_buckets": 32}
    family: ClassVar = "MPNet"
    layout: ClassVar = dataclasses.replace(
        ROBERTA,
        prefix="mpnet",
        types=None,
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        out="attention.attn.o",
        attention_norm="attention.LayerNorm",
        relative_bias="encoder.relative_attention_bias",
    )
    heads: ClassVar = ROBERTA_HEADS

    vocab_size: int = 30527
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2


@dataclasses.dataclass(kw_only=True)
class ElectraConfig(BertLikeConfig):
    """ELECTRA (Clark et al., 2020, arXiv:2003.10555): BERT whose embeddings may be narrower than its layers."""

    model_type = "electra"
    family: ClassVar = "Electra"
    layout: ClassVar = dataclasses.replace(
        BERT,
        prefix="electra",
        embedding_width="config.embedding_size",
        embedding_projection="embeddings_project",
        pooler=None,
        has_pooler=False,
    )
    heads: ClassVar = {
        "MaskedLM": Head(
            dense="generator_predictions.dense",
            dense_width="config.embedding_size",
            norm="generator_predictions.LayerNorm",
            output="generator_lm_head",
        ),
        "SequenceClassification": classifier(
            "classifier.out_proj", dense="classifier.dense", input_dropout="config.head_dropout"
        ),
        "TokenClassification": classifier(),
    }

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024

    def __post_init__(self) -> None:
        check_sizes(self, "embedding_size")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True)
class DistilBertConfig(EncoderConfig):
    """DistilBERT (Sanh et al., 2019, arXiv:1910.01108): BERT's layer without token types and pooler."""

    model_type = "distilbert"
    fixed: ClassVar = Config.fixed
    aliases: ClassVar = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
    }
    family: ClassVar = "DistilBert"
    layout: ClassVar = Layout(
        prefix="distilbert",
        learned_positions="embeddings.position_embeddings",
        embedding_norm="embeddings.LayerNorm",
        embedding_dropout="config.dropout",
        layers="transformer.layer",
        eps=1e-12,
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        attention_norm="sa_layer_norm",
        attention_dropout="config.attention_dropout",
        out_dropout=0.0,
        up="ffn.lin1",
        activation="config.activation",
        down="ffn.lin2",
        mlp_dropout="config.dropout",
        mlp_norm="output_layer_norm",
    )
    heads: ClassVar = {
        "MaskedLM": Head(
            dense="vocab_transform",
            activation="config.activation",
            norm="vocab_layer_norm",
            output="vocab_projector",
        ),
        "SequenceClassification": Head(
            dense="pre_classifier", activation="relu", dropout="config.seq_classif_dropout", output="classifier"
        ),
        "TokenClassification": Head(dropout="config.dropout", output="classifier"),
    }

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 4 * 768
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        check_probabilities(self, "dropout", "attention_dropout", "seq_classif_dropout")
        super().__post_init__()
