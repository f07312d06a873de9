"""Which class a directory holds."""

from pathlib import Path

import torch

from fastlm.models.base import PretrainedModel
from fastlm.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from fastlm.models.config import read_json
from fastlm.models.gpt2 import GPT2LMHeadModel, GPT2Model

CLASSES: dict[str, type[PretrainedModel]] = {
    c.__name__: c for c in (GPT2Model, GPT2LMHeadModel, BertModel, BertForMaskedLM, BertForSequenceClassification)
}
CLASSES["BertForPreTraining"] = BertForMaskedLM  # what BERT was first published as: the same model with one head more
BY_TYPE: dict[str, type[PretrainedModel]] = {
    "gpt2": GPT2LMHeadModel,
    "bert": BertForMaskedLM,
}  # where the file names no class


def load_model(directory: str | Path, *, dtype: torch.dtype | None = None) -> PretrainedModel:
    """The model in a Hugging Face directory, as the class that its config.json names (`architectures`, else `model_type`)."""
    path = Path(directory) / "config.json"
    settings = read_json(path)
    names = settings.get("architectures") or []
    found = [CLASSES[name] for name in names if name in CLASSES]
    if names and not found:
        raise ValueError(f"{path}: architectures: expected one of {', '.join(CLASSES)}, got {', '.join(names)}")
    if not found and settings.get("model_type") not in BY_TYPE:
        got = repr(settings.get("model_type"))
        raise ValueError(
            f"{path}: model_type: expected one of {', '.join(BY_TYPE)}, got {got}; the class itself reads it, as BertForMaskedLM.from_pretrained"
        )
    return (found[0] if found else BY_TYPE[settings["model_type"]]).from_pretrained(directory, dtype=dtype)
