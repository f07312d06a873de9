"""Compares memory and time of runs with what `fastlm train --dry-run` estimates.

    python -m benchmarks.dry_run --threads 2

Each case is estimated, then run, in processes of their own. The text is of the standard library. Peak memory is that of
the process, and time is that of the whole command: imports, tokenization, evaluations, checkpoints and the saved model
included.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.small_gpt import command, source

BYTES = 120_000  # of text
VOCABULARY = 4096
UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
SMALL = "--layers 6 --heads 6 --width 384 --context 256 --batch 8".split()
CASES: dict[str, list[Any]] = {
    "shakespeare-char": ["--preset", "shakespeare-char", "--steps", 400],
    "gpt2, BPE, bf16": [*SMALL, "--tokenizer", "bpe", "--dtype", "bf16", "--steps", 20],
    "llama": [*SMALL, "--tokenizer", "bpe", "--architecture", "llama", "--kv-heads", 2, "--steps", 20],
    "llama, lora": ["--init", "llama", "--lora", 8, "--context", 256, "--batch", 8, "--steps", 20],
}


def main(
    threads: int = 2,
    case: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}.")] = None,
) -> None:
    if unknown := set(case or ()) - set(CASES):
        raise typer.BadParameter(f"case: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = b"\n".join(source().values())[:BYTES]
        Path("text.txt").write_text(text.decode(errors="ignore"), encoding="utf-8")
        command("tokenizer", "train", "text.txt", "--vocab-size", VOCABULARY, "--out", "bpe", quiet=True)
        if case is None or "llama, lora" in case:  # the model that adapters are added to
            command("train", "text.txt", *CASES["llama"], "--steps", 1, "--out", "llama", quiet=True)
        print(f"{'':18}{'memory: estimated':>20}{'run':>11}{'ratio':>7}{'time: estimated':>20}{'run':>10}{'ratio':>7}")
        for name in case or CASES:
            compare(name, ["train", "text.txt", *CASES[name], "--threads", threads, "--out", "run", "--overwrite"])


def compare(name: str, arguments: list[Any]) -> None:
    output, *_ = measured(*arguments, "--dry-run")
    found = re.search(r"memory: (\S+) GiB(?s:.*)time of the run: (\S+) (\w+)", output)
    assert found is not None, output
    memory, seconds = float(found[1]) * 2**30, float(found[2].replace(",", "")) * UNITS[found[3]]
    _, peak, took = measured(*arguments)
    columns = f"{memory / 2**20:16,.0f} MiB{peak / 2**20:7,.0f} MiB{memory / peak:7.2f}"
    print(f"{name:18}{columns}{seconds:18,.1f} s{took:8,.1f} s{seconds / took:7.2f}", flush=True)


def measured(*arguments: Any) -> tuple[str, int, float]:
    """(output, bytes of memory at the peak, seconds) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastlm.cli", *map(str, arguments)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    return output, usage.ru_maxrss * 1024, time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
