"""fastlm encode: writes the embeddings of texts, and continues where an interrupted run ended."""

import hashlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fastlm
from fastlm.backends import isa
from fastlm.commands import partial, texts
from fastlm.commands.display import console, describe_device, quantity, say
from fastlm.commands.process import needs_transformers, set_up
from fastlm.training import settings

DTYPES = ("auto", *settings.DTYPES)
SAVE_EVERY = 1.0  # seconds: what a killed process loses
MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")


def run(
    files: Sequence[Path],
    *,
    directory: Path,
    out: Path,
    field: str,
    pooling: str | None,
    normalize: bool | None,
    prompt: str | None,
    prompt_name: str | None,
    max_length: int | None,
    max_tokens_per_batch: int,
    dtype: str,
    overwrite: bool,
    device: str,
    threads: int | None,
) -> None:
    chosen = set_up(device, threads)
    parameters = dtype_of(dtype)
    partial.check(out, overwrite=overwrite)
    read = texts.read(files, field)
    with needs_transformers():
        from fastlm.integrations.encoding import embed, forward
    budget = forward.check_budget(max_tokens_per_batch)
    described = embed.embedder(
        directory,
        pooling=pooling,
        normalize=normalize,
        prompt=prompt,
        prompt_name=prompt_name,
        max_length=max_length,
        dtype=parameters,
        device=chosen,
    )
    key = {
        "model": f"{directory} (SHA-256 {digest_of_model(directory)})",
        "texts": f"{', '.join(map(str, files))} ({len(read.texts):,}, SHA-256 {digest(read.texts)})",
        "pooling": "+".join(described.modes),
        "normalize": described.normalize,
        "prompt": repr(described.prompt),
        "max_length": described.max_length,
        "max_tokens_per_batch": budget,
        "dtype": str(described.model.dtype),
        "device": chosen.type,
        "software": f"fastlm {fastlm.__version__} ({isa.name}), PyTorch {torch.__version__}",
    }
    total = len(read.texts)
    say(f"{quantity(total, 'text')}, {described.model.num_parameters():,} parameters, {describe_device(chosen)}")
    try:
        tokenizing = described.tokenizing(read.texts)
        with partial.opened(out, key, (total, described.width()), overwrite=overwrite) as results:
            if results.texts:
                say(f"continues after {quantity(results.texts, 'text')} of an interrupted run")
            compute(described.run(tokenizing, budget, results.batches), results, total)
            results.finish(out)
    except ValueError as error:
        raise ValueError(re.sub(r"^texts\[(\d+)\]", lambda m: read.place(int(m[1])), str(error))) from None
    if tokenizing.truncated:
        print(tokenizing.truncated_in_words("text"), file=sys.stderr)
    say(f"{total:,} × {results.rows.shape[1]:,} embeddings saved to {out}")


def compute(batches: Any, results: partial.Partial, total: int) -> None:
    columns = (
        TextColumn("encoding"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("texts"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    saved = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=results.texts)
        try:
            for indices, embeddings in batches:
                results.add(indices, embeddings)
                progress.update(task, completed=results.texts)
                if time.monotonic() > saved + SAVE_EVERY:
                    results.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            progress.stop()
            if not results.batches:
                raise
            results.save()
            done = f"interrupted after {results.texts:,} of {quantity(total, 'text')}, which were saved"
            print(f"{done}; the same command continues", file=sys.stderr)
            raise typer.Exit(130) from None


def dtype_of(name: str) -> torch.dtype | None:
    """None: as stored."""
    name = settings.check_dtype("dtype", name, DTYPES)
    return None if name == "auto" else getattr(torch, name)


def digest(strings: Sequence[str]) -> str:
    found = hashlib.sha256()
    for text in strings:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def digest_of_model(directory: Path) -> str:
    """Of the contents of settings, tokenizer and weights."""
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        if file.suffix in MODEL_FILES and file.is_file():
            found.update(str(file.relative_to(directory)).encode())
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    found.update(block)
    return found.hexdigest()[:16]
