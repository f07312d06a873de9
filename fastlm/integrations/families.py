"""Model families of transformers as data: modules of a layer, how the layer combines them, and language-model heads.

A new family is a new entry of FAMILIES. A value that no family here has (another kind of norm, MLP or positions) also
needs its operator in NORMS, MLPS or POSITIONS of parts.py.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import transformers
from packaging.version import Version


class Description:
    """Shared by copies of a model: it describes classes, not one model."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self


@dataclasses.dataclass(frozen=True)
class Head(Description):
    """A head whose loss is the cross-entropy of logits over the vocabulary: the mean over labels that are not -100."""

    projection: str  # path of the output projection, which holds weight and bias, relative to the head
    shifted: bool = False  # the logits at position t predict the label at position t + 1
    # The model's `loss_function`, which a user may replace, computes the loss. It takes num_items_in_batch,
    # ignore_index and shift_labels.
    uses_loss_function: bool = False
    loss_module: str | None = None  # attribute of the loss module, where the head has one
    disables_cache: bool = False  # sets use_cache=False when labels are given
    logits: str = "logits"  # field of the output
    # A second label argument and the output field with its logits, whose cross-entropy is added. Without that label the
    # head computes no loss.
    second_loss: tuple[str, str] | None = None
    softcap: str | None = None  # attribute of the configuration: where the head soft-caps its logits
    scaled_embedding: str | None = None  # the class of a token embedding that multiplies by its `embed_scale`
    # With `sparse_prediction`, labels of `sparse_pred_ignore_index` have no loss either.
    sparse: bool = False


@dataclasses.dataclass(frozen=True)
class Base(Description):
    """A model without head whose forward computes embeddings, runs the encoder on them, and no more that is read."""

    name: str  # the class
    encoder: str  # attribute
    arguments: tuple[str, ...]  # of the forward, those that the embeddings take
    embeddings: tuple[str, ...] = ("embeddings",)  # modules that run before the encoder, one on another's result
    unread: tuple[str, ...] = ()  # modules whose result is none of the hidden states
    # The first of `embeddings` computes LayerNorm of the sum of word_embeddings, token_type_embeddings, if it has them,
    # and position_embeddings at the buffer `position_ids`.
    sums_tables: bool = False


@dataclasses.dataclass(frozen=True)
class Family(Description):
    """Classes of one modeling module of transformers, and the parts of its layer as module paths relative to the layer.

    The parent of a path is a container. Its forward is not called while its parts are computed by fastlm's operators.
    """

    # Classes
    module: str  # the Python module that defines them
    layer: str  # the class of one layer
    encoder: str | None  # the class that runs the layers, if padding may be removed there
    heads: Mapping[str, Head]  # by class
    # What a layer returns, from a version of transformers on: a tensor or a tuple. A tuple has the attentions only if
    # the call asks for them.
    returns: Mapping[str, Literal["hidden_states"] | tuple[str, ...]]

    # Structure
    norm: Literal["layer", "rms", "rms_offset"]  # rms_offset multiplies by 1 + weight
    norm_place: Literal["pre", "post"]  # before attention and MLP, or after each residual addition
    layout: Literal["linear", "conv1d"]  # of every projection's weight: (out, in), or (in, out)
    # down(activation(up x)), or down(activation(gate x) · up x); fused_gated: `up` computes gate x, then up x
    mlp: Literal["plain", "gated", "fused_gated"]
    # Added to the embeddings: the layers see none; rotate queries and keys; or `position_bias` is added to the scores
    positions: Literal["learned", "rotary", "relative"]

    # Attention
    attention: str
    num_heads: str | None  # attribute of the attention module; None if it has `head_dim`
    causal: tuple[str, ...]  # attributes of the attention module: the first that exists says whether it is causal
    qkv: tuple[str, ...]  # query, key and value projections, or one projection that computes all three
    attention_dropout: str  # a module, or the path of the attention module's attribute with the probability
    out: str
    out_dropout: str | None
    attention_norm: str

    # MLP
    up: str
    activation: str  # a module or a function
    down: str
    mlp_dropout: str | None
    mlp_norm: str

    # What some families have
    base: Base | None = None  # if its hidden states can be computed without calling it
    layers: str = "layer"  # the encoder's list of layers
    encoder_input: Literal["hidden_states", "tokens"] = "hidden_states"  # tokens: it also embeds them and makes masks
    norm_class: str | None = None  # the class of the norms, in `module`; None: torch.nn.LayerNorm
    head_dim: str | None = None  # attribute of the attention module
    query_norm: str | None = None  # over the head dimension, before the rotation
    key_norm: str | None = None
    rotates: str | None = None  # attribute of the attention module that says whether the layer uses positions
    # Attributes of the attention module, or "config." and one of its configuration. The first that exists has the
    # number of keys up to the query's own on a side; or, in transformers 4, (left, right) without the query's own.
    window: tuple[str, ...] = ()
    rotary: str | None = None  # computes a layer's table of positions where the call of the layer has none
    softcap: str | None = None  # attribute of the attention module: where it soft-caps its scores
    attention_output_norm: str | None = None  # of the output of attention, before the residual addition
    gate: str | None = None
    hidden_dropout: str | None = None  # before the down projection
    mlp_output_norm: str | None = None

    def has_norm(self, kind: type) -> bool:
        """Whether a class is that of the family's norms, and not a subclass."""
        return (kind.__module__, kind.__name__) == (self.module, self.norm_class)

    def exists(self) -> bool:
        """Whether the installed version of transformers has it."""
        return importlib.util.find_spec(parent(self.module)) is not None

    def returned(self, version: str = transformers.__version__) -> tuple[str, ...] | None:
        """The tuple that a layer returns in a version of transformers; None for a tensor."""
        installed = Version(version).release
        since = max((first for first in self.returns if Version(first).release <= installed), key=Version)
        returned = self.returns[since]
        return None if isinstance(returned, str) else returned


