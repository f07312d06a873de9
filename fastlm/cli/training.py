"""The arguments of the commands that train, and look at what was trained."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.cli.app import Device, Field, Model, OneLineErrors, Overwrite, Threads, app
from fastlm.commands import choices, options
from fastlm.core.errors import mismatch
from fastlm.training.config import PRESETS, resolve


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint, the loss curve and summary.json.")] = Path(
        "runs/demo"
    ),
    overwrite: Overwrite = False,
    seconds: Annotated[
        float, typer.Option(help="Training time in seconds; the comparison and the sample take another 30.")
    ] = 100.0,
    seed: Annotated[int, typer.Option(help="Random seed of weights, batches and sample.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a small GPT on the Python standard library's source, compare with plain PyTorch, and generate text."""
    from fastlm.commands import demo

    demo.run(out=out, overwrite=overwrite, seconds=seconds, seed=seed, device=device, threads=threads)


@app.command()
@options.with_settings
def train(
    ctx: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Files, directories or glob patterns, read in this order. Of .jsonl, .parquet and .arrow files and of "
            "folders that `datasets` saved, every record is a document; every other file is one.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="The same as an option; read before the others.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint, the tokenizer and summary.json.")] = Path(
        "runs/train"
    ),
    overwrite: Overwrite = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with the run in this directory from its newest checkpoint, to the same bits. Its settings and "
            "files are those that it was started with; of the other options, only --device, --threads and --parallel "
            "are allowed.",
            rich_help_panel="Checkpoints",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Settings of a known model, which --config and other options override: {choices.listed(PRESETS)}.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings in TOML, such as RUN/config.toml, which other options override. The keys are the names of "
            "the options, with underscores, and data.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure some steps, print parameters, memory and time of the run on this machine, and write nothing.",
        ),
    ] = False,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="byte|char|PATH",
            help="byte: 256 tokens, for any file; char: one token per character of a UTF-8 text; or a tokenizer.json, "
            "or a directory with one: from `fastlm tokenizer train`, or in Hugging Face's format.",
            rich_help_panel="Data",
        ),
    ] = "byte",
    field: Field = "text",
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for token ids, to use them for several runs; default: `tokens` in that of the run.",
            rich_help_panel="Data",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Train the language model in this directory further, with its tokenizer, instead of a new one.",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            help="Fraction for validation: the end of the text, or with records or --documents packed that fraction of "
            "the documents, by a hash of their content.",
            rich_help_panel="Data",
        ),
    ] = 0.1,
    val_file: Annotated[
        Path | None,
        typer.Option(help="A separate text for validation, used instead of --val-fraction.", rich_help_panel="Data"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    **settings: Any,
) -> None:
    """Train a model on text, from scratch or from --init.

    Ctrl-C and SIGTERM stop training and save a checkpoint and the model. --resume goes on from there.
    """
    from fastlm.commands import train

    if resume is not None:
        given = options.given(ctx)
        if others := sorted(given - {"resume", "device", "threads", "parallel"}):
            name = "PATH" if others[0] == "paths" else f"--{others[0].replace('_', '-')}"
            raise mismatch("resume", "no other option than --device, --threads and --parallel", name)
        train.resume(
            resume,
            device=device if "device" in given else None,
            threads=threads,
            parallel=settings["parallel"] if "parallel" in given else None,
        )
        return
    inputs = {
        "tokenizer": tokenizer,
        "field": field,
        "init": init,
        "val_fraction": val_fraction,
        "val_file": val_file,
        "cache": cache,
    }
    values = options.chosen(ctx, settings | inputs)
    if paths or data:
        values["data"] = [*(data or []), *(paths or [])]
    train.run(
        *resolve(preset, config, values, inputs | {"data": []}),
        out=out,
        overwrite=overwrite,
        dry_run=dry_run,
        device=device,
        threads=threads,
    )


tokenizer_app = typer.Typer(cls=OneLineErrors, rich_markup_mode="rich")
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.callback(invoke_without_command=True)
def tokenizer_group(ctx: typer.Context) -> None:
    """Train a tokenizer."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@tokenizer_app.command("train")
def train_tokenizer(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="The text, as for `fastlm train`.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Directory for tokenizer.json and tokenizer_config.json.")],
    kind: Annotated[
        str,
        typer.Option(metavar="bpe|wordpiece", help="bpe: byte-level BPE, as GPT-2's; wordpiece: as BERT's."),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, special ones included.")] = 8192,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", help="With wordpiece: lowercase the text and remove accents.")
    ] = False,
    field: Field = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokenizer in --out, if any.")] = False,
) -> None:
    """Train a tokenizer on text.

    `fastlm train --tokenizer DIR` and transformers' AutoTokenizer read it.
    """
    from fastlm.commands import tokenizer

    tokenizer.run(
        paths, kind=kind, vocab_size=vocab_size, lowercase=lowercase, field=field, out=out, overwrite=overwrite
    )


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Directories that `fastlm train` wrote.")],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="The file to write: .png, .svg or .html. May be given several times. Default: runs.png."),
    ] = None,
) -> None:
    """Plot loss, learning rate, gradient norm and throughput of training runs."""
    from fastlm.commands import plot

    plot.run(runs, out=out or [Path("runs.png")])


@app.command("eval")
def evaluate(
    model: Model,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Texts, as for `fastlm train`; each file or record is one.")
    ],
    field: Field = "text",
    context: Annotated[
        int | None, typer.Option(help="Number of tokens of a window; default: the model's context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Number of tokens between two windows; default: half of the context.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the masked tokens.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score a model on texts: loss, perplexity and bits per byte, or the accuracy of masked tokens."""
    from fastlm.commands import evaluate

    evaluate.run(
        model, paths, field=field, context=context, stride=stride, seed=seed, json=json, device=device, threads=threads
    )
