"""Trains a GPT of 6 layers and width 384 with a byte-level BPE tokenizer on the source of the standard library.

    python -m benchmarks.small_gpt --out RUN --threads 2

It prints bits per byte of files that neither the tokenizer nor the model has read, beside those of `xz -9` on the same
bytes, and writes the curve of the loss to RUN/loss.png. The default number of steps reads 14 million tokens.
"""

import json
import lzma
import subprocess
import sys
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Annotated

import typer

SIZES = ["--layers", 6, "--heads", 6, "--width", 384, "--context", 256, "--batch", 16]
SETTINGS = ["--lr", 1e-3, "--warmup", 200, "--eval-every", 500]
VOCABULARY = 8192
HELD_OUT = 16  # one file of so many
PROMPT = "def read_lines(path):"


def main(
    out: Annotated[Path, typer.Option(help="A new directory.")],
    steps: int = 3500,
    dtype: str = "bfloat16",
    threads: int = 2,
) -> None:
    training, validation = out / "training", out / "validation"
    for held, folder in ((False, training), (True, validation)):
        folder.mkdir(parents=True)
        for name, text in source().items():
            if (zlib.crc32(name.encode()) % HELD_OUT == 0) is held:
                (folder / name).write_bytes(text)
    tokenizer, model = out / "tokenizer", out / "gpt"
    command("tokenizer", "train", training, "--vocab-size", VOCABULARY, "--out", tokenizer)
    options = [*SIZES, *SETTINGS, "--tokenizer", tokenizer, "--steps", steps, "--threads", threads]
    began = time.perf_counter()
    command("train", training, "--val-file", validation, *options, "--dtype", dtype, "--out", model)
    minutes = (time.perf_counter() - began) / 60
    command("eval", validation, "--model", model, "--json", out / "eval.json", "--threads", threads)
    command("plot", model, "--out", out / "loss.png")
    whole = b"".join(file.read_bytes() for file in sorted(validation.iterdir()))
    packed = 8 * len(lzma.compress(whole, preset=9)) / len(whole)
    bits = json.loads((out / "eval.json").read_text())["bits_per_byte"]
    print(f"{minutes:.1f} minutes, {dtype}; {bits:.3f} bits per byte of {len(whole):,} bytes, xz -9 {packed:.3f}")
    command(
        "generate", "--model", model, "--prompt", PROMPT, "--temperature", 0.7, "--max-new-tokens", 100, "--seed", 0
    )


def source() -> dict[str, bytes]:
    """Files of the standard library in UTF-8, by a name without folders."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        text = file.read_bytes()
        if not {"site-packages", "dist-packages"} & set(name.parts) and text and is_utf8(text):
            found["-".join(name.parts)] = text
    return found


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def command(*arguments: object, quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([sys.executable, "-m", "fastlm.cli", *map(str, arguments)], check=True, stdout=output)


if __name__ == "__main__":
    typer.run(main)