def parent(path: str) -> str:
    return path.rpartition(".")[0]


GPT2 = Family(
    module="transformers.models.gpt2.modeling_gpt2",  # DistilGPT-2 is a GPT-2
    layer="GPT2Block",
    encoder=None,
    heads={
        "GPT2LMHeadModel": Head("lm_head", shifted=True, uses_loss_function=True),
        "GPT2DoubleHeadsModel": Head("lm_head", shifted=True),
    },
    returns={"4.57": ("hidden_states", "attentions"), "5.3": "hidden_states"},
    norm="layer",
    norm_place="pre",
    layout="conv1d",
    mlp="plain",
    positions="learned",
    attention="attn",
    num_heads="num_heads",
    causal=("is_causal",),
    qkv=("attn.c_attn",),
    attention_dropout="attn.attn_dropout",
    out="attn.c_proj",
    out_dropout="attn.resid_dropout",
    attention_norm="ln_1",
    up="mlp.c_fc",
    activation="mlp.act",
    down="mlp.c_proj",
    mlp_dropout="mlp.dropout",
    mlp_norm="ln_2",
)

BERT = Family(
    module="transformers.models.bert.modeling_bert",
    layer="BertLayer",
    encoder="BertEncoder",
    heads={
        "BertLMHeadModel": Head("cls.predictions.decoder", shifted=True, uses_loss_function=True, disables_cache=True),
        "BertForMaskedLM": Head("cls.predictions.decoder"),
        "BertForPreTraining": Head(
            "cls.predictions.decoder",
            logits="prediction_logits",
            second_loss=("next_sentence_label", "seq_relationship_logits"),
        ),
    },
    returns={"4.57": ("hidden_states", "attentions"), "5.0": "hidden_states"},
    norm="layer",
    norm_place="post",
    layout="linear",
    mlp="plain",
    positions="learned",
    attention="attention.self",
    num_heads="num_attention_heads",
    causal=("is_causal", "is_decoder"),  # transformers 5, transformers 4
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_dropout="attention.self.dropout",
    out="attention.output.dense",
    out_dropout="attention.output.dropout",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    mlp_dropout="output.dropout",
    mlp_norm="output.LayerNorm",
    base=Base("BertModel", "encoder", ("input_ids", "token_type_ids"), unread=("pooler",), sums_tables=True),
)


