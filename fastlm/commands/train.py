"""fastlm train: trains a model on text; writes the model, summary.json and checkpoints to go on from."""

import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fastlm import generation
from fastlm.benchmarking.machine import peak
from fastlm.commands.corpus import end_of_text_of, load_text, settings_of, tokenizer_in, tokenizer_of
from fastlm.commands.display import describe_device, has_room, progress_bar, quantity, say
from fastlm.commands.dry_run import show_estimate
from fastlm.commands.process import set_up_several
from fastlm.core import interrupts
from fastlm.core.errors import mismatch
from fastlm.models import load_model
from fastlm.models.config import CONFIG, stored
from fastlm.models.layers import RECOMPUTE
from fastlm.training import checkpoint, data, metrics
from fastlm.training.checkpoints import Checkpoints, Saved, check_unchanged, clear, locked_run, newest, sha256
from fastlm.training.data.shards import keep_only
from fastlm.training.distributed import Group, is_several, process_count, restarts
from fastlm.training.flops import flops_of_step
from fastlm.training.loop import Result, train
from fastlm.training.models import build, load, objective_of, set_recompute
from fastlm.training.parallel import check_parallel
from fastlm.training.report import Report, Reports
from fastlm.training.run import Run
from fastlm.training.settings import TOKENIZERS, WHOLE_LAYERS, Settings

DEFAULT_TOKENIZER = "byte"
TOKENS = "tokens"  # the directory in that of a run
ADAPTER = "adapter"  # the directory in that of a run with the adapters in PEFT's format
MAX_NAMED = 5  # skipped files
SAMPLE_TOKENS = 100


def run(
    settings: Settings,
    sources: dict[str, Any],
    *,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    device: str,
    threads: int | None,
) -> None:
    """sources: the inputs that are no settings, as fastlm.training.config.resolve returns them."""
    if restarts() and Run.is_of(out, settings, sources["data"]):
        resume(out, device=device, threads=threads)
        return
    with set_up_several(device, threads) as (group, chosen), contextlib.ExitStack() as stack:
        with group.first():
            check_parallel(group, batch=settings.batch)
            if dry_run and group.size > 1:
                raise mismatch("dry_run", "one process", group.size)
            prepared = prepare(settings, sources, out, overwrite, dry_run, group, chosen)
            if prepared is None:
                return
            started, corpus, model, source = prepared
            if group.rank == 0:
                stack.enter_context(locked_run(out))
        if group.rank == 0:
            clear(out)  # the checkpoints of an earlier run
            metrics.clear(out)
            if started.inputs["cache"] is None and corpus.folder is not None:
                keep_only(out / TOKENS, corpus.folder)
            started.write(out)
        with how_to_go_on(out):
            train_and_save(out, started, corpus, model, chosen, source=source, group=group)


