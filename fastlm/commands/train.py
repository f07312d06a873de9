"""fastlm train: trains a model on text; writes a checkpoint and summary.json."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

import fastlm
from fastlm.commands.display import describe_device, progress_bar, quantity, say
from fastlm.commands.process import set_up
from fastlm.generation import load_tokenizer
from fastlm.training import checkpoint, data
from fastlm.training.loop import Result, train
from fastlm.training.models import build, load
from fastlm.training.settings import Settings

MAX_NAMED = 5  # skipped files


def run(
    paths: list[Path],
    settings: Settings,
    *,
    tokenizer: str,
    init: Path | None,
    val_fraction: float,
    val_file: Path | None,
    out: Path,
    overwrite: bool,
    device: str,
    threads: int | None,
) -> None:
    chosen = set_up(device, threads)
    out = checkpoint.prepare(out, overwrite=overwrite)
    corpus = data.load(
        paths,
        tokenizer=tokenizer if init is None else load_tokenizer(init).tokenizer,
        val_fraction=val_fraction,
        val_file=val_file,
        masked=settings.objective == "masked-token",
    )
    if corpus.skipped:
        say(skipped_in_words(corpus.skipped))
    data.check_length(corpus, settings.context)
    model = build(settings, corpus.tokenizer) if init is None else load(init, settings, corpus.tokenizer)
    model.to(chosen)
    tokens = f"{len(corpus.train):,} tokens for training, {len(corpus.validation):,} for validation"
    say(f"{tokens}, vocabulary of {corpus.tokenizer.get_vocab_size()}")
    say(f"{model.num_parameters():,} parameters, {settings.dtype}, {describe_device(model.device)}")
    with progress_bar(settings.steps) as report:
        result = train(settings, corpus, model, report=report)
    if not result.steps:
        raise KeyboardInterrupt  # no step was completed, so there is nothing to save
    inputs = {
        "data": [str(p) for p in paths],
        "tokenizer": tokenizer if init is None else None,
        "init": None if init is None else str(init),
        "val_fraction": None if val_file else val_fraction,
    }
    settings_used = {**inputs, "val_file": str(val_file) if val_file else None, **dataclasses.asdict(settings)}
    settings_used |= {"device": str(model.device), "threads": torch.get_num_threads()}
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer, init)
        checkpoint.write_json(folder / "summary.json", summary(settings_used, result, corpus))
    ended = "interrupted after" if result.interrupted else "trained for"
    say(f"{ended} {quantity(result.steps, 'step')} at {result.tokens_per_second:,.0f} tokens/s; saved to {out}")
    say(f"val loss {result.val_loss:.4f}")
    if result.interrupted:
        raise typer.Exit(130)


def skipped_in_words(files: Sequence[Path]) -> str:
    names = ", ".join(map(str, files[:MAX_NAMED]))
    rest = f" and {len(files) - MAX_NAMED:,} more" if len(files) > MAX_NAMED else ""
    return f"skipped {quantity(len(files), 'file')}, hidden or binary: {names}{rest}"


def summary(settings: dict[str, Any], result: Result, corpus: data.Corpus) -> dict[str, Any]:
    return {
        "settings": settings,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "tokens_per_second": result.tokens_per_second,
        "steps": result.steps,
        "interrupted": result.interrupted,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "tokens": {"training": len(corpus.train), "validation": len(corpus.validation)},
        "skipped": [str(file) for file in corpus.skipped],
        "evaluations": [{"step": step, "train_loss": a, "val_loss": b} for step, a, b in result.evaluations],
        "versions": {"fastlm": fastlm.__version__, "torch": torch.__version__},
    }
