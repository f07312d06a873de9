"""Checkpoint files: safetensors, whole or sharded, and PyTorch's .bin.

Reading accepts the variants that older versions of transformers wrote. Writing replaces all files at once.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlm.core.locks import locked
from fastlm.models.config import COMMITTED, CONFIG, read_json, stored

# In order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Buffers with constants that older versions of transformers saved with the parameters.
IGNORED_KEYS = re.compile(r"(^|\.)(embeddings\.position_ids|attn\.bias|attn\.masked_bias)$")
# What torch.load says of an object that is neither a tensor nor a part of one.
REFUSED_GLOBAL = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
# The dtypes that the operators compute with. Weights in 8 bits need scales, which no supported format has.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_LISTED = 10  # parameter names in one message
PARTIAL = ".partial-"  # the name of a staging directory begins with it

# 1. Reading


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors in a directory, by stored name. Safetensors files are memory-mapped and read on first use."""
    for name in WEIGHT_FILES:
        if stored(directory, name).is_file():
            break
    else:
        raise FileNotFoundError(f"{directory}: expected a directory with one of {', '.join(WEIGHT_FILES)}")
    if not name.endswith(".index.json"):
        return read_file(stored(directory, name))
    shards = read_json(stored(directory, name)).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    ):
        raise ValueError(f"{directory / name}: expected a weight_map from parameters to files in the same directory")
    tensors = {}
    for shard in sorted(set(shards.values())):
        tensors.update(read_file(stored(directory, shard)))
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, although the index in its directory lists it")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many types of error
        if refused := REFUSED_GLOBAL.search(str(error)):
            expected = "tensors by name and nothing else, as code in a checkpoint is never run"
            raise ValueError(f"{path}: expected {expected}, got the Python object {refused[1]}") from None
        # PyTorch's text about pickles is advice to load them without the check.
        words = str(error).partition("\n")[0] if not isinstance(error, pickle.UnpicklingError) else "invalid pickle"
        reason = " ".join(words.split()) or type(error).__name__
        raise ValueError(f"{path}: truncated or not a checkpoint ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: expected a state dict (tensors by name)")
    return tensors


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of DTYPES that can represent all tensors of such a dtype; None if there is none."""
    dtype = None
    for tensor in tensors:
        if tensor.dtype in DTYPES:
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


def select(
    model: nn.Module,
    stored: dict[str, Tensor],
    *,
    prefix: str,
    tied: Mapping[str, str],
    may_be_missing: tuple[str, ...],
    directory: Path,
) -> dict[str, Tensor]:
    """The stored tensor of each parameter, with all checks. The model may be on the meta device.

    Args:
        prefix: of parameter names, which stored keys may have or lack.
        tied: parameter → the parameter that it is tied to. Tensors that differ in the file cause a warning.
        may_be_missing: prefixes of parameters that the file may lack.
        directory: named in messages.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {parameter_name(key, set(parameters), prefix): tensor for key, tensor in stored.items()}
    if unknown := [name for name in named if name is not None and name not in parameters]:
        warnings.warn(
            f"{directory}: not loaded, as {type(model).__name__} has no such parameter: {summary(unknown)}",
            stacklevel=3,
        )
    found = {name: tensor for name, tensor in named.items() if name is not None and name in parameters}
    for name, source in tied.items():
        if name in found:  # the file may have only one of the two names
            found.setdefault(source, found[name])
    if required := [
        name
        for name in parameters
        if name not in found and name not in tied and not name.startswith(may_be_missing or "\0")
    ]:
        raise ValueError(
            f"{directory}: parameters of {type(model).__name__} are missing in the file "
            f"(initialise=(prefix, …) initialises them at random): {summary(required)}"
        )
    for name, tensor in found.items():
        if tensor.shape != parameters[name].shape:
            expected = f"shape {tuple(parameters[name].shape)}, as in config.json"
            raise ValueError(f"{directory}: {name}: expected {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            got = f"{tensor.dtype}{'' if tensor.layout == torch.strided else f' of layout {tensor.layout}'}"
            raise ValueError(f"{directory}: {name}: expected a dense tensor of dtype {names}, got {got}")
    for name in different_ties(found, tied):
        warnings.warn(
            f"{directory}: {name} and {tied[name]} differ in the file; they are not tied, although "
            "tie_word_embeddings is true",
            stacklevel=3,
        )
    return found


def different_ties(found: Mapping[str, Tensor], tied: Mapping[str, str]) -> list[str]:
    return [
        name
        for name, source in tied.items()
        if name in found and not torch.equal(found[name].float(), found[source].float())
    ]


@torch.no_grad()
def load_parameters(
    model: nn.Module,
    found: Mapping[str, Tensor],
    *,
    tied: Mapping[str, str],
    initialise: Callable[[nn.Module], None],
) -> None:
    """Copies the result of `select` into the model's parameters. Missing ones are initialised by initialise(model).

    Parameters whose tensors differ in the file are untied.
    """
    for name in different_ties(found, tied):
        untie(model, name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(name not in found and name not in tied for name in parameters):
        initialise(model)
    for name, tensor in found.items():
        parameters[name].copy_(tensor)


def untie(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(model.get_parameter(name))))


def summary(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


# 3. Writing


def write(state: dict[str, Tensor], settings: dict[str, Any], *, tied: Mapping[str, str], folder: Path) -> None:
    """Writes config.json and model.safetensors. As in Hugging Face's files, a tied parameter is stored once."""
    for name, source in tied.items():
        if name in state and state[name].data_ptr() == state[source].data_ptr():
            del state[name]
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with writing(folder / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with writing(folder / CONFIG) as path:
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields the path of a file in a staging directory; errors name the file that it will replace."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        place = path.parent.parent / path.name if path.parent.name.startswith(PARTIAL) else path
        raise OSError(f"{place}: could not be written ({reason}); no file was changed") from None


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields a new directory for the files of a checkpoint. On exit they replace those of `directory`, all together.

    One rename commits them. A process that is killed before it leaves the previous checkpoint; after it, readers find
    the new one, of which `stored` reads the files that have not been moved yet. Other readers find no config.json in
    between. The next call removes what a killed process left.

    If an exception is raised, `directory` is as before.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / f"{PARTIAL}{uuid.uuid4().hex}"
    try:
        with contextlib.ExitStack() as open_locks:
            with locked(directory, wait=True):
                recover(directory)
                folder.mkdir()
                open_locks.enter_context(locked(folder, wait=True))
            yield folder
            for file in folder.iterdir():
                with writing(file), open(file, "rb+") as opened:
                    if (directory / file.name).is_dir():
                        raise IsADirectoryError("it is a directory")
                    os.fsync(opened.fileno())  # a full disk may be reported only here
            with locked(directory, wait=True):
                recover(directory)  # of another process that was killed meanwhile
                os.rename(folder, directory / COMMITTED)
                publish(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # it has files: the save has succeeded, or that of another process
                directory.rmdir()


def is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote to a staging directory has ended."""
    try:
        with locked(folder, wait=False) as held:
            return held is True
    except OSError:
        return False


def recover(directory: Path) -> None:
    """Completes a commit and deletes incomplete files of killed processes. The caller holds the directory's lock."""
    if (directory / COMMITTED).is_dir():
        publish(directory)
    for folder in directory.glob(f"{PARTIAL}*"):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def publish(directory: Path) -> None:
    """Moves committed files to their places: config.json last, and none is there while the others are moved."""
    committed = directory / COMMITTED
    names = sorted(os.listdir(committed), key=lambda name: (name == CONFIG, name))
    if CONFIG in names and not is_same(committed / CONFIG, directory / CONFIG):
        (directory / CONFIG).unlink(missing_ok=True)
    for name in names:
        os.replace(committed / name, directory / name)
    committed.rmdir()


def is_same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()