def prepare(
    settings: Settings,
    sources: dict[str, Any],
    out: Path,
    overwrite: bool,
    dry_run: bool,
    group: Group,
    chosen: torch.device,
) -> tuple[Run, data.Corpus, Any, Path | None] | None:
    """Everything before training: checks, text and model, and where the tokenizer comes from; None for a dry run."""
    named, val_fraction = sources["tokenizer"], sources["val_fraction"]
    paths = [Path(path) for path in sources["data"]]
    init, val_file, cache = (
        None if sources[name] is None else Path(sources[name]) for name in ("init", "val_file", "cache")
    )
    if settings.lora and settings.recompute not in (RECOMPUTE, WHOLE_LAYERS):
        raise mismatch("recompute", f"{RECOMPUTE} or {WHOLE_LAYERS} with lora", settings.recompute)
    if not dry_run:  # nothing is written
        out = checkpoint.prepare(out, overwrite=overwrite, can_resume=True)
    if settings.tensorboard:
        metrics.summary_writer()  # raises if it is not installed
    if init is not None and named != DEFAULT_TOKENIZER:
        raise mismatch("tokenizer", "no value with a model to start from, which has its own", repr(named))
    tokenizer, source = tokenizer_of(named) if init is None else tokenizer_in(init)
    loaded = None
    if isinstance(tokenizer, Tokenizer):  # what does not fit is an error before the text is tokenized
        loaded = None if init is None else load(init, settings, tokenizer)
        objective_of(settings, tokenizer)
        prompt_of(settings, tokenizer)
    with contextlib.ExitStack() as stack:
        tokens = Path(stack.enter_context(tempfile.TemporaryDirectory())) if dry_run else out / TOKENS
        corpus = load_text(
            data.load,
            paths,
            tokenizer=tokenizer,
            end_of_text=end_of_text_of(tokenizer, source),
            val_fraction=val_fraction,
            val_file=val_file,
            masked=settings.objective == "masked-token",
            field=sources["field"],
            documents=settings.documents,
            context=settings.context,
            cache=cache or tokens,
        )
        if corpus.skipped:
            say(skipped_in_words(corpus.skipped))
        data.check_length(corpus, settings.context)
        prompt_of(settings, corpus.tokenizer)
        if dry_run:
            given = new_model(settings, corpus, init, loaded) if init is not None or settings.lora else None
            loaded = None  # with lora `given` has weights of its own
            show_estimate(settings, corpus, given, chosen, out)
            return None
    inputs = {
        "data": [str(p) for p in paths],
        "tokenizer": None if init else named if source is None else str(source.absolute()),
        "field": sources["field"],
        "init": None if init is None else str(init.absolute()),
        "val_fraction": None if val_file else val_fraction,
        "val_file": str(val_file) if val_file else None,
        "cache": None if cache is None else str(cache.absolute()),
        "init_sha256": weights_of(init) if init is not None and settings.lora else {},
    }
    started = Run.of(settings, inputs, corpus, chosen, group.size)
    return started, corpus, new_model(settings, corpus, init, loaded), source


def resume(out: Path, *, device: str | None, threads: int | None, parallel: str | None = None) -> None:
    """Goes on with the run in a directory. device, threads, parallel: None: those that it was started with."""
    started = Run.read(out)
    checkpoint.check_writable("resume", out)
    if parallel is not None:
        started = dataclasses.replace(started, settings=dataclasses.replace(started.settings, parallel=parallel))
    settings, same = started.settings, started.processes == process_count()
    device = device or (started.device.partition(":")[0] if is_several() else started.device)
    if threads is None and same:
        threads = started.threads
    with set_up_several(device, threads) as (group, chosen), contextlib.ExitStack() as stack:
        if (now := checkpoint.versions()) != started.versions:
            say(f"started with {listed(started.versions)}; with {listed(now)}, results may differ by rounding")
        saved: Saved | None = None
        damages: list[str] = []
        with group.first():
            check_parallel(group, batch=settings.batch)
            if group.rank == 0:
                stack.enter_context(locked_run(out))
                saved, damages = newest(out)
        for damage in damages:
            say(f"skipped a damaged checkpoint: {damage}")
        saved = group.sent(saved)
        init, named = started.inputs["init"], started.inputs["tokenizer"]
        if named in TOKENIZERS:
            tokenizer, source = tokenizer_of(named)
        else:  # a checkpoint has it too
            tokenizer, source = tokenizer_of(init or named) if saved is None else tokenizer_in(saved.folder)
        with group.first():
            corpus = load_text(
                started.corpus, tokenizer, end_of_text=end_of_text_of(tokenizer, source), cache=out / TOKENS
            )
        if saved is None or settings.lora:
            if settings.lora:
                check_unchanged("init", started.inputs["init_sha256"])
            model = new_model(settings, corpus, None if init is None else Path(init))
            if saved is not None:
                model.load_training_state(saved.tensors())
        else:
            model = load_model(saved.folder, dtype=torch.float32)
            set_recompute(model, settings.recompute)
        say(f"resumed after {quantity(saved.step if saved else 0, 'step')} of {settings.steps:,}")
        with how_to_go_on(out):
            train_and_save(out, started, corpus, model, chosen, source=source, group=group, start=saved)


