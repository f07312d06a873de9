"""fastlm demo: the whole way in under three minutes, from the Python standard library's source to text that looks like it."""

import dataclasses
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor

import fastlm
from fastlm.commands.display import computer, in_words, progress_bar, say, set_threads
from fastlm.commands.streaming import continue_text
from fastlm.device import choose_device
from fastlm.generation import Tokenizer
from fastlm.models import GPT2LMHeadModel
from fastlm.ops.boundary import mismatch
from fastlm.training import checkpoint, data
from fastlm.training.baseline import PlainGPT2
from fastlm.training.comparison import Comparison, side_by_side
from fastlm.training.curve import draw_losses
from fastlm.training.loop import Trainer, stop_requests
from fastlm.training.models import build_gpt2
from fastlm.training.objectives import NextToken
from fastlm.training.schedule import learning_rate
from fastlm.training.settings import Settings, within

# In the time there is on two cores a larger model reads too little: at width 192 and 256 the loss was higher, and the sample worse.
SETTINGS = Settings(layers=4, heads=4, width=128, context=256, batch=6, lr=3e-3, min_lr=1e-4, beta2=0.99)
CORPUS_BYTES = 4_000_000
PAIRS, PAIR_SECONDS = 100, 20.0  # steps that both models take, and when to stop on a slow machine
PROMPT = "def "

# Both compute in float32 but add in different orders, and training amplifies what rounds differently. Measured over PAIRS steps: PyTorch against itself, with
# nothing changed but the order of the sequences in each batch, comes up to 7e-7 apart. With the exact GELU in place of its tanh approximation, the smallest
# mistake that one could make, it comes 5e-5 to 1e-4 apart.
AGREE = 1e-5

Batches = Iterator[tuple[Tensor, Tensor]]  # inputs and targets


@dataclasses.dataclass
class Learnt:
    """What a run has to show: losses of every step, the comparison included."""

    compared: Comparison
    losses: list[float]
    val_loss: float
    tokens_per_second: float
    interrupted: bool


def run(*, out: Path, seconds: float, seed: int, device: str, threads: int | None) -> None:
    within("seconds", seconds, 0, 3600, open_left=True)
    settings, chosen = dataclasses.replace(SETTINGS, seed=seed), choose_device(device)
    set_threads(threads)
    if chosen.type == "cpu":
        fastlm.tune_allocator()
    out = checkpoint.prepare(out)
    files = standard_library()
    corpus = data.load(files, tokenizer="byte", val_fraction=0.05)
    model = build_gpt2(settings, corpus.tokenizer).to(chosen)
    say(
        f"fastlm {fastlm.__version__}: a GPT learns Python from the standard library's own source; nothing is downloaded"
    )
    size = len(corpus.train) + len(corpus.validation)
    say(
        f"corpus   {size / 1e6:.1f} million bytes, one token each, in {in_words(len(files), 'file')} of {files[0].parent}"
    )
    sizes = f"{settings.layers} layers, {settings.heads} heads, width {settings.width}, context {settings.context}"
    say(f"model    {sizes}: {model.num_parameters() / 1e6:.1f} million parameters, {computer(model.device)}")

    learnt = learn(model, settings, corpus, seconds)
    saved = save(out, model, corpus, settings, learnt)
    say(
        f"{'interrupted after' if learnt.interrupted else 'trained for'} {in_words(len(learnt.losses), 'step')}; saved in {out}: {saved}"
    )
    if not learnt.interrupted:
        say()
        say(f"3. What it writes after {PROMPT!r}")
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
        say(f"More of it: fastlm generate --model {out} --prompt 'import '")
    say(f"val loss {learnt.val_loss:.4f}")
    if learnt.interrupted:
        raise typer.Exit(130)
    if not learnt.compared.disagreement <= AGREE:
        raise mismatch(
            "losses", f"fastlm's and PyTorch's within {AGREE:g} of each other", f"{learnt.compared.disagreement:.1e}"
        )


def learn(model: GPT2LMHeadModel, settings: Settings, corpus: data.Corpus, seconds: float) -> Learnt:
    """Ctrl-C ends it after the running step."""
    ours, batches, speed = Trainer(model, settings, NextToken().loss), training_batches(settings, corpus), 0.0
    with stop_requests() as stop:
        say()
        say("1. The same model, weights and batches on fastlm's operators and on plain PyTorch's, in turn")
        compared = compare(ours, settings, batches, stop)
        losses = [loss for loss, _ in compared.losses]
        if not losses:
            raise KeyboardInterrupt  # nothing was learnt, so there is nothing to save
        if not stop.is_set():
            show_comparison(compared, settings)
            say()
            say(f"2. Training on fastlm's operators for {seconds:.0f} seconds")
            speed = keep_training(ours, settings, batches, losses, seconds, stop)
        pairs = [
            NextToken().pairs(w)
            for w in data.spread_windows(corpus.validation, settings.context + 1, settings.batch, most=2**14)
        ]
        return Learnt(compared, losses, ours.evaluate(pairs), speed, stop.is_set())


