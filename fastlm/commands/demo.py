"""fastlm demo: trains a small GPT on the source of the Python standard library in under three minutes.

It compares fastlm with plain PyTorch, trains, generates a sample and saves the model.
"""

import dataclasses
import itertools
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor

import fastlm
from fastlm.commands.comparison import Comparison, side_by_side
from fastlm.commands.display import describe_device, progress_bar, quantity, say
from fastlm.commands.process import check_alone, set_up
from fastlm.commands.streaming import continue_text
from fastlm.core.errors import mismatch
from fastlm.generation import Tokenizer
from fastlm.models import GPT2LMHeadModel
from fastlm.training import checkpoint, data
from fastlm.training.baseline import PlainGPT2
from fastlm.training.batches import evaluation_batches, training_batch
from fastlm.training.curve import draw_losses
from fastlm.training.models import build_gpt2
from fastlm.training.objectives import NextToken
from fastlm.training.run import forget
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings, check_range
from fastlm.training.stopping import stop_requests
from fastlm.training.trainer import Trainer

# In the same time on two cores, models of width 192 and 256 had a higher loss and generated worse samples.
SETTINGS = Settings(layers=4, heads=4, width=128, context=256, batch=6, lr=3e-3, min_lr=1e-4, beta2=0.99)
CORPUS_BYTES = 4_000_000
PAIRS, PAIR_SECONDS = 100, 20.0  # number of compared steps, and the time limit for them
PROMPT = "def "

# Both models compute in float32, but accumulate in different orders, and training amplifies the differences. Relative
# differences of the losses measured over PAIRS steps: up to 7e-7 for PyTorch with the sequences of each batch permuted;
# 5e-5 to 1e-4 for the smallest error tried, the exact GELU in place of its tanh approximation.
TOLERANCE = 1e-5

Batches = Iterator[tuple[Tensor, Tensor]]  # inputs and targets


@dataclasses.dataclass
class DemoResult:
    compared: Comparison
    losses: list[float]  # of every step, including those of the comparison
    val_loss: float
    tokens_per_second: float
    interrupted: bool


def run(*, out: Path, overwrite: bool, seconds: float, seed: int, device: str, threads: int | None) -> None:
    check_range("seconds", seconds, 0, 3600, open_left=True)
    settings, chosen = dataclasses.replace(SETTINGS, seed=seed), set_up(device, threads)
    check_alone()
    out = checkpoint.prepare(out, overwrite=overwrite)
    files = standard_library()
    corpus = data.load(files, tokenizer="byte", val_fraction=0.05)
    model = build_gpt2(settings, corpus.tokenizer).to(chosen)
    say(f"fastlm {fastlm.__version__}: trains a small GPT on the source of the Python standard library (no download)")
    size = len(corpus.train) + len(corpus.validation)
    say(f"corpus   {size / 1e6:.1f} million bytes, one token each; {quantity(len(files), 'file')} in {files[0].parent}")
    sizes = f"{settings.layers} layers, {settings.heads} heads, width {settings.width}, context {settings.context}"
    say(f"model    {sizes}: {model.num_parameters() / 1e6:.1f} million parameters, {describe_device(model.device)}")

    result = train(model, settings, corpus, seconds)
    saved = save(out, model, corpus, settings, result)
    ended = "interrupted after" if result.interrupted else "trained for"
    say(f"{ended} {quantity(len(result.losses), 'step')}; saved to {out}: {saved}")
    if not result.interrupted:
        say()
        say(f"3. A sample, generated from the prompt {PROMPT!r}")
        say()
        continue_text(
            model,
            Tokenizer(corpus.tokenizer),
            PROMPT,
            max_new_tokens=SETTINGS.context - len(PROMPT),
            temperature=0.8,
            top_k=None,
            top_p=None,
            seed=seed,
        )
        say()
        say(f"Generate more: fastlm generate --model {out} --prompt 'import '")
    say(f"val loss {result.val_loss:.4f}")
    if result.interrupted:
        raise typer.Exit(130)
    if not result.compared.disagreement <= TOLERANCE:
        expected = f"a relative difference of at most {TOLERANCE:g} between fastlm and PyTorch"
        raise mismatch("losses", expected, f"{result.compared.disagreement:.1e}")


def train(model: GPT2LMHeadModel, settings: Settings, corpus: data.Corpus, seconds: float) -> DemoResult:
    """Compares, then trains. Ctrl-C stops after the current step."""
    ours, batches, speed = Trainer(model, settings, NextToken().loss), training_batches(settings, corpus), 0.0
    with stop_requests() as stop:
        say()
        say("1. Comparison with plain PyTorch: the same model, weights and batches, interleaved steps")
        compared = compare(ours, settings, batches, stop)
        losses = [loss for loss, _ in compared.losses]
        if not losses:
            raise KeyboardInterrupt  # no step was completed, so there is nothing to save
        if not stop.is_set():
            show_comparison(compared, settings)
            say()
            say(f"2. Training with fastlm for {seconds:.0f} seconds")
            speed = keep_training(ours, settings, batches, losses, seconds, stop)
    pairs = evaluation_batches(corpus.validation, settings, NextToken(), max_tokens=2**14)
    return DemoResult(compared, losses, ours.evaluate(pairs), speed, stop.is_set())


