"""Where the parts of a transformer layer lie in each family's modules. All that the fused forwards know of a family."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of modules, relative to the block; projections and dropout relative to the module that owns them. None: the family has no such part."""

    block: str  # the class of a layer
    encoder: (
        str | None
    )  # the class that runs the layers one after another on hidden states alone, if its padding may be packed away
    pre_norm: bool
    attention: str  # the module that computes softmax(q kᵀ) v
    heads: str  # its attribute with their number
    projections: tuple[str, ...]  # query, key and value; or the one that yields all three
    attention_dropout: str
    around: str | None  # a module that holds attention and what follows it, residual addition and LayerNorm included
    out: tuple[str, str, str | None]  # after attention: its owner, the projection, the dropout
    norm1: str
    up: tuple[str, str, str]  # owner, projection, activation
    down: tuple[str, str, str | None]  # owner, projection, dropout
    norm2: str

    def __deepcopy__(self, memo: dict) -> "Family":
        return self


GPT2 = Family(
    block="GPT2Block",
    encoder=None,
    pre_norm=True,
    attention="attn",
    heads="num_heads",
    projections=("c_attn",),
    attention_dropout="attn_dropout",
    around=None,
    out=("attn", "c_proj", "resid_dropout"),
    norm1="ln_1",
    up=("mlp", "c_fc", "act"),
    down=("mlp", "c_proj", "dropout"),
    norm2="ln_2",
)
BERT = Family(
    block="BertLayer",
    encoder="BertEncoder",
    pre_norm=False,
    attention="attention.self",
    heads="num_attention_heads",
    projections=("query", "key", "value"),
    attention_dropout="dropout",
    around="attention",
    out=("attention.output", "dense", "dropout"),
    norm1="attention.output.LayerNorm",
    up=("intermediate", "dense", "intermediate_act_fn"),
    down=("output", "dense", "dropout"),
    norm2="output.LayerNorm",
)
DISTILBERT = Family(
    block="TransformerBlock",
    encoder="Transformer",
    pre_norm=False,
    attention="attention",
    heads="n_heads",
    projections=("q_lin", "k_lin", "v_lin"),
    attention_dropout="dropout",
    around=None,
    out=("attention", "out_lin", None),
    norm1="sa_layer_norm",
    up=("ffn", "lin1", "activation"),
    down=("ffn", "lin2", "dropout"),
    norm2="output_layer_norm",
)


def bert(name: str) -> Family:
    return dataclasses.replace(BERT, block=f"{name}Layer", encoder=f"{name}Encoder")


# By the module of transformers that defines the classes. DistilGPT-2 is a GPT-2.
FAMILIES = {
    "transformers.models.gpt2.modeling_gpt2": GPT2,
    "transformers.models.bert.modeling_bert": BERT,
    "transformers.models.roberta.modeling_roberta": bert("Roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": bert("XLMRoberta"),
    "transformers.models.camembert.modeling_camembert": bert("Camembert"),
    "transformers.models.electra.modeling_electra": bert("Electra"),
    "transformers.models.distilbert.modeling_distilbert": DISTILBERT,
}


@dataclasses.dataclass(frozen=True)
class Head:
    """How a language-model head makes its loss of logits and labels: the cross-entropy, its mean over the labels that are not -100."""

    shifted: bool = False  # a token's logits are held against the label of the next one
    chosen: bool = False  # by the model's loss function, which a user may set and which takes num_items_in_batch, ignore_index and shift_labels
    logits: str = "logits"  # what the output calls them
    other: tuple[str, str] | None = (
        None  # another label and the logits that it is for, whose cross-entropy is added; without it there is no loss
    )

    def __deepcopy__(self, memo: dict) -> "Head":
        return self


CAUSAL, MASKED = Head(shifted=True, chosen=True), Head()

# Heads with the fused loss, by class.
HEADS = {
    "GPT2LMHeadModel": CAUSAL,
    "GPT2DoubleHeadsModel": Head(shifted=True),
    "BertLMHeadModel": CAUSAL,
    "BertForMaskedLM": MASKED,
    "BertForPreTraining": Head(logits="prediction_logits", other=("next_sentence_label", "seq_relationship_logits")),
    "RobertaForCausalLM": CAUSAL,
    "RobertaForMaskedLM": MASKED,
    "XLMRobertaForCausalLM": CAUSAL,
    "XLMRobertaForMaskedLM": MASKED,
    "CamembertForCausalLM": CAUSAL,
    "CamembertForMaskedLM": MASKED,
    "ElectraForCausalLM": CAUSAL,
    "ElectraForMaskedLM": MASKED,
    "DistilBertForMaskedLM": MASKED,
}
