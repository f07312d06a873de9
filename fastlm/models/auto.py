"""Selects the model class for a directory by its config.json."""

from pathlib import Path

import torch

import fastlm.models.encoder_families
import fastlm.models.rotary_encoder_families  # noqa: F401 (both register their families)
from fastlm.core.errors import check_path, did_you_mean
from fastlm.models.base import PretrainedModel
from fastlm.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from fastlm.models.checkpoint import summary
from fastlm.models.config import CONFIG, read_json, stored
from fastlm.models.decoder import CausalLM
from fastlm.models.decoder_config import BY_MODEL_TYPE as DECODERS
from fastlm.models.encoder import EncoderModel, classes_of
from fastlm.models.encoder_config import BY_MODEL_TYPE as ENCODERS
from fastlm.models.gpt2 import GPT2LMHeadModel, GPT2Model

BY_ARCHITECTURE: dict[str, type[PretrainedModel]] = {
    c.__name__: c for c in (GPT2Model, GPT2LMHeadModel, BertModel, BertForMaskedLM, BertForSequenceClassification)
}
BY_ARCHITECTURE["BertForPreTraining"] = BertForMaskedLM  # the original BERT checkpoints: one more head, not loaded
BY_ARCHITECTURE |= {config.architecture: CausalLM for config in DECODERS.values()}
for family in ENCODERS.values():
    for name, encoder in classes_of(family).items():
        BY_ARCHITECTURE.setdefault(name, encoder)  # BERT has classes of its own
# Used when config.json has no `architectures`.
BY_MODEL_TYPE: dict[str, type[PretrainedModel]] = {"gpt2": GPT2LMHeadModel, "bert": BertForMaskedLM}
BY_MODEL_TYPE |= dict.fromkeys(DECODERS, CausalLM)
for model_type in ENCODERS:
    BY_MODEL_TYPE.setdefault(model_type, EncoderModel)


def load_model(directory: str | Path, *, dtype: torch.dtype | None = None) -> PretrainedModel:
    """Loads the model in a Hugging Face directory, as the class named by config.json.

    The class follows from `architectures`, or from `model_type` if that is missing.

    Args:
        dtype: of the parameters; None: as stored.

    Raises:
        FileNotFoundError, ValueError: as from_pretrained, or for a class that is not supported.
    """
    check_path("directory", directory)
    path = stored(directory, CONFIG)
    settings = read_json(path)
    architectures = settings.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{path}: architectures: expected a list of names, got {architectures!r}")
    supported = [BY_ARCHITECTURE[name] for name in architectures if name in BY_ARCHITECTURE]
    if supported:
        return supported[0].from_pretrained(directory, dtype=dtype)
    if architectures:
        got = f"{', '.join(architectures)}{did_you_mean(architectures[0], BY_ARCHITECTURE)}"
        raise ValueError(f"{path}: architectures: expected one of {summary([*BY_ARCHITECTURE])}, got {got}")
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise ValueError(
            f"{path}: model_type: expected one of {', '.join(BY_MODEL_TYPE)}, got {model_type!r}; "
            "call from_pretrained of the model class instead, as in BertForMaskedLM.from_pretrained"
        )
    return BY_MODEL_TYPE[model_type].from_pretrained(directory, dtype=dtype)
