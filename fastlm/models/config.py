"""Model configurations and their JSON files, in Hugging Face's format."""

import dataclasses
import json
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from fastlm.core.errors import check_path, did_you_mean, mismatch, shown, wrong_type

C = TypeVar("C", bound="Config")

# Hugging Face's names of the exact GELU ("none") and of its tanh approximation
# (Hendrycks & Gimpel, 2016, arXiv:1606.08415).
GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}

MAX_SIZE = 2**31 - 1
MAX_FLOAT32 = 3.4028234663852886e38
MIN_FLOAT32 = 1.1754943508222875e-38  # above 0, in full precision

# Keys that every save sets; values read from a file would be outdated.
SET_ON_SAVE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


CONFIG = "config.json"
COMMITTED = ".committed"  # complete files of a checkpoint that have not been moved to their places yet


@dataclasses.dataclass(kw_only=True)
class Config:
    """Settings shared by all models.

    Keys of a config.json that do not affect the computation are kept in `other` and written back on saving.
    """

    model_type: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]]
    # Keys that affect the computation, with the only supported value.
    fixed: ClassVar[dict[str, Any]] = {
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "quantization_config": None,
    }
    # Other names of settings, as keys of a config.json and as attributes.
    aliases: ClassVar[dict[str, str]] = {}

    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    other: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_flags(self, "tie_word_embeddings")
        check_token_ids(self, "bos_token_id", "eos_token_id", "pad_token_id")
        if not is_number(self.initializer_range) or not 0 <= self.initializer_range <= MAX_FLOAT32:
            raise mismatch("initializer_range", "a finite number >= 0", shown(self.initializer_range))
        if not isinstance(self.other, dict):
            raise wrong_type("other", "a dict", self.other)

    @classmethod
    def preset(cls: type[C], name: str, **changes: Any) -> C:
        """A published model size with optional changes: `GPT2Config.preset("gpt2-medium", n_positions=256)`."""
        if name not in cls.presets:
            raise mismatch("name", f"one of {', '.join(cls.presets)}", f"{name!r}{did_you_mean(name, cls.presets)}")
        return cls(**{**cls.presets[name], **changes})

    @classmethod
    def from_dict(cls: type[C], given: dict[str, Any]) -> C:
        """From the contents of a config.json.

        Raises:
            ValueError: a setting is not supported; the message names it.
        """
        given = {cls.aliases.get(key, key): value for key, value in given.items()}
        model_type = given.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise mismatch("model_type", repr(cls.model_type), shown(model_type))
        for key, value in cls.fixed.items():
            if given.get(key, value) not in (value, None):
                raise mismatch(key, f"{value!r}, the only supported value", repr(given[key]))
        known = {field.name for field in dataclasses.fields(cls)} - {"other"}
        if "num_labels" in known and "num_labels" not in given and given.get("id2label"):
            if not isinstance(given["id2label"], dict):
                raise mismatch("id2label", "a name for each label", repr(given["id2label"]))
            given["num_labels"] = len(given["id2label"])
        other = {key: value for key, value in given.items() if key not in known and key not in SET_ON_SAVE}
        return cls(**{key: value for key, value in given.items() if key in known}, other=other)

    @classmethod
    def from_pretrained(cls: type[C], directory: str | Path) -> C:
        """From config.json in `directory`."""
        check_path("directory", directory)
        path = stored(directory, CONFIG)
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, by the names of parameters, where a family's files have other names."""
        return tensors

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers can also read."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values.pop("other"), **values, "model_type": self.model_type}

    def __getattr__(self, name: str) -> Any:
        if name in type(self).aliases:
            return getattr(self, type(self).aliases[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclasses.dataclass(kw_only=True)
class GPT2Config(Config):
    """GPT-2 (Radford et al., 2019). The defaults are those of "gpt2", the smallest model."""

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
    n_positions: int = 1024  # context: maximum number of tokens
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 · n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # scale by 1/√head_dim
    scale_attn_by_inverse_layer_idx: bool = False  # scale by 1/(layer + 1) too
    reorder_and_upcast_attn: bool = False  # softmax in float32, which fastlm always does
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if self.n_inner is not None:
            check_sizes(self, "n_inner")
        check_divisible(self, "n_head", "n_embd")
        check_probabilities(self, "resid_pdrop", "embd_pdrop", "attn_pdrop")
        check_epsilon(self, "layer_norm_epsilon")
        check_flags(self, "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
        check_one_of(self, "activation_function", GELUS)
        super().__post_init__()


def check_sizes(config: Config, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise mismatch(key, "an integer >= 1", shown(value))
        if value > MAX_SIZE:
            raise mismatch(key, f"an integer <= {MAX_SIZE}", shown(value))


def check_divisible(config: Config, heads: str, width: str) -> None:
    if getattr(config, width) % getattr(config, heads):
        raise mismatch(width, f"a multiple of {heads} = {getattr(config, heads)}", getattr(config, width))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_probabilities(config: Config, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not is_number(value) or not 0 <= value < 1:
            raise mismatch(key, "a probability in [0, 1)", shown(value))


def check_epsilon(config: Config, key: str) -> None:
    value = getattr(config, key)
    if not is_number(value) or not 0 < value <= MAX_FLOAT32:
        raise mismatch(key, "a finite number > 0", shown(value))


def check_softcap(config: Config, key: str) -> None:
    value = getattr(config, key)
    if value is not None and (not is_number(value) or not MIN_FLOAT32 <= value <= MAX_FLOAT32):
        raise mismatch(key, "a finite number > 0 or null", shown(value))


def check_flags(config: Config, *keys: str) -> None:
    for key in keys:
        if not isinstance(getattr(config, key), bool):
            raise mismatch(key, "true or false", shown(getattr(config, key)))


def check_token_ids(config: Config, *keys: str) -> None:
    """None, a token id, or for the end of a text several. Ids outside the vocabulary are those of no token."""
    for key in keys:
        value = getattr(config, key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**63 for i in ids):
            raise mismatch(key, "a token id or null", reprlib.repr(value))  # the value may be long


def check_one_of(config: Config, key: str, choices: Collection[str]) -> None:
    value = getattr(config, key)
    if not isinstance(value, str) or value not in choices:
        raise mismatch(key, f"one of {', '.join(choices)}", shown(value) + did_you_mean(value, choices))


def stored(directory: str | Path, name: str) -> Path:
    """The path of a checkpoint's file: in COMMITTED if a process was killed while it saved, see checkpoint.staged."""
    committed = Path(directory) / COMMITTED / name
    return committed if committed.is_file() else Path(directory) / name


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object; a missing or damaged file raises a one-line error that names it."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: no such file; expected a local directory in Hugging Face's format (nothing is downloaded)"
        ) from None
    except (ValueError, RecursionError) as error:  # of the JSON or the UTF-8 decoder, or an integer of 5000 digits
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents
