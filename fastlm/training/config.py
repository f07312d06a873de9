"""Settings of a run in TOML files and in presets.

A file has the names of the settings and of the inputs as keys, with underscores:

    preset = "gpt2-124m"
    data = ["texts"]
    lr = 3e-4
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.core.errors import did_you_mean, mismatch
from fastlm.training.settings import Settings, check_one_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "config.toml"
INPUTS = {
    "data": list,
    "tokenizer": str,
    "field": str,
    "init": str,
    "val_fraction": float,
    "val_file": str,
    "cache": str,
}
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list of strings"}

# The GPT-2 models have the sizes of Radford et al., 2019, and the batch of half a million tokens, the rates and the
# warm-up of the models of these sizes of Brown et al., 2020, arXiv:2005.14165, as nanoGPT and llm.c train them.
GPT2: dict[str, Any] = {
    "context": 1024,
    "batch": 512,
    "micro_batch": 8,
    "steps": 600_000,
    "warmup": 700,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "eval_every": 1000,
    "checkpoint_every": 1000,
}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": GPT2 | {"layers": 12, "heads": 12, "width": 768, "lr": 6e-4, "min_lr": 6e-5},
    "gpt2-355m": GPT2 | {"layers": 24, "heads": 16, "width": 1024, "lr": 3e-4, "min_lr": 3e-5},
    "gpt2-774m": GPT2 | {"layers": 36, "heads": 20, "width": 1280, "lr": 2.5e-4, "min_lr": 2.5e-5, "micro_batch": 4},
    "gpt2-1558m": GPT2 | {"layers": 48, "heads": 25, "width": 1600, "lr": 2e-4, "min_lr": 2e-5, "micro_batch": 2},
    # Devlin et al., 2018, arXiv:1810.04805.
    "bert-base": {
        "objective": "masked-token",
        "layers": 12,
        "heads": 12,
        "width": 768,
        "context": 512,
        "dropout": 0.1,
        "batch": 256,
        "micro_batch": 16,
        "steps": 1_000_000,
        "schedule": "linear",
        "lr": 1e-4,
        "min_lr": 0.0,
        "warmup": 10_000,
        "beta2": 0.999,
        "weight_decay": 0.01,
        "eval_every": 1000,
        "checkpoint_every": 1000,
    },
    # Ben Allal et al., 2025, arXiv:2502.02737: a million tokens per step.
    "smollm2-135m": {
        "architecture": "llama",
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "width": 576,
        "mlp_width": 1536,
        "context": 2048,
        "batch": 512,
        "micro_batch": 4,
        "steps": 2_000_000,
        "schedule": "wsd",
        "decay_fraction": 0.1,
        "lr": 3e-3,
        "min_lr": 0.0,
        "warmup": 2000,
        "beta2": 0.95,
        "weight_decay": 0.01,
        "eval_every": 1000,
        "checkpoint_every": 1000,
    },
    # nanoGPT's recipe for a CPU.
    "shakespeare-char": {
        "tokenizer": "char",
        "layers": 4,
        "heads": 4,
        "width": 128,
        "context": 64,
        "batch": 12,
        "steps": 2000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup": 100,
        "beta2": 0.99,
        "dropout": 0.0,
    },
}


def resolve(
    preset: str | None, file: Path | None, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """The settings and the inputs of a run.

    Args:
        preset: one of PRESETS; None: that of the file, if it has one.
        file: in TOML; overrides the preset.
        given: settings and inputs of the command line; they override the file.
        defaults: of the inputs.

    Raises:
        ValueError, FileNotFoundError: the message names the argument or the key of the file.
    """
    content: dict[str, Any] = {} if file is None else read(file)
    named = content.pop("preset", None)
    preset = preset or named
    if preset is not None:
        check_one_of("preset", preset, tuple(PRESETS))
    values = (PRESETS[preset] if preset else {}) | content | dict(given)
    settings = {name: value for name, value in values.items() if name not in INPUTS}
    return Settings(**settings), {name: values.get(name, default) for name, default in defaults.items()}


def read(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as failure:
        raise FileNotFoundError(f"config: could not read {str(file)!r}: {failure.strerror}") from None
    except ValueError as failure:  # not TOML, or not UTF-8
        raise mismatch("config", f"TOML in {file}", failure) from None
    kinds: dict[str, Any] = (
        {field.name: kind_of(field) for field in dataclasses.fields(Settings)} | INPUTS | {"preset": str}
    )
    for name, value in content.items():
        if name not in kinds:
            raise mismatch("config", f"keys of settings in {file}", f"{name!r}{did_you_mean(name, kinds)}")
        kind = kinds[name]
        if name == "data" and isinstance(value, str):
            content[name] = [value]
        elif kind is float and type(value) is int:
            content[name] = float(value)
        elif type(value) is not kind or (kind is list and not all(isinstance(x, str) for x in value)):
            raise mismatch(name, f"{KINDS[kind]} in {file}", repr(value))
    return content


def kind_of(field: dataclasses.Field) -> type:
    """The type of a field, without None."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    assert isinstance(field.type, type)
    return field.type


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Settings and inputs; those that are None are left out."""
    lines = [f"{name} = {literal(value)}\n" for name, value in values.items() if value is not None]
    file.write_text("".join(lines), encoding="utf-8")


def literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML has JSON's escapes
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
