"""Trains nanoGPT's recipe for a CPU with `fastlm train` and with plain PyTorch, as whole processes, in turn.

    python -m benchmarks.char_recipe compare --threads 2

PyTorch trains the model of fastlm.training.baseline with the same initial weights, batches, schedule and evaluations,
its own AdamW and clipping, eager and compiled, with the allocator tuned. Times are of processes: imports, tokenization,
compilation, evaluations and the saved model included.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import fastlm
from fastlm.benchmarking.measure import Ratio
from fastlm.commands.demo import standard_library
from fastlm.training import data
from fastlm.training.baseline import PlainGPT2
from fastlm.training.config import resolve
from fastlm.training.loop import train
from fastlm.training.models import build_gpt2

PRESET = "shakespeare-char"
CHARACTERS = 1_115_394  # of the text of nanoGPT's recipe
VALIDATION = 0.1
PLAIN = ("eager", "compiled")


def main(
    text: Annotated[Path | None, typer.Argument(help="Default: modules of the standard library.")] = None,
    runs: Annotated[int, typer.Option(help="Number of runs of each, with seeds 0, 1, …")] = 3,
    steps: int = 2000,
    threads: int = 2,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if text is None:
            text = Path(folder, "text.txt")
            whole = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in standard_library())
            text.write_text(whole[:CHARACTERS], encoding="utf-8")
        seconds: dict[str, list[float]] = {name: [] for name in ("fastlm", *PLAIN)}
        losses: dict[str, list[float]] = {name: [] for name in seconds}
        for seed in range(runs):
            for name in seconds if seed % 2 == 0 else reversed(seconds):
                out = Path(folder, f"{name}-{seed}")
                command = ["benchmarks.char_recipe", "worker", name, text, out, seed, steps, threads]
                if name == "fastlm":
                    command = ["fastlm.cli", "train", text, "--preset", PRESET, "--out", out]
                    command += ["--val-fraction", VALIDATION, "--seed", seed, "--steps", steps, "--threads", threads]
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}  # compiled anew
                began = time.perf_counter()
                command = [sys.executable, "-m", *map(str, command)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                seconds[name].append(time.perf_counter() - began)
                losses[name].append(json.loads((out / "summary.json").read_text())["val_loss"])
                print(f"seed {seed} {name:9} {seconds[name][-1]:6.1f} s, val loss {losses[name][-1]:.4f}", flush=True)
        for name in PLAIN:
            difference = max(abs(a - b) for a, b in zip(losses["fastlm"], losses[name], strict=True))
            share = statistics.median(a / b for a, b in zip(seconds["fastlm"], seconds[name], strict=True))
            speedup = f"speedup {Ratio.of(seconds['fastlm'], seconds[name])}"
            print(f"{name}: fastlm takes {share:.2f} of its time ({speedup}); val losses within {difference:.4f}")


def worker(name: str, text: Path, out: Path, seed: int, steps: int, threads: int) -> None:
    fastlm.tune_allocator()
    torch.set_num_threads(threads)
    settings, inputs = resolve(PRESET, None, {"seed": seed, "steps": steps}, {"tokenizer": None})
    corpus = data.load([text], tokenizer=inputs["tokenizer"], val_fraction=VALIDATION)
    model = PlainGPT2.like(build_gpt2(settings, corpus.tokenizer))
    if name == "compiled":
        model.compile()
    with contextlib.redirect_stdout(sys.stderr):
        result = train(settings, corpus, model=model, loss=PlainGPT2.loss, native=True)
    out.mkdir(exist_ok=True)
    torch.save(model.state_dict(), out / "model.pt")
    (out / "summary.json").write_text(json.dumps({"val_loss": result.val_loss}))


app = typer.Typer(add_completion=False)
app.command("compare")(main)
app.command("worker", hidden=True)(worker)

if __name__ == "__main__":
    app()
