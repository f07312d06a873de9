"""Configurations of the decoders that CausalLM computes: Llama's layer, and how each family's differs from it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from fastlm.core.errors import did_you_mean, mismatch, shown
from fastlm.models.config import (
    Config,
    check_divisible,
    check_epsilon,
    check_flags,
    check_probabilities,
    check_sizes,
    check_softcap,
    is_number,
)
from fastlm.models.rope import rope_tables

# Hugging Face's names of the activations of a gated MLP, as fastlm.glu_mlp names them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(kw_only=True)
class RotaryConfig(Config):
    """Settings of rotary positions, from files of transformers 5 and of earlier versions."""

    # {"rope_type": "default", "rope_theta": 10000.0, …}, or such a dict for each type of layer.
    rope_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    default_theta: ClassVar[float] = 10000.0

    def check_rope(self, layer_types: Iterable[str]) -> None:
        if not isinstance(self.rope_parameters, dict):
            raise mismatch("rope_parameters", "a JSON object", shown(self.rope_parameters))
        for kind in sorted(set(layer_types)):
            given = self.rope_parameters.get(kind, self.rope_parameters)
            share = given.get("partial_rotary_factor") if isinstance(given, dict) else None
            if share not in (None, 1):  # which transformers' models of these families ignore, depending on the type
                raise mismatch("partial_rotary_factor", "1 or null", shown(share))
            rope_tables(self, torch.zeros(1, dtype=torch.int64, device="cpu"), layer_type=kind)  # checks the settings

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Any:
        given = dict(given)
        older = {key: given.pop(key, None) for key in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
        if not given.get("rope_parameters"):
            given["rope_parameters"] = cls.rope_parameters_of(older, given)
        return super().from_dict(given)

    @classmethod
    def rope_parameters_of(cls, older: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """rope_parameters of the settings that transformers had before version 5."""
        scaling = older["rope_scaling"]
        if not isinstance(scaling, dict | None):
            raise mismatch("rope_scaling", "a JSON object or null", shown(scaling))
        scaling = dict(scaling or {})
        kinds = scaling.pop("rope_type", None), scaling.pop("type", None), "default"
        found = {"rope_type": next(kind for kind in kinds if kind), "rope_theta": older["rope_theta"], **scaling}
        found["rope_theta"] = cls.default_theta if found["rope_theta"] is None else found["rope_theta"]
        if older["partial_rotary_factor"] is not None:
            found["partial_rotary_factor"] = older["partial_rotary_factor"]
        return found


@dataclasses.dataclass(kw_only=True)
class DecoderConfig(RotaryConfig):
    """Settings of a decoder with RMSNorm, rotary positions and a gated MLP. The defaults are Llama's.

    Class attributes, which describe a family:
        unit_offset: norms multiply by 1 + weight, as Gemma's do, and not by weight.
        query_key_norm: queries and keys are normalised over each head before they are rotated.
        output_norms: the outputs of attention and MLP are normalised before they are added to the residual.
        scaled_embeddings: token embeddings are multiplied by √hidden_size.
        query_bias, output_bias: of the projections of attention; None: attention_bias says.
    """

    presets: ClassVar = {}
    architecture: ClassVar[str]  # the class of transformers with a language-modelling head
    unit_offset: ClassVar[bool] = False
    query_key_norm: ClassVar[bool] = False
    output_norms: ClassVar[bool] = False
    scaled_embeddings: ClassVar[bool] = False
    query_bias: ClassVar[bool | None] = None
    output_bias: ClassVar[bool | None] = None

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None  # a query attends to so many tokens, its own included; None: to all before it
    layer_types: list[str] | None = None  # of each layer, one of LAYER_TYPES; None: as the family has them
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        check_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            check_divisible(self, "num_attention_heads", "hidden_size")
            self.head_dim = self.hidden_size // self.num_attention_heads
        check_sizes(self, "num_key_value_heads", "head_dim")
        check_divisible(self, "num_key_value_heads", "num_attention_heads")
        check_flags(self, "attention_bias", "mlp_bias")
        check_probabilities(self, "attention_dropout")
        check_epsilon(self, "rms_norm_eps")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            got = shown(self.hidden_act) + did_you_mean(self.hidden_act, ACTIVATIONS)
            raise mismatch("hidden_act", f"one of {', '.join(ACTIVATIONS)}", got)
        if self.sliding_window is not None:
            check_sizes(self, "sliding_window")
        if self.layer_types is None:
            self.layer_types = self.usual_layer_types()
        self.check_layer_types(self.layer_types)
        self.check_rope(self.layer_types)
        super().__post_init__()

    def usual_layer_types(self) -> list[str]:
        return [LAYER_TYPES[self.slides(layer)] for layer in range(self.num_hidden_layers)]

    def slides(self, layer: int) -> bool:
        """Whether a layer attends to a sliding window, where layer_types does not say."""
        return self.sliding_window is not None

    def rotates(self, layer: int) -> bool:
        """Whether a layer has rotary positions."""
        return True

    def window(self, layer: int) -> tuple[int | None, int | None] | None:
        """The argument `window` of fastlm.attention."""
        assert self.layer_types is not None
        if self.layer_types[layer] != "sliding_attention" or self.sliding_window is None:
            return None
        return self.sliding_window - 1, None

    def windows(self) -> list[int | None]:
        """For each layer, to how many tokens before its own a query attends; None: to all."""
        found = [self.window(layer) for layer in range(self.num_hidden_layers)]
        return [None if window is None else window[0] for window in found]

    def scale(self) -> float:
        """Of the scores of attention."""
        assert self.head_dim is not None
        return self.head_dim**-0.5

    def score_softcap(self) -> float | None:
        """The cap of the scores of attention, if they have one."""
        return None

    def logit_softcap(self) -> float | None:
        """The cap of the logits, if they have one."""
        return None

    def check_layer_types(self, given: Any) -> None:
        expected = f"num_hidden_layers = {self.num_hidden_layers} of {', '.join(LAYER_TYPES)}"
        if not isinstance(given, list) or len(given) != self.num_hidden_layers:
            got = f"{len(given)} entries" if isinstance(given, list) else shown(given)
            raise mismatch("layer_types", expected, got)
        for kind in given:
            if kind not in LAYER_TYPES:
                raise mismatch("layer_types", expected, shown(kind))
        if "sliding_attention" in given and self.sliding_window is None:
            raise mismatch("sliding_window", "an integer >= 1, as layer_types has sliding_attention", "null")

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Any:
        """From the contents of a config.json; as DecoderConfig, of the class that its model_type names.

        Raises:
            ValueError: a setting is not supported; the message names it.
        """
        if cls is DecoderConfig:
            kind = given.get("model_type")
            if not isinstance(kind, str) or kind not in BY_MODEL_TYPE:
                got = shown(kind) + did_you_mean(kind, BY_MODEL_TYPE)
                raise mismatch("model_type", f"one of {', '.join(BY_MODEL_TYPE)}", got)
            return BY_MODEL_TYPE[kind].from_dict(given)
        return super().from_dict(given)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers can also read, version 4 too."""
        values = super().to_dict()
        if (
            values["layer_types"] == self.usual_layer_types()
        ):  # transformers takes a Mistral with them for another model
            del values["layer_types"]
        return {**values, **self.older_rope_parameters()}

    def older_rope_parameters(self) -> dict[str, Any]:
        scaling = dict(self.rope_parameters)
        theta = scaling.pop("rope_theta", self.default_theta)
        return {
            "rope_theta": theta,
            "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        }


@dataclasses.dataclass(kw_only=True)
class LlamaConfig(DecoderConfig):
    """Llama 1 to 3 (Touvron et al., 2023, arXiv:2302.13971), SmolLM 2 and others of their architecture."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    fixed: ClassVar = Config.fixed | {"pretraining_tp": 1, "sliding_window": None}


@dataclasses.dataclass(kw_only=True)
class MistralConfig(DecoderConfig):
    """Mistral 7B (Jiang et al., 2023, arXiv:2310.06825): every layer has the sliding window."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    fixed: ClassVar = Config.fixed | {"attention_bias": False, "mlp_bias": False}

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096


@dataclasses.dataclass(kw_only=True)
class WindowedLater(DecoderConfig):
    """Of Qwen 2 and 3: layers from max_window_layers on slide, if use_sliding_window is true."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        check_flags(self, "use_sliding_window")
        if not isinstance(self.max_window_layers, int) or isinstance(self.max_window_layers, bool):
            raise mismatch("max_window_layers", "an integer", shown(self.max_window_layers))
        if not self.use_sliding_window:
            self.sliding_window = None
        super().__post_init__()

    def slides(self, layer: int) -> bool:
        return self.sliding_window is not None and layer >= self.max_window_layers


@dataclasses.dataclass(kw_only=True)
class Qwen2Config(WindowedLater):
    """Qwen 2 and 2.5 (Yang et al., 2024, arXiv:2407.10671): biases of query, key and value."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fixed: ClassVar = Config.fixed | {"attention_bias": False, "mlp_bias": False}
    query_bias: ClassVar = True
    output_bias: ClassVar = False


@dataclasses.dataclass(kw_only=True)
class Qwen3Config(WindowedLater):
    """Qwen 3 (Yang et al., 2025, arXiv:2505.09388): queries and keys are normalised."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fixed: ClassVar = Config.fixed | {"mlp_bias": False}
    query_key_norm: ClassVar = True

    head_dim: int | None = 128


@dataclasses.dataclass(kw_only=True)
class SmolLM3Config(DecoderConfig):
    """SmolLM 3: some layers have no rotary positions, and the sliding window if use_sliding_window is true."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    default_theta: ClassVar = 2000000.0

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    no_rope_layers: list[int] | None = None  # 1 for each layer with rotary positions, 0 for one without
    no_rope_layer_interval: int = 4  # without no_rope_layers: every so many layers has none
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

    def __post_init__(self) -> None:
        check_flags(self, "use_sliding_window")
        check_sizes(self, "num_hidden_layers", "no_rope_layer_interval")
        if self.no_rope_layers is None:
            every = self.no_rope_layer_interval
            self.no_rope_layers = [int((layer + 1) % every != 0) for layer in range(self.num_hidden_layers)]
        given = self.no_rope_layers
        if not isinstance(given, list) or len(given) < self.num_hidden_layers or not all(x in (0, 1) for x in given):
            raise mismatch("no_rope_layers", f"{self.num_hidden_layers} of 0 and 1", shown(given))
        if not self.use_sliding_window:
            self.sliding_window, self.layer_types = None, None
        super().__post_init__()

    def slides(self, layer: int) -> bool:
        return self.sliding_window is not None and not self.rotates(layer)

    def rotates(self, layer: int) -> bool:
        assert self.no_rope_layers is not None
        return bool(self.no_rope_layers[layer])


@dataclasses.dataclass(kw_only=True)
class GemmaConfig(DecoderConfig):
    """What Gemma 2 and 3 have in common: norms of 1 + weight, of outputs too, and scaled embeddings."""

    aliases: ClassVar = {"hidden_activation": "hidden_act"}
    unit_offset: ClassVar = True
    output_norms: ClassVar = True
    scaled_embeddings: ClassVar = True
    PERIOD: ClassVar[int]  # of so many layers, the last attends to all tokens

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    sliding_window: int | None = 4096
    query_pre_attn_scalar: float = 256  # scores are divided by its square root
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self) -> None:
        if not is_number(self.query_pre_attn_scalar) or not 0 < self.query_pre_attn_scalar <= 2**31:
            raise mismatch("query_pre_attn_scalar", "a number > 0", shown(self.query_pre_attn_scalar))
        super().__post_init__()

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.PERIOD != 0

    def scale(self) -> float:
        return float(self.query_pre_attn_scalar) ** -0.5

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["hidden_activation"] = values.pop("hidden_act")
        return values