def standard_library() -> list[Path]:
    """Its top-level modules by name, up to CORPUS_BYTES: prose about the language, and much of the language."""
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
    draw = torch.Generator().manual_seed(settings.seed)
    while True:
        yield NextToken().pairs(data.random_windows(corpus.train, settings.context + 1, settings.batch, draw), draw)


def compare(ours: Trainer, settings: Settings, batches: Batches, stop: threading.Event) -> Comparison:
    """The rate rises meanwhile: these steps are also the warm-up of the training that follows."""
    plain = Trainer(PlainGPT2.like(ours.model), settings, PlainGPT2.loss, native=True)
    rates = (settings.lr * (i + 1) / PAIRS for i in range(PAIRS))
    seen = Comparison()
    with progress_bar(PAIRS, "comparing") as bar:
        for trainer in (ours, plain):
            trainer.warm_up()
        start = time.perf_counter()
        for seen in side_by_side(ours, plain, ((*next(batches), lr) for lr in rates)):
            speed = settings.tokens_per_step / seen.ours[-1]
            bar.show(len(seen.losses), f"pair {len(seen.losses)}", seen.losses[-1][0], f"{speed:,.0f}")
            if stop.is_set() or (len(seen.losses) >= 5 and time.perf_counter() - start > PAIR_SECONDS):
                break
    return seen


def show_comparison(seen: Comparison, settings: Settings) -> None:
    for name, taken in (("fastlm", seen.ours), ("PyTorch", seen.plain)):
        say(f"   {name:8} {settings.tokens_per_step / sorted(taken)[len(taken) // 2]:8,.0f} tokens/s")
    ratio = seen.ratio
    say(
        f"   fastlm is {ratio.median:.2f} times as fast: median of {len(seen.ours) - 1} pairs, quartiles {ratio.low:.2f} to {ratio.high:.2f}"
    )
    verdict = "agree" if seen.disagreement <= AGREE else "DISAGREE"
    say(
        f"   the losses {verdict}: at most {seen.disagreement:.1e} apart, relative, where rounding alone explains up to {AGREE:g}"
    )


def keep_training(
    ours: Trainer, settings: Settings, batches: Batches, losses: list[float], seconds: float, stop: threading.Event
) -> float:
    """As many steps as fit, the cosine over the time rather than the steps: a slow machine ends as soon, and as well as it can. Returns tokens/s."""
    first, speed = len(losses), 0.0

    def read() -> None:
        nonlocal speed
        if not ours.unread:
            return
        losses.extend(ours.read())
        speed = (len(losses) - first) * settings.tokens_per_step / (time.perf_counter() - start)
        bar.show(time.perf_counter() - start, f"step {len(losses)}", losses[-1], f"{speed:,.0f}")

    with progress_bar(seconds) as bar:
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds and not stop.is_set():
            lr = learning_rate(elapsed, lr=settings.lr, min_lr=settings.min_lr, warmup=0, decay_steps=seconds)
            inputs, targets = next(batches)
            ours.begin_step(inputs, targets, lr)
            if ours.due:
                read()
        read()
    return speed


def save(out: Path, model: GPT2LMHeadModel, corpus: data.Corpus, settings: Settings, learnt: Learnt) -> str:
    """Returns the names of what was written."""
    compared, losses = learnt.compared, learnt.losses
    with checkpoint.staged(out) as folder:
        checkpoint.write_model(folder, model, corpus.tokenizer)
        plain = [loss for _, loss in compared.losses]
        drawn = draw_losses(
            folder / "loss.png", losses, validation=[(len(losses), learnt.val_loss)], plain=plain, unit="nats per byte"
        )
        summary = {
            "settings": dataclasses.asdict(settings)
            | {"device": str(model.device), "threads": torch.get_num_threads()},
            "train_loss": sum(losses[-50:]) / len(losses[-50:]),
            "val_loss": learnt.val_loss,
            "tokens_per_second": learnt.tokens_per_second,
            "steps": len(losses),
            "interrupted": learnt.interrupted,
            "comparison": {
                "seconds_fastlm": compared.ours,
                "seconds_pytorch": compared.plain,
                "losses": compared.losses,
            },
        }
        checkpoint.write_json(folder / "summary.json", summary)
    return "config.json, model.safetensors, tokenizer.json, summary.json" + (
        ", loss.png" if drawn else " (and loss.png, where matplotlib is installed)"
    )