def standard_library() -> list[Path]:
    """Top-level modules of the standard library in alphabetical order, up to CORPUS_BYTES."""
    folder = Path(sysconfig.get_path("stdlib"))
    files, size = [], 0
    for file in sorted(folder.glob("*.py")):
        size += file.stat().st_size
        if size > CORPUS_BYTES:
            break
        files.append(file)
    if not files:
        raise FileNotFoundError(f"corpus: expected the standard library's source, got no .py file in {str(folder)!r}")
    return files


def training_batches(settings: Settings, corpus: data.Corpus) -> Batches:
    for step in itertools.count():
        yield training_batch(corpus.train, settings, NextToken(), step)


def compare(ours: Trainer, settings: Settings, batches: Batches, stop: threading.Event) -> Comparison:
    """Trains both models with a rising learning rate: for fastlm's this is the warm-up of the training that follows."""
    plain = Trainer(PlainGPT2.like(ours.model), settings, PlainGPT2.loss, native=True)
    rates = (settings.lr * (i + 1) / PAIRS for i in range(PAIRS))
    comparison = Comparison()
    with progress_bar(PAIRS, "comparing") as bar:
        for trainer in (ours, plain):
            trainer.warm_up()
        start = time.perf_counter()
        for comparison in side_by_side(ours, plain, ((*next(batches), lr) for lr in rates)):
            speed = settings.tokens_per_step / comparison.ours[-1]
            pairs = len(comparison.losses)
            elapsed = time.perf_counter() - start
            in_time = pairs < 5 or elapsed <= PAIR_SECONDS
            # Of the limit that is reached first, so that the bar ends full.
            completed = max(pairs, min(PAIRS * elapsed / PAIR_SECONDS, PAIRS - 1)) if in_time else PAIRS
            bar.show(completed, f"pair {pairs}", comparison.losses[-1][0], f"{speed:,.0f}")
            if stop.is_set() or not in_time:
                break
    return comparison


def show_comparison(comparison: Comparison, settings: Settings) -> None:
    for name, times in (("fastlm", comparison.ours), ("PyTorch", comparison.plain)):
        say(f"   {name:8} {settings.tokens_per_step / sorted(times)[len(times) // 2]:8,.0f} tokens/s")
    ratio = comparison.ratio
    spread = f"median of {len(comparison.ours) - 1} pairs of steps, quartiles {ratio.low:.2f} to {ratio.high:.2f}"
    say(f"   speedup of fastlm over PyTorch: {ratio.median:.2f} × ({spread})")
    verdict = "agree" if comparison.disagreement <= TOLERANCE else "DISAGREE"
    say(f"   losses {verdict}: largest relative difference {comparison.disagreement:.1e}, tolerance {TOLERANCE:g}")


def keep_training(
    ours: Trainer, settings: Settings, batches: Batches, losses: list[float], seconds: float, stop: threading.Event
) -> float:
    """Trains for a number of seconds, with the cosine schedule over time instead of steps. Returns tokens/s."""
    first, speed = len(losses), 0.0

    def read() -> None:
        nonlocal speed
        if not ours.pending:
            return
        losses.extend(outcome.loss for outcome in ours.read())
        speed = (len(losses) - first) * settings.tokens_per_step / (time.perf_counter() - start)
        bar.show(min(time.perf_counter() - start, seconds), f"step {len(losses)}", losses[-1], f"{speed:,.0f}")

    with progress_bar(seconds) as bar:
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds and not stop.is_set():
            lr = learning_rate(elapsed, lr=settings.lr, min_lr=settings.min_lr, warmup=0, decay_steps=seconds)
            inputs, targets = next(batches)
            ours.begin_step(inputs, targets, lr)
            if ours.should_read:
                read()
        read()
        if not stop.is_set():
            bar.show(seconds, f"step {len(losses)}", losses[-1], f"{speed:,.0f}")
    return speed


def save(out: Path, model: GPT2LMHeadModel, corpus: data.Corpus, settings: Settings, result: DemoResult) -> str:
    """Writes the checkpoint, summary and plot; returns the names of the files."""
    compared, losses = result.compared, result.losses
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer)
        plain = [loss for _, loss in compared.losses]
        drawn = draw_losses(
            folder / "loss.png", losses, validation=[(len(losses), result.val_loss)], plain=plain, unit="nats per byte"
        )
        summary = {
            "settings": dataclasses.asdict(settings)
            | {"device": str(model.device), "threads": torch.get_num_threads()},
            "train_loss": sum(losses[-50:]) / len(losses[-50:]),
            "val_loss": result.val_loss,
            "tokens_per_second": result.tokens_per_second,
            "steps": len(losses),
            "interrupted": result.interrupted,
            "comparison": {
                "seconds_fastlm": compared.ours,
                "seconds_pytorch": compared.plain,
                "losses": compared.losses,
            },
        }
        checkpoint.write_json(folder / "summary.json", summary)
    forget(out)
    return "config.json, model.safetensors, tokenizer.json, tokenizer_config.json, summary.json" + (
        ", loss.png" if drawn else " (loss.png needs matplotlib)"
    )