@dataclasses.dataclass(kw_only=True)
class Gemma2Config(GemmaConfig):
    """Gemma 2 (2024, arXiv:2408.00118): sliding layers and layers that attend to all tokens alternate; the scores of
    attention and the logits are capped."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    fixed: ClassVar = Config.fixed | {"mlp_bias": False, "use_bidirectional_attention": False}
    PERIOD: ClassVar = 2

    vocab_size: int = 256000
    max_position_embeddings: int = 8192
    attn_logit_softcapping: float | None = 50.0  # scores and logits are below these in magnitude; None: any
    final_logit_softcapping: float | None = 30.0

    def __post_init__(self) -> None:
        check_softcap(self, "attn_logit_softcapping")
        check_softcap(self, "final_logit_softcapping")
        super().__post_init__()

    def score_softcap(self) -> float | None:
        return self.attn_logit_softcapping

    def logit_softcap(self) -> float | None:
        return self.final_logit_softcapping


@dataclasses.dataclass(kw_only=True)
class Gemma3Config(GemmaConfig):
    """The text model of Gemma 3 (2025, arXiv:2503.19786): five sliding layers, with positions of their own, then one
    that attends to all tokens."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fixed: ClassVar = Config.fixed | {
        "mlp_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    query_key_norm: ClassVar = True
    default_theta: ClassVar = 1000000.0
    PERIOD: ClassVar = 6

    vocab_size: int = 262208
    max_position_embeddings: int = 131072

    @classmethod
    def rope_parameters_of(cls, older: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        local = given.pop("rope_local_base_freq", None)
        sliding = {"rope_type": "default", "rope_theta": 10000.0 if local is None else local}
        return {"full_attention": super().rope_parameters_of(older, given), "sliding_attention": sliding}

    def older_rope_parameters(self) -> dict[str, Any]:
        full, sliding = (dict(self.rope_parameters.get(kind, {})) for kind in LAYER_TYPES)
        theta = full.pop("rope_theta", self.default_theta)
        return {
            "rope_theta": theta,
            "rope_scaling": None if full.get("rope_type", "default") == "default" else full,
            "rope_local_base_freq": sliding.get("rope_theta", 10000.0),
        }


BY_MODEL_TYPE: dict[str, type[DecoderConfig]] = {
    c.model_type: c
    for c in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config, Gemma2Config, Gemma3Config)
}
