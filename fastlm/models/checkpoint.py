"""Checkpoint files: safetensors, whole or sharded, and PyTorch's .bin.

Reading accepts the variants that older versions of transformers wrote. Writing replaces files atomically.
"""

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlm.core.errors import FLOATING
from fastlm.models.config import read_json

# In order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Buffers with constants that older versions of transformers saved with the parameters.
IGNORED_KEYS = re.compile(r"(^|\.)(embeddings\.position_ids|attn\.bias|attn\.masked_bias)$")
MAX_LISTED = 10  # parameter names in one message

# 1. Reading


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors in a directory, by stored name. Safetensors files are memory-mapped and read on first use."""
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            break
    else:
        raise FileNotFoundError(f"{directory}: expected a directory with one of {', '.join(WEIGHT_FILES)}")
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
        raise FileNotFoundError(f"{path}: no such file, although the index in its directory lists it")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # PyTorch's message recommends to load the file without this restriction, which would run code from it.
        raise ValueError(
            f"{path}: expected tensors only, got other Python objects or a damaged file; nothing of it was loaded"
        ) from None
    except Exception as error:  # damaged files raise many types of error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: truncated or not a checkpoint ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: expected a state dict (tensors by name)")
    return tensors


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The floating-point dtype that can represent all tensors; None if no tensor is floating point."""
    dtype = None
    for tensor in tensors:
        if tensor.dtype in FLOATING:
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


# 2. From stored tensors to a model's parameters


def parameter_name(key: str, known: set[str], prefix: str) -> str | None:
    """The parameter for a stored key; None for a constant; the key itself if the model has no such parameter."""
    if IGNORED_KEYS.search(key):
        return None
    key_now = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))  # TensorFlow's LayerNorm names
    candidates = (key_now, f"{prefix}.{key_now}", key_now.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in known), key)


@torch.no_grad()
def load_parameters(
    model: nn.Module,
    stored: dict[str, Tensor],
    *,
    prefix: str,
    tied: Mapping[str, str],
    may_be_missing: tuple[str, ...],
    initialise: Callable[[nn.Module], None],
    directory: Path,
) -> None:
    """Copies stored tensors into the model's parameters.

    Args:
        prefix: of parameter names, which stored keys may have or lack.
        tied: parameter → the parameter that it is tied to. Tensors that differ in the file are untied, with a warning.
        may_be_missing: prefixes of parameters that are initialised by initialise(model) if the file lacks them.
        directory: named in messages.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {parameter_name(key, set(parameters), prefix): tensor for key, tensor in stored.items()}
    found.pop(None, None)
    if unknown := [str(name) for name in found if name not in parameters]:
        warnings.warn(
            f"{directory}: not loaded, as {type(model).__name__} has no such parameter: {summary(unknown)}",
            stacklevel=4,
        )

    for name, source in tied.items():
        if name in found and source in found and not torch.equal(found[name].float(), found[source].float()):
            warnings.warn(
                f"{directory}: {name} and {source} differ in the file; they are not tied, although "
                "tie_word_embeddings is true",
                stacklevel=4,
            )
            untie(model, name)
            parameters[name] = model.get_parameter(name)
        elif name in found:  # the file may have only one of the two names
            found.setdefault(source, found[name])

    missing = [name for name in parameters if name not in found and name not in tied]
    if required := [name for name in missing if not name.startswith(may_be_missing or "\0")]:
        raise ValueError(
            f"{directory}: parameters of {type(model).__name__} are missing in the file "
            f"(initialise=(prefix, …) initialises them at random): {summary(required)}"
        )
    if missing:
        initialise(model)
    for name, parameter in parameters.items():
        if name in found:
            tensor = found[name]
            if tensor.shape != parameter.shape:
                expected, got = tuple(parameter.shape), tuple(tensor.shape)
                raise ValueError(f"{directory}: {name}: expected shape {expected}, as in config.json, got {got}")
            if tensor.dtype not in FLOATING:
                dtypes = ", ".join(map(str, FLOATING))
                raise ValueError(f"{directory}: {name}: expected one of {dtypes}, got {tensor.dtype}")
            parameter.copy_(tensor)


def untie(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(model.get_parameter(name))))


def summary(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


# 3. Writing


def save(state: dict[str, Tensor], settings: dict[str, Any], *, tied: Mapping[str, str], directory: Path) -> None:
    """Writes config.json and model.safetensors. As in Hugging Face's files, a tied parameter is stored once."""
    for name, source in tied.items():
        if name in state and state[name].data_ptr() == state[source].data_ptr():
            del state[name]
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_atomically(
        {
            directory / "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            directory / "config.json": lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def write_atomically(files: dict[Path, Callable[[Path], object]]) -> None:
    """Calls each function with a temporary path to write to, then moves all temporary files to their final paths.

    If one function fails, no file has changed, no temporary file remains, and the OSError names the file.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            try:
                write(temporaries[path])
                with open(temporaries[path], "rb+") as file:
                    os.fsync(file.fileno())  # a full disk may be reported only here
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                raise OSError(f"{path}: could not be written ({reason}); no file was changed") from None
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
