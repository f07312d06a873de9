"""The settings of a model and the JSON they are kept in: Hugging Face's keys, so that a directory written by either library is read by the other."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastlm.ops.boundary import mismatch

C = TypeVar("C", bound="Config")

# Hugging Face has seven names for two functions: the exact GELU and its tanh approximation (Hendrycks & Gimpel, 2016, arXiv:1606.08415).
GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}

# Written anew for every save, so a value from the file that was read would only go stale.
REWRITTEN = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclasses.dataclass(kw_only=True)
class Config:
    """What GPT-2's and BERT's settings share. A key that changes no arithmetic here is kept in `other` and saved again."""

    model_type: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]]
    # Keys that change the mathematics, with the only value that this library computes.
    fixed: ClassVar[dict[str, Any]] = {
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "quantization_config": None,
    }
    aliases: ClassVar[dict[str, str]] = {}

    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    other: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def preset(cls: type[C], name: str, **changes: Any) -> C:
        """The published sizes, by name: `GPT2Config.preset("gpt2-medium", n_positions=256)`."""
        if name not in cls.presets:
            raise mismatch("name", f"one of {', '.join(cls.presets)}", repr(name))
        return cls(**{**cls.presets[name], **changes})

    @classmethod
    def from_dict(cls: type[C], given: dict[str, Any]) -> C:
        """From the contents of a config.json; ValueError names a key that this library cannot compute."""
        given = {cls.aliases.get(key, key): value for key, value in given.items()}
        model_type = given.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise mismatch("model_type", repr(cls.model_type), repr(model_type))
        for key, value in cls.fixed.items():
            if given.get(key, value) not in (value, None):
                raise mismatch(key, f"{value!r}, the only one supported", repr(given[key]))
        known = {field.name for field in dataclasses.fields(cls)} - {"other"}
        if "num_labels" in known and "num_labels" not in given and given.get("id2label"):
            given["num_labels"] = len(given["id2label"])
        other = {key: value for key, value in given.items() if key not in known and key not in REWRITTEN}
        return cls(**{key: value for key, value in given.items() if key in known}, other=other)

    @classmethod
    def from_pretrained(cls: type[C], directory: str | Path) -> C:
        """From `directory`/config.json."""
        path = Path(directory) / "config.json"
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What a config.json holds; Hugging Face's own classes read it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values.pop("other"), **values, "model_type": self.model_type}


@dataclasses.dataclass(kw_only=True)
class GPT2Config(Config):
    """GPT-2 (Radford et al., 2019). The defaults are those of "gpt2", the smallest."""

    model_type = "gpt2"
    presets: ClassVar = {
        "gpt2": {},
        "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
        "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    }
    aliases: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: tokens that the model sees at most
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width inside the feed-forward part; None: 4 · n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True  # by 1/√head_dim
    scale_attn_by_inverse_layer_idx: bool = False  # also by 1/(layer + 1)
    reorder_and_upcast_attn: bool = False  # softmax in float32: always the case here
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256

    def __post_init__(self) -> None:
        sizes(
            self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", *["n_inner"] * (self.n_inner is not None)
        )
        divides(self, "n_head", "n_embd")
        probabilities(self, "resid_pdrop", "embd_pdrop", "attn_pdrop")
        one_gelu(self, "activation_function")


@dataclasses.dataclass(kw_only=True)
class BertConfig(Config):
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
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    num_labels: int = 2  # of BertForSequenceClassification
    problem_type: str | None = None  # None: by the labels, see BertForSequenceClassification

    def __post_init__(self) -> None:
        sizes(
            self,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        sizes(self, "type_vocab_size", "num_labels")
        divides(self, "num_attention_heads", "hidden_size")
        probabilities(
            self,
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            *["classifier_dropout"] * (self.classifier_dropout is not None),
        )
        one_gelu(self, "hidden_act")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise mismatch("pad_token_id", f"a token id in [0, {self.vocab_size})", self.pad_token_id)
        problems = (None, "regression", "single_label_classification", "multi_label_classification")
        if self.problem_type not in problems:
            raise mismatch("problem_type", f"one of {', '.join(map(str, problems))}", repr(self.problem_type))

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        count = values.pop("num_labels")  # Hugging Face counts the names instead
        if len(values.get("id2label") or ()) != count:
            labels = [f"LABEL_{i}" for i in range(count)]
            values |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        return values


def sizes(config: Config, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise mismatch(key, "a whole number of at least 1", repr(value))


def divides(config: Config, heads: str, width: str) -> None:
    if getattr(config, width) % getattr(config, heads):
        raise mismatch(width, f"a multiple of {heads}, {getattr(config, heads)}", getattr(config, width))


def probabilities(config: Config, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(config, key) < 1:
            raise mismatch(key, "a probability in [0, 1)", getattr(config, key))


def one_gelu(config: Config, key: str) -> None:
    if getattr(config, key) not in GELUS:
        raise mismatch(key, f"one of {', '.join(GELUS)}", repr(getattr(config, key)))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; a missing or damaged file is a one-line error that names it."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; a directory in Hugging Face's format has one, and nothing is downloaded"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents
