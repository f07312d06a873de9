"""A model's files: safetensors, whole or in shards, and PyTorch's own .bin. Reading forgives what old files differ in; writing is all or nothing."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlm.models.config import read_json

if TYPE_CHECKING:
    from fastlm.models.base import PretrainedModel

WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in order of preference
# Constants that older versions of Hugging Face's models kept among the parameters.
CONSTANTS = re.compile(r"(^|\.)(embeddings\.position_ids|attn\.bias|attn\.masked_bias)$")
SHOWN = 10  # of a list of keys in one line

# 1. Reading


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor in a directory, by the name it has there. Those of safetensors are mapped, not read, until they are used."""
    for name in WHOLE:
        if (directory / name).is_file():
            break
    else:
        raise FileNotFoundError(f"{directory}: expected a directory with one of {', '.join(WHOLE)}")
    if not name.endswith(".index.json"):
        return read_file(directory / name)
    shards = read_json(directory / name).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    ):
        raise ValueError(f"{directory / name}: expected a weight_map from parameters to files in the same directory")
    tensors = {}
    for shard in sorted(set(shards.values())):
        tensors.update(read_file(directory / shard))
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, but the index beside it names it")
    try:
        contents = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # every reader has its own errors for a damaged file, PyTorch's half a dozen
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: truncated or not a checkpoint ({reason})") from None
    if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(f"{path}: expected tensors by name, as a state dict has them")
    return contents


def widest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The floating-point dtype that holds all of them."""
    dtype = None
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


# 2. From stored tensors to a model's parameters


def own_name(key: str, known: set[str], prefix: str) -> str | None:
    """What a stored key is called in a model that knows these; None for a constant; the key itself where the model has no such parameter."""
    if CONSTANTS.search(key):
        return None
    modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))  # LayerNorm as TensorFlow named it
    return next(
        (name for name in (modern, f"{prefix}.{modern}", modern.removeprefix(f"{prefix}.")) if name in known), key
    )


@torch.no_grad()
def fill(model: "PretrainedModel", stored: dict[str, Tensor], initialise: tuple[str, ...], directory: Path) -> None:
    """Copies stored tensors into the model's parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {own_name(key, set(parameters), model.base_model_prefix): tensor for key, tensor in stored.items()}
    found.pop(None, None)
    if unknown := [str(name) for name in found if name not in parameters]:
        warnings.warn(
            f"{directory}: {type(model).__name__} has no parameter for {listed(unknown)}; not loaded", stacklevel=4
        )

    tied = dict(model.tied) if model.config.tie_word_embeddings else {}
    for name, source in tied.items():
        if name in found and source in found and not torch.equal(found[name].float(), found[source].float()):
            warnings.warn(
                f"{directory}: {name} and {source} differ, so they are not tied although tie_word_embeddings is true",
                stacklevel=4,
            )
            untie(model, name)
            parameters[name] = model.get_parameter(name)
        elif name in found:  # one tensor under two names, or under the second one alone
            found.setdefault(source, found[name])

    missing = [name for name in parameters if name not in found and name not in tied]
    if absent := [name for name in missing if not name.startswith(initialise or "\0")]:
        raise ValueError(
            f"{directory}: parameters of {type(model).__name__} missing in the file (initialise= begins them anew): {listed(absent)}"
        )
    if missing:
        model.initialise(model)
    for name, parameter in parameters.items():
        if name in found:
            tensor = found[name]
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{directory}: {name}: expected shape {tuple(parameter.shape)} by config.json, got {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{directory}: {name}: expected a floating-point dtype, got {tensor.dtype}")
            parameter.copy_(tensor)


def untie(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(model.get_parameter(name))))


def listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# 3. Writing


def save(model: "PretrainedModel", directory: Path) -> None:
    """config.json and model.safetensors, in which a tied parameter stands once, as Hugging Face keeps it."""
    state = model.state_dict()
    for name, source in model.tied.items():
        if name in state and state[name].data_ptr() == state[source].data_ptr():
            del state[name]
    settings = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_together(
        {
            directory / "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            directory / "config.json": lambda path: path.write_text(
                json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            ),
        }
    )


def write_together(files: dict[Path, Callable[[Path], object]]) -> None:
    """Calls each function with a temporary name beside its path to write to; when all of them have, the files take their places.

    Where one fails no file is changed, nothing is left behind, and the OSError names the file.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            try:
                write(temporaries[path])
                with open(temporaries[path], "rb+") as file:
                    os.fsync(file.fileno())  # a full disk may say so only now
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"{path}: could not be written ({getattr(error, 'strerror', None) or error}); nothing was changed"
                ) from None
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
