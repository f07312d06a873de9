"""How a model of sentence-transformers makes an embedding, from its modules or from the files in its directory.

The directory is read without sentence-transformers: modules.json lists its modules, of which each has a config.json.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.core.errors import did_you_mean, mismatch, shown
from fastlm.core.modules import first_parameter
from fastlm.integrations.encoding.pooling import check_pooling
from fastlm.integrations.encoding.tokens import one_line
from fastlm.models.config import read_json

MODULES = "modules.json"
# Of the first module: the name depends on the version and the family.
TRANSFORMER_FILES = [
    f"sentence_{family}_config.json" for family in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
]
PROMPTS = "config_sentence_transformers.json"
# What a version before 5.4 writes for each kind of pooling, in the order in which vectors are concatenated.
POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
# Kinds of modules that may follow the pooling, by the names of their classes in sentence-transformers.
FOLLOWING = ("Normalize", "Dense", "LayerNorm", "Dropout")
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
SENTENCE = "sentence_embedding"


@dataclasses.dataclass(frozen=True)
class Settings:
    """None: not set."""

    modes: tuple[str, ...] | None = None  # of pooling
    includes_prompt: bool = True  # in the pooling
    after: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()  # what follows the pooling: (its kind, function)
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None  # name
    max_length: int | None = None
    lower_case: bool = False
    width: int | None = None  # to which embeddings are cut

    def prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        if name is None:
            name = self.default_prompt
            return "" if name is None else self.prompts.get(name) or ""
        if name not in self.prompts:
            expected = f"one of {', '.join(map(repr, self.prompts))}" if self.prompts else "None, as the model has none"
            raise mismatch("prompt_name", expected, f"{shown(name)}{did_you_mean(name, self.prompts)}")
        return self.prompts[name] or ""


# From modules


def from_model(model: Any) -> tuple[nn.Module, Any, Settings]:
    """(the transformers model, its tokenizer, settings) of a SentenceTransformer."""
    modules = list(model)
    kinds = kinds_of_modules()
    found = [kinds.get(type(module)) for module in modules]
    if found[:2] != ["Transformer", "Pooling"] or not set(found[2:]) <= set(FOLLOWING):
        names = ", ".join(type(module).__name__ for module in modules)
        raise mismatch("model", expected_modules(), f"a SentenceTransformer of {names}")
    transformer, pooling, *following = modules
    if "message" in getattr(transformer, "modality_config", {}):
        raise mismatch("model", "a model of plain texts", "one that takes messages; call its own encode")
    if getattr(transformer, "processing_kwargs", {}).get("text"):
        raise mismatch("model", "a tokenizer without processing_kwargs", "some; call the model's own encode")
    modes, includes_prompt = pooling_settings(pooling.get_config_dict())
    for module in following:
        if not is_of_sentences(vars(module)):
            got = f"{type(module).__name__} of another"
            raise mismatch("model", f"modules of {SENTENCE} alone after the pooling", got)
    settings = Settings(
        modes,
        includes_prompt,
        tuple((kinds[type(module)], function_of(module)) for module in following),
        model.prompts,
        model.default_prompt_name,
        transformer.max_seq_length,
        bool(getattr(transformer, "do_lower_case", False)),
        model.truncate_dim,
    )
    return transformer.auto_model, transformer.tokenizer, settings


def is_of_sentences(described: Mapping[str, Any]) -> bool:
    """Whether a module after the pooling, described by its attributes or configuration, changes embeddings alone."""
    return all((described.get(f"module_{side}_name") or SENTENCE) == SENTENCE for side in ("input", "output"))


@functools.cache
def kinds_of_modules() -> dict[type, str]:
    """The kind of each class of modules that is supported. A class derived from one may compute something else."""
    try:
        modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")  # since version 5.4
    except ModuleNotFoundError:
        modules = importlib.import_module("sentence_transformers.models")
    return {getattr(modules, kind): kind for kind in ("Transformer", "Pooling", *FOLLOWING)}


def function_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return normalized if kinds_of_modules()[type(module)] == "Normalize" else functools.partial(run_module, module)


def run_module(module: nn.Module, x: Tensor) -> Tensor:
    parameter = first_parameter(module, x)
    return module({SENTENCE: x.to(parameter.device, parameter.dtype)})[SENTENCE].float()


def expected_modules() -> str:
    return f"a Transformer, a Pooling and any of {', '.join(FOLLOWING)}"


def pooling_settings(config: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    modes = config.get("pooling_mode") or [name for key, name in POOLING_KEYS.items() if config.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    return tuple(map(check_pooling, modes)), config.get("include_prompt", True) is not False


# From a directory


def from_directory(directory: Path) -> tuple[Path, Settings]:
    """(the directory of the transformers model, settings); those of a model of transformers are empty."""
    file = directory / MODULES
    if not file.is_file():
        return directory, Settings()
    modules = read_modules(file)
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or not set(names[2:]) <= set(FOLLOWING):
        raise mismatch(str(file), expected_modules(), ", ".join(names) or "no module")
    folders = [directory / path for _, path in modules]
    found = (read_json(folders[0] / name) for name in TRANSFORMER_FILES if (folders[0] / name).is_file())
    transformer = next(found, {})
    if "message" in transformer.get("modality_config", {}):
        raise mismatch(str(folders[0]), "a model of plain texts", "one that takes messages")
    described = read_json(directory / PROMPTS) if (directory / PROMPTS).is_file() else {}
    try:
        modes, includes_prompt = pooling_settings(read_json(folders[1] / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folders[1] / 'config.json'}: {error}") from None
    settings = Settings(
        modes,
        includes_prompt,
        tuple((name, FROM_FILES[name](folder)) for name, folder in zip(names[2:], folders[2:], strict=True)),
        described.get("prompts") or {},
        described.get("default_prompt_name"),
        transformer.get("max_seq_length"),
        bool(transformer.get("do_lower_case")),
        described.get("truncate_dim"),
    )
    return folders[0], settings


def read_modules(file: Path) -> list[tuple[str, str]]:
    """(class, directory) of each."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [(entry["type"].rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise mismatch(str(file), 'a list of modules with "type" and "path"', "another one") from None


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


class Dense(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
        activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class LayerNorm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config["dimension"])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def read_weights(kind: type[nn.Module], folder: Path) -> nn.Module:
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if config.get("use_residual") or not is_of_sentences(config):
        raise mismatch(str(folder / "config.json"), f"a layer of {SENTENCE} alone", "another one")
    try:
        module = kind(config)
        if weights.is_file():
            load_model(module, weights)
        else:
            module.load_state_dict(torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise FileNotFoundError(f"{weights}: no such file") from None
    except Exception as error:  # damaged files raise many types of error
        raise ValueError(f"{folder}: the layer could not be read ({one_line(error)})") from None
    return module.requires_grad_(False).float()


def read_normalize(folder: Path) -> Callable[[Tensor], Tensor]:
    file = folder / "config.json"  # which older versions do not write
    if file.is_file() and not is_of_sentences(read_json(file)):
        raise mismatch(str(file), f"a layer of {SENTENCE} alone", "another one")
    return normalized


FROM_FILES: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "Normalize": read_normalize,
    "Dropout": lambda folder: nn.Identity(),
    "Dense": functools.partial(read_weights, Dense),
    "LayerNorm": functools.partial(read_weights, LayerNorm),
}