@contextlib.contextmanager
def how_to_go_on(out: Path) -> Iterator[None]:
    """After Ctrl-C: prints the command that goes on from the last checkpoint, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.saved_in(out):
            say_how_to_go_on(out)
        raise


def say_how_to_go_on(out: Path) -> None:
    say(f"to go on: fastlm train --resume {shlex.quote(str(out))}")


def new_model(settings: Settings, corpus: data.Corpus, init: Path | None, loaded: Any = None) -> Any:
    """A PretrainedModel, or a LoraModel. loaded: the model in `init`, if it was read."""
    if init is None:
        if settings.lora:
            raise mismatch("lora", "0 without --init, the model that adapters are added to", settings.lora)
        return build(settings, corpus.tokenizer, end_of_text=corpus.end_of_text)
    model = load(init, settings, corpus.tokenizer) if loaded is None else loaded
    if not settings.lora:
        return model
    del model, loaded  # it was checked
    with needs_peft():
        import transformers

        from fastlm.integrations.lora import LoraModel
    transformers.utils.logging.disable_progress_bar()  # for the few seconds of loading
    alpha = 2 * settings.lora if settings.lora_alpha is None else settings.lora_alpha
    model = LoraModel(init, rank=settings.lora, alpha=alpha, dropout=settings.dropout, seed=settings.seed)
    if settings.recompute == WHOLE_LAYERS:
        model.gradient_checkpointing_enable()
    return model


@contextlib.contextmanager
def needs_peft() -> Iterator[None]:
    """Around imports: the error of an installation without PEFT or transformers."""
    try:
        yield
    except ImportError:
        raise mismatch("lora", "an installation with PEFT (pip install peft)", "one without") from None


def weights_of(directory: Path) -> dict[str, str]:
    """The SHA-256 of the files of a model by their paths."""
    directory = stored(directory, CONFIG).parent
    files = [file for end in (CONFIG, "*.safetensors", "*.bin") for file in sorted(directory.glob(end))]
    return {str(file.absolute()): sha256(file) for file in files}


def train_and_save(
    out: Path,
    run: Run,
    corpus: data.Corpus,
    model: Any,
    device: torch.device,
    *,
    source: Path | None,
    group: Group,
    start: Saved | None = None,
) -> None:
    """Trains; the first process writes the model and summary.json.

    Args:
        source: the directory or file that the tokenizer comes from, whose settings are kept; None: byte or char.
        start: the checkpoint that the model comes from.
    """
    settings = run.settings
    sharded = group.size > 1 and settings.parallel == "fsdp"
    if not sharded:  # a model that is sharded may not fit on a device before
        model = model.to(device)
    tokens = f"{len(corpus.train):,} tokens for training, {len(corpus.validation):,} for validation"
    say(f"{tokens}, vocabulary of {corpus.tokenizer.get_vocab_size()}")
    parameters = model.num_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = f" ({trainable:,} of them in adapters, which are trained)" if settings.lora else ""
    say(f"{parameters:,} parameters{adapters}, {settings.dtype}, {describe_devices(device, group, settings)}")
    tokenizer_settings = settings_of(source)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if group.rank == 0 or sharded:
            options: dict[str, Any] = {"tokenizer_settings": tokenizer_settings, "group": group if sharded else None}
            checkpoints = stack.enter_context(
                Checkpoints(out, keep=settings.keep, tokenizer=corpus.tokenizer, **options)
            )
        reports: list[Report] = []
        if group.rank == 0:
            size = start.report.get(metrics.SIZE, 0) if start else 0
            reports.append(stack.enter_context(metrics.JSONLines(out, size)))
            if settings.tensorboard:
                reports.append(stack.enter_context(metrics.TensorBoard(out, start.step if start else 0)))
            speed = peak_speed(settings, model, device, group.size) if has_room() else None
            reports.append(stack.enter_context(progress_bar(settings.steps, peak=speed, device=device)))
        report, sample = Reports(reports), sampler(settings, corpus)
        result = train(
            settings,
            corpus,
            model,
            loss=model.loss if settings.lora else None,
            report=report,
            checkpoints=checkpoints,
            start=start,
            sample=sample,
            group=group,
            device=device,
        )
    if not result.steps:
        raise KeyboardInterrupt  # no step was completed, so there is nothing to save
    if group.rank:
        return
    settings_used = {**run.given(), **dataclasses.asdict(settings)}
    settings_used |= {"device": str(device), "threads": torch.get_num_threads(), "processes": group.size}
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer, tokenizer_settings, state=result.state)
        content = summary(settings_used, result, run, corpus, parameters)
        checkpoint.write_json(folder / "summary.json", content)
    early = "stopped early after" if result.stopped_early else "trained for"
    ended = "interrupted after" if result.interrupted else early
    if settings.lora:
        model.save_adapter(out / ADAPTER, result.state)
    interrupts.ignore()
    if result.skipped:
        say(f"skipped {quantity(len(result.skipped), 'step')}; {metrics.FILE} has the reasons")
    say(f"{ended} {quantity(result.steps, 'step')} at {result.tokens_per_second:,.0f} tokens/s; saved to {out}")
    if result.interrupted:
        say_how_to_go_on(out)
    if result.stopped_early:
        step, _, lowest = min(result.evaluations, key=lambda evaluation: evaluation[2])
        folder = out / checkpoint.CHECKPOINTS / f"{checkpoint.STEP}{step:08}"
        say(f"lowest val loss {lowest:.4f} after step {step}" + (f", in {folder}" if folder.is_dir() else ""))
    say(f"val loss {result.val_loss:.4f}")
    if result.failure is not None:
        raise result.failure


def prompt_of(settings: Settings, tokenizer: Tokenizer) -> list[int]:
    """The token ids of the prompt of the samples; [] without samples."""
    if not settings.sample_every:
        return []
    ids = generation.Tokenizer(tokenizer).encode(settings.prompt, "prompt")
    if not ids:
        raise mismatch("prompt", "at least one token", repr(settings.prompt))
    return ids


def sampler(settings: Settings, corpus: data.Corpus) -> Callable[[nn.Module], str] | None:
    """What continues the prompt; the same text for the same weights."""
    if not settings.sample_every:
        return None
    tokenizer = generation.Tokenizer(corpus.tokenizer)
    prompt = torch.tensor([prompt_of(settings, corpus.tokenizer)])

    def sample(model: Any) -> str:
        generated = model.generate(
            prompt.to(model.device), max_new_tokens=SAMPLE_TOKENS, temperature=0.8, eos_token_id=(), seed=settings.seed
        )
        return tokenizer.decode(generated[0].tolist())

    return sample


def peak_speed(settings: Settings, model: Any, device: torch.device, processes: int) -> float | None:
    """Tokens/s at the peak of this machine's arithmetic; None on a GPU, whose peak is not measured here."""
    if device.type != "cpu":
        return None
    # Kernels widen float16 to float32.
    dtype = torch.float32 if settings.dtype == "float16" else getattr(torch, settings.dtype)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if settings.lora else None
    needed = flops_of_step(model.own[0] if settings.lora else model, settings, adapters)
    return processes * settings.tokens_per_step * peak(torch.get_num_threads(), dtype) / needed


def describe_devices(device: torch.device, group: Group, settings: Settings) -> str:
    several = f" in each of {group.size} processes ({settings.parallel})" if group.size > 1 else ""
    return describe_device(device) + several


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def skipped_in_words(files: Sequence[Path]) -> str:
    names = ", ".join(map(str, files[:MAX_NAMED]))
    rest = f" and {len(files) - MAX_NAMED:,} more" if len(files) > MAX_NAMED else ""
    return f"skipped {quantity(len(files), 'file')}, hidden or binary: {names}{rest}"


def summary(settings: dict[str, Any], result: Result, run: Run, corpus: data.Corpus, parameters: int) -> dict[str, Any]:
    return {
        "settings": settings,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "tokens_per_second": result.tokens_per_second,
        "steps": result.steps,
        "interrupted": result.interrupted,
        "stopped_early": result.stopped_early,
        "skipped_steps": result.skipped,
        "overflows": len(result.overflows),
        "parameters": parameters,
        "tokens": {"training": len(corpus.train), "validation": len(corpus.validation)},
        "skipped": run.skipped,
        "evaluations": [{"step": step, "train_loss": a, "val_loss": b} for step, a, b in result.evaluations],
        "versions": checkpoint.versions(),
    }
