"""Pretrains a small BERT on the standard library, then fine-tunes it to tell which module a line of source comes from.

    python -m benchmarks.small_bert --out RUN --threads 2

It prints the accuracy of masked tokens in files that it was not trained on, beside that of always naming the commonest
token, and the accuracy of the classifier on lines that it was not fine-tuned on, beside that of the same model with
random weights. The modules are read in pretraining, without their names.
"""

import collections
import json
import shutil
import sysconfig
import zlib
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

import fastlm
from benchmarks.small_gpt import command
from fastlm.models import BertForSequenceClassification
from fastlm.models.bert import BertConfig
from fastlm.training.schedule import learning_rate

CONTEXT, BATCH = 128, 32
VOCABULARY = 4096
SIZES = ["--layers", 4, "--heads", 4, "--width", 256, "--context", CONTEXT, "--batch", BATCH]
SETTINGS = ["--objective", "masked-token", "--whole-words", "--lr", 1e-3, "--warmup", 200, "--eval-every", 1000]
MODULES, SHORTEST, LONGEST = 16, 24, 64  # of the classifier; characters and tokens of a line
EPOCHS, LINES, LR = 3, 64, 3e-4
NEW = ("bert.pooler", "classifier")  # parameters that pretraining does not have
HELD_OUT = 8  # one file, and one line, of so many


def main(
    out: Annotated[Path, typer.Option(help="A new directory.")],
    steps: Annotated[int, typer.Option(help="Of pretraining.")] = 4000,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    training, validation = ([f for f in files if (checksum(f.name) == 0) is held] for held in (False, True))
    tokenizer, model = out / "tokenizer", out / "bert"
    command("tokenizer", "train", *training, "--kind", "wordpiece", "--vocab-size", VOCABULARY, "--out", tokenizer)
    options = [*SIZES, *SETTINGS, "--tokenizer", tokenizer, "--steps", steps, "--threads", threads, "--out", model]
    held_out = out / "validation"
    held_out.mkdir(parents=True)
    for file in validation:
        shutil.copy(file, held_out)
    command("train", *training, "--val-file", held_out, *options)
    command("eval", *validation, "--model", model, "--json", out / "masked.json", "--threads", threads)
    masked = json.loads((out / "masked.json").read_text())
    text = "".join(file.read_text() for file in validation)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    [(_, commonest)] = collections.Counter(ids).most_common(1)
    print(f"masked accuracy {100 * masked['accuracy']:.1f} % of {masked['masked']:,} tokens in {len(validation)} files")
    print(f"of the commonest token {100 * commonest / len(ids):.1f} %")
    accuracies = {name: classify(model, training, pretrained=name == "pretrained") for name in ("pretrained", "random")}
    print(f"module of a line, {MODULES} modules: {100 * accuracies['pretrained']:.1f} % of lines")
    print(f"with random weights before fine-tuning {100 * accuracies['random']:.1f} %")


def checksum(text: str) -> int:
    return zlib.crc32(text.encode()) % HELD_OUT


def classify(directory: Path, files: list[Path], *, pretrained: bool) -> float:
    """Fine-tunes on most lines of the largest files; returns the accuracy on the others."""
    files = sorted(files, key=lambda file: (-file.stat().st_size, file.name))[:MODULES]
    kept = {(line.strip(), i) for i, file in enumerate(files) for line in file.read_text().splitlines()}
    counts = collections.Counter(line for line, _ in kept)
    lines = sorted((line, i) for line, i in kept if len(line) >= SHORTEST and counts[line] == 1)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(directory)
    config.num_labels = MODULES
    if pretrained:
        model = BertForSequenceClassification.from_pretrained(directory, config=config, initialise=NEW)
    else:
        model = BertForSequenceClassification(config)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    train, test = ([line for line in lines if (checksum(line[0]) == 0) is held] for held in (False, True))
    count = len(train) // LINES
    model.train()
    for step in range(EPOCHS * count):
        if step % count == 0:
            order = torch.randperm(len(train)).tolist()
        some = [train[i] for i in order[step % count * LINES :][:LINES]]
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, lr=LR, min_lr=0.0, warmup=count // 10, decay_steps=EPOCHS * count
        )
        model(**inputs(tokenizer, some), labels=torch.tensor([i for _, i in some])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    correct = 0
    with torch.no_grad():
        for start in range(0, len(test), LINES):
            some = test[start : start + LINES]
            found = model(**inputs(tokenizer, some)).logits.argmax(1)
            correct += int((found == torch.tensor([i for _, i in some])).sum())
    print(f"{len(train):,} lines for fine-tuning, {len(test):,} for the accuracy", flush=True)
    return correct / len(test)


def inputs(tokenizer: Tokenizer, lines: list[tuple[str, int]]) -> dict[str, Tensor]:
    encoded = tokenizer.encode_batch([line for line, _ in lines])
    return {
        "input_ids": torch.tensor([x.ids for x in encoded]),
        "attention_mask": torch.tensor([x.attention_mask for x in encoded]),
    }


if __name__ == "__main__":
    typer.run(main)
