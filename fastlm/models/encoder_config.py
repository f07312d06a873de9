"""A family of encoders: its settings, and where its modules are.

encoder_families.py and rotary_encoder_families.py have the families.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastlm.core.errors import did_you_mean, mismatch, shown
from fastlm.models.config import (
    GELUS,
    Config,
    check_divisible,
    check_one_of,
    check_sizes,
)
from fastlm.models.decoder_config import ACTIVATIONS, LAYER_TYPES

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "num_labels",
)
# A value, or "config." and the name of the setting that has it.
Value = Any
HEAD_ACTIVATIONS = {name: f"gelu_{kind}" for name, kind in GELUS.items()} | {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
}
POOLINGS = {"cls": "first", "bos": "first", "mean": "mean", "late": "late"}


BY_MODEL_TYPE: dict[str, type["EncoderConfig"]] = {}  # by model_type in config.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A head: dropout, a dense layer, its activation, a norm, dropout, and the output projection. A family's may lack
    the dense layer and the norm. The names are paths of modules in the model with the head."""

    output: str
    output_bias: Value = True
    bias: str | None = None  # a parameter that is tied to the bias of `output`
    dense: str | None = None
    dense_width: Value = "config.hidden_size"
    dense_bias: Value = True
    activation: Value = "gelu"
    norm: str | None = None
    input_dropout: Value = 0.0
    dropout: Value = 0.0
    # Of a sequence's hidden states: that of its first token, or their mean; late: the mean after the activation.
    pooling: Value = "first"
    pooled: bool = False  # reads the output of the model's pooler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the modules of a family are, as in transformers, and how they are combined.

    The names in the second and third part are paths in a layer, the others in the model without a head.
    """

    prefix: str  # the attribute under which a model with a head holds the model without
    words: str = "embeddings.word_embeddings"
    scaled_words: bool = False  # token embeddings are multiplied by √hidden_size
    learned_positions: str | None = None
    positions_after_padding: bool = False  # positions of real tokens are pad_token_id + 1, …
    types: str | None = None
    embedding_norm: str | None = None
    embedding_dropout: Value = "config.hidden_dropout_prob"
    embedding_width: Value = "config.hidden_size"
    embedding_projection: str | None = None  # to hidden_size, if embedding_width differs
    layers: str = "encoder.layer"
    final_norm: str | None = None
    pooler: str | None = None  # the dense layer on the first token of a sequence
    has_pooler: bool = False  # the model without a head has it unless told otherwise
    norm: Literal["layer", "rms", "rms_offset"] = "layer"  # rms_offset multiplies by 1 + weight
    norm_place: Literal["pre", "post"] = "post"  # before attention and MLP, or after each residual addition
    norm_bias: Value = True
    eps: Value = "config.layer_norm_eps"

    # Attention
    qkv: tuple[str, ...]  # query, key and value projections, or one projection that computes all three
    qkv_bias: Value = True
    out: str
    out_bias: Value = True
    attention_norm: str
    first_attention_norm: bool = True  # also in the first layer
    query_norm: str | None = None  # over each head, before the rotation
    key_norm: str | None = None
    attention_output_norm: str | None = None  # before the residual addition
    head_dim: Value = None  # None: hidden_size / num_attention_heads
    num_kv_heads: Value = "config.num_attention_heads"
    rotary: bool = False
    relative_bias: str | None = None  # an embedding of distances, which is added to the scores of all layers
    window: Value = None  # of sliding layers: half of it is the number of keys on each side that a query attends to
    scale: Value = None  # scores are divided by its square root; None: head_dim
    attention_dropout: Value = "config.attention_probs_dropout_prob"
    out_dropout: Value = "config.hidden_dropout_prob"

    # MLP: down(activation(up x)), or down(activation(gate x) · up x)
    gate: str | None = None  # if it is `up`, that computes gate x, then up x
    up: str
    up_bias: Value = True
    down: str
    down_bias: Value = True
    activation: Value = "config.hidden_act"
    hidden_dropout: Value = 0.0  # before the down projection
    mlp_dropout: Value = "config.hidden_dropout_prob"
    mlp_norm: str
    mlp_output_norm: str | None = None  # before the residual addition


@dataclasses.dataclass(kw_only=True)
class EncoderConfig(Config):
    """Settings of an encoder.

    Class attributes, which describe a family:
        family: the beginning of its classes' names in transformers.
        layout: its modules.
        heads: "MaskedLM", "SequenceClassification", "TokenClassification": those that it has.
        stored_names: patterns in names of published files, and what replaces them. transformers writes such files.
        fused_weights: names of weights that hold several in these files, after stored_names.
    """

    presets: ClassVar = {}
    family: ClassVar[str]
    layout: ClassVar[Layout]
    heads: ClassVar[Mapping[str, Head]] = {}
    stored_names: ClassVar[Mapping[str, str]] = {}
    fused_weights: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    num_labels: int = 2  # of a classifier
    problem_type: str | None = None  # None: follows from the labels, see EncoderForSequenceClassification

    def __init_subclass__(cls) -> None:
        if "family" in vars(cls):
            BY_MODEL_TYPE[cls.model_type] = cls

    def __post_init__(self) -> None:
        check_sizes(self, *map(self.key, SIZES))
        if self.setting(self.layout.head_dim) is None:
            check_divisible(self, self.key("num_attention_heads"), self.key("hidden_size"))
        self.check_activation()
        super().__post_init__()  # before the id is compared
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise mismatch("pad_token_id", f"a token id in [0, {self.vocab_size})", self.pad_token_id)
        problems = (None, "regression", "single_label_classification", "multi_label_classification")
        if not isinstance(self.problem_type, str | None) or self.problem_type not in problems:
            raise mismatch("problem_type", f"one of {', '.join(map(str, problems))}", shown(self.problem_type))

    def check_activation(self) -> None:
        key = self.layout.activation.removeprefix("config.")
        check_one_of(self, key, GELUS if self.layout.gate is None else ACTIVATIONS)

    def key(self, name: str) -> str:
        """The key in config.json of a setting that all families have."""
        return self.aliases.get(name, name)

    def setting(self, value: Value) -> Any:
        """A value of the layout or of a head."""
        if isinstance(value, str) and value.startswith("config."):
            return getattr(self, value.removeprefix("config."))
        return value

    def layer_type(self, layer: int) -> str:
        return LAYER_TYPES[0] if self.layout.window is None else self.setting("config.layer_types")[layer]

    def window(self, layer: int) -> tuple[int | None, int | None] | None:
        """The argument `window` of fastlm.attention."""
        if self.layer_type(layer) == LAYER_TYPES[0]:
            return None
        side = self.setting(self.layout.window) // 2
        return side, side

    def initial(self, name: str) -> tuple[float, float] | None:
        """The standard deviation of a module's initial weight, and where its distribution is cut off; None: as in
        PretrainedModel.initialise."""
        return None

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, by the names of parameters."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for pattern, replacement in cls.stored_names.items():
                name = re.sub(pattern, replacement, name)
            for fused, parts in cls.fused_weights.items():
                if fused in name:
                    chunks = zip(parts, tensor.chunk(len(parts)), strict=True)
                    found |= {name.replace(fused, part): chunk for part, chunk in chunks}
                    break
            else:
                found[name] = tensor
        return found

    @property
    def context(self) -> int:
        """The largest number of tokens of a text."""
        if self.layout.positions_after_padding and self.pad_token_id is not None:
            return int(self.max_position_embeddings) - self.pad_token_id - 1
        return int(self.max_position_embeddings)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Any:
        """From the contents of a config.json; as EncoderConfig, of the class that its model_type names.

        Raises:
            ValueError: a setting is not supported; the message names it.
        """
        if cls is not EncoderConfig:
            return super().from_dict(given)
        kind = given.get("model_type")
        if not isinstance(kind, str) or kind not in BY_MODEL_TYPE:
            got = shown(kind) + did_you_mean(kind, BY_MODEL_TYPE)
            raise mismatch("model_type", f"one of {', '.join(BY_MODEL_TYPE)}", got)
        return BY_MODEL_TYPE[kind].from_dict(given)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        count = values.pop("num_labels")  # transformers infers it from the number of names
        if len(values.get("id2label") or ()) != count:
            labels = [f"LABEL_{i}" for i in range(count)]
            values |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        return values
