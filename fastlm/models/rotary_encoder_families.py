"""Encoders with rotary positions. A family is a class: settings, and where its modules are."""

import dataclasses
import math
import reprlib
from typing import Any, ClassVar

from fastlm.core.errors import mismatch, shown
from fastlm.models.config import (
    Config,
    check_epsilon,
    check_flags,
    check_one_of,
    check_probabilities,
    check_sizes,
    is_number,
)
from fastlm.models.decoder_config import LAYER_TYPES, DecoderConfig, Gemma3Config, RotaryConfig
from fastlm.models.encoder_config import HEAD_ACTIVATIONS, EncoderConfig, Head, Layout
from fastlm.models.encoder_families import BERT_HEADS, ROBERTA_HEADS, BertLikeConfig


def check_pooling(config: Any, *choices: str) -> None:
    check_one_of(config, "classifier_pooling", choices)


def check_layer_types(config: Any) -> None:
    given, count = config.layer_types, config.num_hidden_layers
    if not isinstance(given, list) or len(given) != count or not all(kind in LAYER_TYPES for kind in given):
        expected = f"num_hidden_layers = {count} of {', '.join(LAYER_TYPES)}"
        raise mismatch("layer_types", expected, reprlib.repr(given))


MODERNBERT_HEAD = Head(
    dense="head.dense",
    dense_bias="config.classifier_bias",
    activation="config.classifier_activation",
    norm="head.norm",
    dropout="config.classifier_dropout",
    output="classifier",
)