def bert_like(prefix: str, name: str, projection: str, **base: Any) -> Family:
    """A family whose layers are BERT's, with a head for causal and one for masked language modelling.

    base: what differs in the model without head, where positions are counted from the padding's id on by default.
    """
    assert BERT.base is not None  # for mypy
    return dataclasses.replace(
        BERT,
        base=dataclasses.replace(BERT.base, name=f"{prefix}Model", **{"sums_tables": False} | base),
        module=f"transformers.models.{name}.modeling_{name}",
        layer=f"{prefix}Layer",
        encoder=f"{prefix}Encoder",
        heads={
            f"{prefix}ForCausalLM": Head(projection, shifted=True, uses_loss_function=True, disables_cache=True),
            f"{prefix}ForMaskedLM": Head(projection),
        },
    )


# The projection exists if the embeddings have another width than the layers. There is no pooler.
ELECTRA = {"embeddings": ("embeddings", "embeddings_project"), "unread": (), "sums_tables": True}

MPNET = dataclasses.replace(
    BERT,
    module="transformers.models.mpnet.modeling_mpnet",
    layer="MPNetLayer",
    encoder="MPNetEncoder",
    heads={"MPNetForMaskedLM": Head("lm_head.decoder")},
    returns={"4.57": ("hidden_states", "attentions")},
    positions="relative",
    attention="attention.attn",
    base=None,
    causal=("is_causal",),
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    attention_dropout="attention.attn.dropout",
    out="attention.attn.o",
    out_dropout="attention.dropout",
    attention_norm="attention.LayerNorm",
)

DISTILBERT = Family(
    module="transformers.models.distilbert.modeling_distilbert",
    layer="TransformerBlock",
    encoder="Transformer",
    heads={"DistilBertForMaskedLM": Head("vocab_projector", loss_module="mlm_loss_fct")},
    returns={"4.57": ("attentions", "hidden_states"), "5.0": "hidden_states"},
    norm="layer",
    norm_place="post",
    layout="linear",
    mlp="plain",
    positions="learned",
    attention="attention",
    num_heads="n_heads",
    causal=("is_causal",),
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_dropout="attention.dropout",
    out="attention.out_lin",
    out_dropout=None,
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    mlp_dropout="ffn.dropout",
    mlp_norm="output_layer_norm",
    base=Base("DistilBertModel", "transformer", ("input_ids",), sums_tables=True),
)

LLAMA = Family(
    module="transformers.models.llama.modeling_llama",
    layer="LlamaDecoderLayer",
    encoder=None,
    heads={"LlamaForCausalLM": Head("lm_head", shifted=True, uses_loss_function=True)},
    returns={"4.57": "hidden_states"},
    norm="rms",
    norm_class="LlamaRMSNorm",
    norm_place="pre",
    layout="linear",
    mlp="gated",
    positions="rotary",
    attention="self_attn",
    num_heads=None,
    head_dim="head_dim",
    causal=("is_causal",),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_dropout="self_attn.attention_dropout",
    out="self_attn.o_proj",
    out_dropout=None,
    attention_norm="input_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    activation="mlp.act_fn",
    down="mlp.down_proj",
    mlp_dropout=None,
    mlp_norm="post_attention_layernorm",
)


def llama_like(prefix: str, name: str, **changes: Any) -> Family:
    """A family whose layers are Llama's but for some changes."""
    return dataclasses.replace(
        LLAMA,
        module=f"transformers.models.{name}.modeling_{name}",
        layer=f"{prefix}DecoderLayer",
        norm_class=f"{prefix}RMSNorm",
        **{"heads": {f"{prefix}ForCausalLM": LLAMA.heads["LlamaForCausalLM"]}, **changes},
    )


QUERY_KEY_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
WINDOW = ("sliding_window",)


def gemma_like(prefix: str, name: str, **changes: Any) -> Family:
    """A family whose blocks have a norm before and one after, and whose logits may be soft-capped."""
    head = Head(
        "lm_head",
        shifted=True,
        uses_loss_function=True,
        softcap="final_logit_softcapping",
        scaled_embedding=f"transformers.models.{name}.modeling_{name}.{prefix}TextScaledWordEmbedding",
    )
    return llama_like(
        prefix,
        name,
        heads={f"{prefix}ForCausalLM": head},
        returns={"4.57": ("hidden_states", "attentions"), "5.0": "hidden_states"},
        norm="rms_offset",
        window=WINDOW,
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        **changes,
    )


