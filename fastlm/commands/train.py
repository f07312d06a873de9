"""fastlm train: trains a model on text; writes the model, summary.json and checkpoints to go on from."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm.commands.display import byte_bar, describe_device, progress_bar, quantity, say
from fastlm.commands.process import set_up
from fastlm.core.errors import did_you_mean, mismatch
from fastlm.generation import load_tokenizer
from fastlm.generation.tokenizer import load_tokenizer_file
from fastlm.models import load_model
from fastlm.models.base import PretrainedModel
from fastlm.training import checkpoint, data
from fastlm.training.checkpoints import Checkpoints, Saved, clear, locked_run, newest
from fastlm.training.data.shards import keep_only
from fastlm.training.loop import Result, train
from fastlm.training.models import build, load, objective_of
from fastlm.training.run import Run
from fastlm.training.settings import TOKENIZERS, Settings
from fastlm.training.tokenizers import end_of_text_id

DEFAULT_TOKENIZER = "byte"
TOKENS = "tokens"  # the directory in that of a run
FILE = "tokenizer.json"
MAX_NAMED = 5  # skipped files


@dataclasses.dataclass(frozen=True)
class Data:
    """The options about the text."""

    paths: list[Path]
    tokenizer: str
    field: str
    val_fraction: float
    val_file: Path | None
    cache: Path | None


def run(
    given: Data,
    settings: Settings,
    *,
    init: Path | None,
    out: Path,
    overwrite: bool,
    device: str,
    threads: int | None,
) -> None:
    chosen = set_up(device, threads)
    out = checkpoint.prepare(out, overwrite=overwrite)
    if init is not None and given.tokenizer != DEFAULT_TOKENIZER:
        raise mismatch("tokenizer", "no value with a model to start from, which has its own", repr(given.tokenizer))
    tokenizer, source = tokenizer_of(given.tokenizer) if init is None else tokenizer_in(init)
    loaded: PretrainedModel | None = None
    if isinstance(tokenizer, Tokenizer):  # what does not fit is an error before the text is tokenized
        loaded = None if init is None else load(init, settings, tokenizer)
        objective_of(settings, tokenizer)
    corpus = load_text(
        data.load,
        given.paths,
        tokenizer=tokenizer,
        end_of_text=end_of_text_of(tokenizer, source),
        val_fraction=given.val_fraction,
        val_file=given.val_file,
        masked=settings.objective == "masked-token",
        field=given.field,
        documents=settings.documents,
        context=settings.context,
        cache=given.cache or out / TOKENS,
    )
    if corpus.skipped:
        say(skipped_in_words(corpus.skipped))
    data.check_length(corpus, settings.context)
    inputs = {
        "data": [str(p) for p in given.paths],
        "tokenizer": None if init else given.tokenizer if source is None else str(source.absolute()),
        "init": None if init is None else str(init.absolute()),
        "val_fraction": None if given.val_file else given.val_fraction,
        "val_file": str(given.val_file) if given.val_file else None,
        "field": given.field,
        "cache": None if given.cache is None else str(given.cache.absolute()),
    }
    model = (loaded or build(settings, corpus.tokenizer, end_of_text=corpus.end_of_text)).to(chosen)
    with locked_run(out):
        clear(out)  # the checkpoints of an earlier run
        if given.cache is None and corpus.folder is not None:
            keep_only(out / TOKENS, corpus.folder)
        started = Run.of(settings, inputs, corpus, chosen)
        started.write(out)
        train_and_save(out, started, corpus, model, source=source)


def resume(out: Path, *, device: str | None, threads: int | None) -> None:
    """Goes on with the run in a directory. device, threads: None: those that it was started with."""
    checkpoint.check_processes()
    started = Run.read(out)
    checkpoint.check_writable("resume", out)
    if (now := checkpoint.versions()) != started.versions:
        say(f"started with {listed(started.versions)}; with {listed(now)}, results may differ by rounding")
    chosen = set_up(device or started.device, threads or started.threads)
    with locked_run(out):
        saved, damages = newest(out)
        for damage in damages:
            say(f"skipped a damaged checkpoint: {damage}")
        init, name = started.inputs["init"], started.inputs["tokenizer"]
        if name in TOKENIZERS:
            tokenizer, source = tokenizer_of(name)
        else:  # a checkpoint has it too
            tokenizer, source = tokenizer_of(init or name) if saved is None else tokenizer_in(saved.folder)
        corpus = load_text(started.corpus, tokenizer, end_of_text=end_of_text_of(tokenizer, source), cache=out / TOKENS)
        model: PretrainedModel
        if saved is None and init is None:
            model = build(started.settings, corpus.tokenizer, end_of_text=corpus.end_of_text)
        elif saved is None:
            model = load(Path(init), started.settings, corpus.tokenizer)
        else:
            model = load_model(saved.folder, dtype=torch.float32)
            model.recompute = started.settings.recompute
        say(f"resumed after {quantity(saved.step if saved else 0, 'step')} of {started.settings.steps:,}")
        train_and_save(out, started, corpus, model.to(chosen), source=source, start=saved)


def load_text(load: Callable[..., data.Corpus], *arguments: Any, **options: Any) -> data.Corpus:
    """Calls data.load, or another function with its options, with a progress bar."""
    with byte_bar() as progress:
        corpus = load(*arguments, progress=progress, **options)
    for damage in corpus.damages:
        say(f"tokenized again: {damage}")
    return corpus


def tokenizer_of(name: str) -> tuple[str | Tokenizer, Path | None]:
    """A tokenizer by its name or path, and the directory or file that it comes from."""
    if name in TOKENIZERS:
        return name, None
    path = Path(name)
    if path.is_dir():
        return tokenizer_in(path)
    if path.is_file():
        return (tokenizer_in(path.parent)[0], path.parent) if path.name == FILE else (load_tokenizer_file(path), path)
    expected = f"{', '.join(TOKENIZERS)}, a {FILE} or a directory with one"
    raise mismatch("tokenizer", expected, f"{name!r}{did_you_mean(name, TOKENIZERS)}")


def tokenizer_in(directory: Path) -> tuple[Tokenizer, Path]:
    return load_tokenizer(directory).tokenizer, directory


def end_of_text_of(tokenizer: str | Tokenizer, source: Path | None) -> int | None:
    return end_of_text_id(tokenizer, settings_of(source)) if isinstance(tokenizer, Tokenizer) else None


def settings_of(source: Path | None) -> str | None:
    """The contents of the tokenizer_config.json of a tokenizer."""
    return checkpoint.read_tokenizer_settings(source) if source is not None and source.is_dir() else None


def train_and_save(
    out: Path,
    run: Run,
    corpus: data.Corpus,
    model: PretrainedModel,
    *,
    source: Path | None,
    start: Saved | None = None,
) -> None:
    """Trains, and writes the model and summary.json.

    Args:
        source: the directory or file that the tokenizer comes from, whose settings are kept; None: byte or char.
        start: the checkpoint that the model comes from.
    """
    settings = run.settings
    tokens = f"{len(corpus.train):,} tokens for training, {len(corpus.validation):,} for validation"
    say(f"{tokens}, vocabulary of {corpus.tokenizer.get_vocab_size()}")
    say(f"{model.num_parameters():,} parameters, {settings.dtype}, {describe_device(model.device)}")
    tokenizer_settings = settings_of(source)
    with (
        Checkpoints(
            out, keep=settings.keep, tokenizer=corpus.tokenizer, tokenizer_settings=tokenizer_settings
        ) as checkpoints,
        progress_bar(settings.steps) as report,
    ):
        result = train(settings, corpus, model, report=report, checkpoints=checkpoints, start=start)
    if not result.steps:
        raise KeyboardInterrupt  # no step was completed, so there is nothing to save
    settings_used = {**run.inputs, **dataclasses.asdict(settings)}
    settings_used |= {"device": str(model.device), "threads": torch.get_num_threads()}
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer, tokenizer_settings)
        checkpoint.write_json(folder / "summary.json", summary(settings_used, result, run, corpus))
    ended = "interrupted after" if result.interrupted else "trained for"
    say(f"{ended} {quantity(result.steps, 'step')} at {result.tokens_per_second:,.0f} tokens/s; saved to {out}")
    if result.interrupted:
        say(f"to go on: fastlm train --resume {shlex.quote(str(out))}")
    say(f"val loss {result.val_loss:.4f}")
    if result.failure is not None:
        raise result.failure


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def skipped_in_words(files: Sequence[Path]) -> str:
    names = ", ".join(map(str, files[:MAX_NAMED]))
    rest = f" and {len(files) - MAX_NAMED:,} more" if len(files) > MAX_NAMED else ""
    return f"skipped {quantity(len(files), 'file')}, hidden or binary: {names}{rest}"


def summary(settings: dict[str, Any], result: Result, run: Run, corpus: data.Corpus) -> dict[str, Any]:
    return {
        "settings": settings,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "tokens_per_second": result.tokens_per_second,
        "steps": result.steps,
        "interrupted": result.interrupted,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "tokens": {"training": len(corpus.train), "validation": len(corpus.validation)},
        "skipped": run.skipped,
        "evaluations": [{"step": step, "train_loss": a, "val_loss": b} for step, a, b in result.evaluations],
        "versions": checkpoint.versions(),
    }