@dataclasses.dataclass(kw_only=True)
class ModernBertConfig(RotaryConfig, EncoderConfig):
    """ModernBERT (Warner et al., 2024, arXiv:2412.13663): rotary positions of two bases, a gated MLP, and two layers of
    three attend to a window on both sides. The defaults are those of ModernBERT-base."""

    model_type = "modernbert"
    fixed: ClassVar = Config.fixed | {"sparse_pred_ignore_index": -100}
    family: ClassVar = "ModernBert"
    layout: ClassVar = Layout(
        prefix="model",
        words="embeddings.tok_embeddings",
        embedding_norm="embeddings.norm",
        embedding_dropout="config.embedding_dropout",
        layers="layers",
        final_norm="final_norm",
        norm_place="pre",
        norm_bias="config.norm_bias",
        eps="config.norm_eps",
        qkv=("attn.Wqkv",),
        qkv_bias="config.attention_bias",
        out="attn.Wo",
        out_bias="config.attention_bias",
        attention_norm="attn_norm",
        first_attention_norm=False,
        rotary=True,
        window="config.local_attention",
        attention_dropout="config.attention_dropout",
        out_dropout="config.attention_dropout",
        gate="mlp.Wi",
        up="mlp.Wi",
        up_bias="config.mlp_bias",
        down="mlp.Wo",
        down_bias="config.mlp_bias",
        activation="config.hidden_activation",
        hidden_dropout="config.mlp_dropout",
        mlp_dropout=0.0,
        mlp_norm="mlp_norm",
    )
    heads: ClassVar = {
        "MaskedLM": dataclasses.replace(
            MODERNBERT_HEAD, output="decoder", output_bias="config.decoder_bias", dropout=0.0
        ),
        "SequenceClassification": dataclasses.replace(MODERNBERT_HEAD, pooling="config.classifier_pooling"),
        "TokenClassification": MODERNBERT_HEAD,
    }
    default_theta: ClassVar = 160000.0
    LOCAL_THETA: ClassVar = 10000.0

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: list[str] | None = None  # of each layer, one of LAYER_TYPES; None: by global_attn_every_n_layers
    global_attn_every_n_layers: int = 3
    local_attention: int = 128  # half of it is the number of keys on each side in a sliding layer
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | list[int] | None = 50282

    def __post_init__(self) -> None:
        check_sizes(self, "num_hidden_layers", "global_attn_every_n_layers", "local_attention")
        check_flags(self, "norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
        check_probabilities(self, "attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
        check_epsilon(self, "norm_eps")
        check_pooling(self, "cls", "mean")
        if not is_number(self.initializer_cutoff_factor) or not 0 < self.initializer_cutoff_factor < math.inf:
            raise mismatch("initializer_cutoff_factor", "a finite number > 0", shown(self.initializer_cutoff_factor))
        check_one_of(self, "classifier_activation", HEAD_ACTIVATIONS)
        if self.layer_types is None:
            every = self.global_attn_every_n_layers
            self.layer_types = [LAYER_TYPES[layer % every != 0] for layer in range(self.num_hidden_layers)]
        check_layer_types(self)
        self.rope_parameters = self.rope_of_types(self.rope_parameters)
        super().__post_init__()
        self.check_rope(LAYER_TYPES)

    @classmethod
    def rope_of_types(cls, given: Any) -> dict[str, Any]:
        """rope_parameters with the family's bases where the file has none."""
        if not isinstance(given, dict) or not all(isinstance(given.get(kind, {}), dict | None) for kind in LAYER_TYPES):
            raise mismatch("rope_parameters", f"settings for each of {', '.join(LAYER_TYPES)}", shown(given))
        return {
            kind: {"rope_type": "default", "rope_theta": theta, **(given.get(kind) or {})}
            for kind, theta in zip(LAYER_TYPES, (cls.default_theta, cls.LOCAL_THETA), strict=True)
        }

    @classmethod
    def rope_parameters_of(cls, older: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        if older["rope_scaling"] is not None:
            raise mismatch("rope_scaling", "null, the only supported value", shown(older["rope_scaling"]))
        bases = given.pop("global_rope_theta", None), given.pop("local_rope_theta", None)
        return {
            kind: {"rope_theta": theta} for kind, theta in zip(LAYER_TYPES, bases, strict=True) if theta is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers can also read, version 4 too."""
        full, sliding = (self.rope_parameters[kind]["rope_theta"] for kind in LAYER_TYPES)
        return {**super().to_dict(), "global_rope_theta": full, "local_rope_theta": sliding}

    def initial(self, name: str) -> tuple[float, float]:
        std = self.initializer_range
        if name.endswith(("attn.Wo", "mlp.Wo", "head.dense", "decoder")):
            std /= math.sqrt(2 * self.num_hidden_layers)
        elif name == "classifier":
            std = self.hidden_size**-0.5
        return std, self.initializer_cutoff_factor * std


@dataclasses.dataclass(kw_only=True)
class RotaryBertConfig(BertLikeConfig, RotaryConfig):
    """What BERT's descendants with rotary positions have in common."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_parameters, dict):
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.default_theta, **self.rope_parameters}
        super().__post_init__()
        self.check_rope(LAYER_TYPES[:1])


GTE = Layout(
    prefix="gte",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layers="layers",
    pooler="pooler.dense",
    rotary=True,
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    up_bias=False,
    down="mlp.down_proj",
    hidden_dropout="config.hidden_dropout_prob",
    mlp_norm="post_mlp_layernorm",
)


@dataclasses.dataclass(kw_only=True)
class GteConfig(RotaryBertConfig):
    """GTE (Zhang et al., 2024, arXiv:2407.19669): BERT with rotary positions and a gated MLP."""

    model_type = "gte"
    family: ClassVar = "Gte"
    layout: ClassVar = GTE
    heads: ClassVar = BERT_HEADS | {
        "MaskedLM": Head(dense="lm_head.dense", norm="lm_head.layer_norm", output="lm_head.decoder")
    }
    stored_names: ClassVar = {
        r"^new\.": "",
        r"encoder\.layer\.": "layers.",
        r"attention\.o_proj": "self_attn.o_proj",
        "attn_ln": "post_attention_layernorm",
        "mlp_ln": "post_mlp_layernorm",
        r"lm_head\.norm": "lm_head.layer_norm",
    }
    fused_weights: ClassVar = {
        "attention.qkv_proj": GTE.qkv,
        "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    }
    default_theta: ClassVar = 160000.0

    vocab_size: int = 250048
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 8192
    type_vocab_size: int = 1  # 0: no token types
    pad_token_id: int | None = 1

    def check_types(self) -> None:
        if self.type_vocab_size != 0:
            super().check_types()


@dataclasses.dataclass(kw_only=True)
class NomicBertConfig(RotaryBertConfig):
    """Nomic BERT (Nussbaum et al., 2024, arXiv:2402.01613): GTE's layer without biases of its projections."""

    model_type = "nomic_bert"
    family: ClassVar = "NomicBert"
    layout: ClassVar = dataclasses.replace(
        GTE,
        prefix="nomic_bert",
        head_dim="config.head_dim",
        qkv_bias=False,
        out_bias=False,
        down_bias=False,
        hidden_dropout=0.0,
    )
    heads: ClassVar = BERT_HEADS | {
        "MaskedLM": dataclasses.replace(BERT_HEADS["MaskedLM"], norm="cls.predictions.transform.layer_norm")
    }
    stored_names: ClassVar = {
        r"encoder\.layers\.": "layers.",
        "emb_ln": "embeddings.LayerNorm",
        r"attn\.out_proj": "self_attn.o_proj",
        "fc11": "up_proj",
        "fc12": "gate_proj",
        "fc2": "down_proj",
        "norm1": "post_attention_layernorm",
        "norm2": "post_mlp_layernorm",
    }
    fused_weights: ClassVar = {"attn.Wqkv": GTE.qkv}
    default_theta: ClassVar = 1000.0

    vocab_size: int = 30528
    hidden_act: str = "silu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 2048
    head_dim: int | None = None  # None: hidden_size / num_attention_heads

    def __post_init__(self) -> None:
        if self.head_dim is not None:
            check_sizes(self, "head_dim")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True)
class JinaEmbeddingsV3Config(RotaryBertConfig):
    """Jina Embeddings v3 (Sturua et al., 2024, arXiv:2409.10173): XLM-RoBERTa with rotary positions."""

    model_type = "jina_embeddings_v3"
    family: ClassVar = "JinaEmbeddingsV3"
    layout: ClassVar = dataclasses.replace(
        GTE,
        prefix="roberta",
        has_pooler=True,
        gate=None,
        up="mlp.fc1",
        up_bias=True,
        down="mlp.fc2",
        hidden_dropout=0.0,
    )
    heads: ClassVar = ROBERTA_HEADS
    stored_names: ClassVar = {
        r"encoder\.layers\.": "layers.",
        "emb_ln": "embeddings.LayerNorm",
        r"mixer\.out_proj": "self_attn.o_proj",
        "norm1": "post_attention_layernorm",
        "norm2": "post_mlp_layernorm",
    }
    fused_weights: ClassVar = {"mixer.Wqkv": GTE.qkv}
    default_theta: ClassVar = 20000.0

    vocab_size: int = 250002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2


LLAMA = Layout(
    prefix="model",
    words="embed_tokens",
    embedding_dropout=0.0,
    layers="layers",
    final_norm="norm",
    norm="rms",
    norm_place="pre",
    eps="config.rms_norm_eps",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    qkv_bias="config.attention_bias",
    out="self_attn.o_proj",
    out_bias="config.attention_bias",
    attention_norm="input_layernorm",
    head_dim="config.head_dim",
    num_kv_heads="config.num_key_value_heads",
    rotary=True,
    attention_dropout="config.attention_dropout",
    out_dropout=0.0,
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    up_bias="config.mlp_bias",
    down="mlp.down_proj",
    down_bias="config.mlp_bias",
    mlp_dropout=0.0,
    mlp_norm="post_attention_layernorm",
)


@dataclasses.dataclass(kw_only=True)
class EuroBertConfig(EncoderConfig, DecoderConfig):
    """EuroBERT (Boizard et al., 2025, arXiv:2503.05500): Llama's layer without a causal mask."""

    model_type = "eurobert"
    fixed: ClassVar = Config.fixed | {"pretraining_tp": 1, "sliding_window": None}
    family: ClassVar = "EuroBert"
    layout: ClassVar = LLAMA
    heads: ClassVar = {
        "MaskedLM": Head(output="lm_head", output_bias="config.mlp_bias"),
        "SequenceClassification": Head(dense="dense", output="classifier", pooling="config.classifier_pooling"),
        "TokenClassification": Head(output="classifier"),
    }

    vocab_size: int = 128256
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    classifier_pooling: str = "late"
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 128001
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

    def __post_init__(self) -> None:
        check_pooling(self, "bos", "mean", "late")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True)
class Gemma3EncoderConfig(EncoderConfig, Gemma3Config):
    """Gemma 3's text model as an encoder (EmbeddingGemma, 2025, arXiv:2509.20354): it attends to both sides."""

    fixed: ClassVar = Gemma3Config.fixed | {"use_bidirectional_attention": True}
    family: ClassVar = "Gemma3Text"
    layout: ClassVar = dataclasses.replace(
        LLAMA,
        scaled_words=True,
        norm="rms_offset",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        window="config.sliding_window",
        scale="config.query_pre_attn_scalar",
    )

    use_bidirectional_attention: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Any:
        if given.get("use_bidirectional_attention") is not True:
            got = shown(given.get("use_bidirectional_attention"))
            raise mismatch("use_bidirectional_attention", "true; a causal model is a CausalLM", got)
        return super().from_dict(given)
