"""Model families of transformers as data: modules of a layer, how the layer combines them, and language-model heads.

A new family is a new entry of FAMILIES. A value that no family here has (another kind of norm, MLP or positions) also
needs its operator in NORMS, MLPS or POSITIONS of parts.py.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Family(Description):
    """Classes of one modeling module of transformers, and the parts of its layer as module paths relative to the layer.

    The parent of a path is a container. Its forward is not called while its parts are computed by fastlm's operators.
    """

    # Classes
    module: str  # the Python module that defines them
    layer: str  # the class of one layer
    encoder: str | None  # the class that runs the layers on hidden states, if padding may be removed there
    heads: Mapping[str, Head]  # by class
    # What a layer returns, from a version of transformers on: a tensor or a tuple. A tuple has the attentions only if
    # the call asks for them.
    returns: Mapping[str, Literal["hidden_states"] | tuple[str, ...]]

    # Structure
    norm: Literal["layer"]
    norm_place: Literal["pre", "post"]  # before attention and MLP, or after each residual addition
    layout: Literal["linear", "conv1d"]  # of every projection's weight: (out, in), or (in, out)
    mlp: Literal["plain"]  # down(activation(up x))
    positions: Literal["learned"]  # added to the embeddings: the layers see none

    # Attention
    attention: str
    num_heads: str  # attribute of the attention module
    causal: tuple[str, ...]  # attributes of the attention module: the first that exists says whether it is causal
    qkv: tuple[str, ...]  # query, key and value projections, or one projection that computes all three
    attention_dropout: str
    out: str
    out_dropout: str | None
    attention_norm: str

    # MLP
    up: str
    activation: str  # a module or a function
    down: str
    mlp_dropout: str | None
    mlp_norm: str

    layers: str = "layer"  # the encoder's list of layers

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
)


def bert_like(prefix: str, name: str, projection: str) -> Family:
    """A family whose layers are BERT's, with a head for causal and one for masked language modelling."""
    return dataclasses.replace(
        BERT,
        module=f"transformers.models.{name}.modeling_{name}",
        layer=f"{prefix}Layer",
        encoder=f"{prefix}Encoder",
        heads={
            f"{prefix}ForCausalLM": Head(projection, shifted=True, uses_loss_function=True, disables_cache=True),
            f"{prefix}ForMaskedLM": Head(projection),
        },
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
        bert_like("Electra", "electra", "generator_lm_head"),
        DISTILBERT,
    )
}