MODERNBERT = Family(
    module="transformers.models.modernbert.modeling_modernbert",
    layer="ModernBertEncoderLayer",
    encoder="ModernBertModel",
    encoder_input="tokens",
    layers="layers",
    heads={"ModernBertForMaskedLM": Head("decoder", uses_loss_function=True, sparse=True)},
    returns={"4.57": ("hidden_states", "attentions"), "5.1": "hidden_states"},
    norm="layer",
    norm_place="pre",  # the first layer has no norm before its attention
    layout="linear",
    mlp="fused_gated",
    positions="rotary",
    attention="attn",
    num_heads=None,
    head_dim="head_dim",
    causal=("is_causal",),
    rotary="attn.rotary_emb",
    window=("sliding_window", "local_attention"),
    qkv=("attn.Wqkv",),
    attention_dropout="attn.attention_dropout",
    out="attn.Wo",
    out_dropout="attn.out_drop",
    attention_norm="attn_norm",
    up="mlp.Wi",
    activation="mlp.act",
    hidden_dropout="mlp.drop",
    down="mlp.Wo",
    mlp_dropout=None,
    mlp_norm="mlp_norm",
)

EUROBERT = llama_like(
    "EuroBert",
    "eurobert",
    encoder="EuroBertModel",
    encoder_input="tokens",
    layers="layers",
    heads={"EuroBertForMaskedLM": Head("lm_head", uses_loss_function=True)},
    returns={"5.0": "hidden_states"},
)

GTE = dataclasses.replace(
    LLAMA,
    module="transformers.models.gte.modeling_gte",
    layer="GteLayer",
    encoder="GteModel",
    encoder_input="tokens",
    layers="layers",
    heads={"GteForMaskedLM": Head("lm_head.decoder")},
    returns={"5.0": "hidden_states"},
    norm="layer",
    norm_class=None,
    norm_place="post",
    out_dropout="post_attention_dropout",
    attention_norm="post_attention_layernorm",
    hidden_dropout="mlp.dropout",
    mlp_dropout="post_mlp_dropout",
    mlp_norm="post_mlp_layernorm",
)

NOMIC_BERT = dataclasses.replace(
    GTE,
    module="transformers.models.nomic_bert.modeling_nomic_bert",
    layer="NomicBertLayer",
    encoder="NomicBertModel",
    heads={"NomicBertForMaskedLM": Head("cls.predictions.decoder")},
    returns={"5.0": "hidden_states"},
    hidden_dropout=None,
)

JINA_EMBEDDINGS_V3 = dataclasses.replace(
    GTE,
    module="transformers.models.jina_embeddings_v3.modeling_jina_embeddings_v3",
    layer="JinaEmbeddingsV3Layer",
    encoder="JinaEmbeddingsV3Model",
    heads={"JinaEmbeddingsV3ForMaskedLM": Head("lm_head.decoder")},
    mlp="plain",
    gate=None,
    up="mlp.fc1",
    activation="mlp.activation_fn",
    hidden_dropout=None,
    down="mlp.fc2",
)

# By the module that defines the classes.
FAMILIES = {
    family.module: family
    for family in (
        GPT2,
        BERT,
        bert_like("Roberta", "roberta", "lm_head.decoder"),
        bert_like("XLMRoberta", "xlm_roberta", "lm_head.decoder"),
        bert_like("Camembert", "camembert", "lm_head.decoder"),
        bert_like("Electra", "electra", "generator_lm_head", **ELECTRA),
        DISTILBERT,
        MPNET,
        LLAMA,  # SmolLM and SmolLM 2 are Llamas
        llama_like("Mistral", "mistral", window=("config.sliding_window",)),
        llama_like("Qwen2", "qwen2", window=WINDOW),
        llama_like("Qwen3", "qwen3", window=WINDOW, **QUERY_KEY_NORMS),
        llama_like("SmolLM3", "smollm3", window=WINDOW, rotates="use_rope"),
        gemma_like("Gemma2", "gemma2", softcap="attn_logit_softcapping"),
        gemma_like("Gemma3", "gemma3", **QUERY_KEY_NORMS),
        MODERNBERT,
        EUROBERT,
        GTE,
        NOMIC_BERT,
        JINA_EMBEDDINGS_V3,
    )
    if family.exists()
}
