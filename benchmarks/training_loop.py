"""The loop of `fastlm train` against its bare step, and how long a checkpoint blocks a step.

    python -m benchmarks.training_loop --threads 2

The loop has what a run has: batches from the text, metrics.jsonl, and a checkpoint every few steps that a thread
writes. The bare step repeats one batch. Rounds of both alternate. Checkpoints are of GPT-2 with 124 million parameters.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
import typer

import fastlm
from fastlm.benchmarking.measure import Ratio
from fastlm.commands.demo import standard_library
from fastlm.training import data, metrics
from fastlm.training.batches import training_batch
from fastlm.training.checkpoints import Checkpoints
from fastlm.training.config import PRESETS
from fastlm.training.loop import train
from fastlm.training.models import build
from fastlm.training.objectives import NextToken
from fastlm.training.report import Report, Reports, Step
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer

SETTINGS = Settings(
    layers=6, heads=6, width=384, context=256, batch=12, steps=24, eval_every=1000, checkpoint_every=8, keep=1
)
FIRST = 2  # steps that allocate memory


class Times(Report):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, step: Step) -> None:
        self.times.append(time.perf_counter())


def loop_seconds(corpus: data.Corpus) -> float:
    """Seconds of a step of the loop, the checkpoints between the first and the last one included."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        with (
            metrics.JSONLines(Path(folder)) as lines,
            Checkpoints(Path(folder), keep=SETTINGS.keep, tokenizer=corpus.tokenizer) as checkpoints,
        ):
            times = Times()
            train(SETTINGS, corpus, report=Reports([lines, times]), checkpoints=checkpoints)
    return (times.times[-1] - times.times[FIRST]) / (SETTINGS.steps - 1 - FIRST)


def bare_seconds(trainer: Trainer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    for _ in range(FIRST):
        trainer.step(*batch, SETTINGS.lr)
    began = time.perf_counter()
    for _ in range(SETTINGS.steps - FIRST):
        trainer.step(*batch, SETTINGS.lr)
    return (time.perf_counter() - began) / (SETTINGS.steps - FIRST)


def blocked_seconds(corpus: data.Corpus, times: int = 5) -> list[float]:
    """Seconds of Checkpoints.save, which copies; the one before is on the disk."""
    sizes = {name: PRESETS["gpt2-124m"][name] for name in ("layers", "heads", "width")}
    settings = Settings(**sizes, context=64, batch=1)
    model = build(settings, corpus.tokenizer)
    # The text's tokens are bytes; GPT-2's vocabulary is larger.
    model.transformer.wte.weight = torch.nn.Parameter(torch.randn(50257, settings.width))
    model.tie_weights()
    model.config = dataclasses.replace(model.config, vocab_size=50257)
    trainer = Trainer(model, settings, NextToken().loss)
    trainer.step(*training_batch(corpus.train, settings, NextToken(), 0), settings.lr)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        found = []
        with Checkpoints(Path(folder), keep=1, tokenizer=corpus.tokenizer) as checkpoints:
            checkpoints.copy(model, trainer.state(), None)  # as at the start of a run
            for step in range(times):
                began = time.perf_counter()
                checkpoints.save(step, model, trainer.state(), {"seconds": 0.0, "evaluations": []})
                found.append(time.perf_counter() - began)
                checkpoints.wait()
    return found


def main(rounds: int = 5, threads: int = 2) -> None:
    fastlm.tune_allocator()
    torch.set_num_threads(threads)
    corpus = data.load(standard_library(), tokenizer="byte", val_fraction=0.05)
    trainer = Trainer(build(SETTINGS, corpus.tokenizer), SETTINGS, NextToken().loss)
    batch = training_batch(corpus.train, SETTINGS, NextToken(), 0)
    bare, loop = [], []
    for _ in range(rounds):
        bare.append(bare_seconds(trainer, batch))
        loop.append(loop_seconds(corpus))
    share = Ratio.of(loop, bare)  # of the bare step's tokens/s
    print(f"bare {1000 * statistics.median(bare):.1f} ms a step, loop {1000 * statistics.median(loop):.1f} ms")
    print(f"the loop reaches {share} of the tokens/s of the bare step")
    blocked = blocked_seconds(corpus)
    print(f"a checkpoint blocks {statistics.median(blocked):.3f} s [{min(blocked):.3f}–{max(blocked):.3f}]")


if __name__ == "__main__":
    typer.run(main)
