"""The `fastlm` command: the arguments of all commands and their help.

The commands are implemented in fastlm/commands/, each imported when it is called.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastlm.commands import choices, options
from fastlm.core import interrupts
from fastlm.core.errors import Ended, mismatch
from fastlm.integrations.encoding.schedule import MAX_TOKENS_PER_BATCH
from fastlm.models.layers import RECOMPUTE
from fastlm.training.config import PRESETS, resolve


class OneLineErrors(TyperGroup):
    """Reports user errors, wherever they are detected, as one line on stderr with a non-zero exit code.

    Ctrl-C exits with code 130.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.get("standalone_mode", True)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # not an error of the parser (click), in any of its versions
                if standalone:
                    leave_group(1, error)
                raise
            say_error(error.format_message())
            code = getattr(error, "exit_code", 2)
        if not standalone:
            return code
        code = code if isinstance(code, int) else 0
        leave_group(code)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        from fastlm.backends import Unsupported

        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click handles it: `fastlm bench | head` is not an error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except Ended:
            pass
        except (ValueError, OSError, Unsupported) as error:
            say_error(str(error))
        except RuntimeError as error:
            # The messages of PyTorch's allocators on a CPU and on a GPU.
            if "DefaultCPUAllocator" not in str(error) and "out of memory" not in str(error):
                raise
            say_error("out of memory: reduce --batch, --context, --width, --layers or --max-tokens-per-batch")
        raise typer.Exit(1)


def leave_group(code: int, error: Exception | None = None) -> None:
    """Ends the process if it is one of several, after it has printed the error.

    Its process group is not destroyed: gloo's destructor holds the GIL while it waits for a thread that may need it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say_error(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="auto: a GPU (NVIDIA or AMD) if PyTorch finds one, else the CPU.",
        rich_help_panel="Machine",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Number of CPU threads; default: PyTorch's.", rich_help_panel="Machine")
]
Model = Annotated[
    Path,
    typer.Option(
        help="Directory with config.json, weights and tokenizer: from `fastlm train`, or in Hugging Face's format."
    ),
]
Field = Annotated[
    str, typer.Option(help="The field of JSON lines, or the column of Parquet and Arrow, with the texts.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model in --out, if there is one.")]
Temperature = Annotated[
    float, typer.Option(help="Values below 1 sharpen the distribution, above 1 flatten it; 0: greedy decoding.")
]


@app.callback(invoke_without_command=True)
def fastlm(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Train and run transformer models faster on CPUs and GPUs.

    Start with [bold]fastlm demo[/bold]. It takes less than three minutes and downloads nothing.
    """
    if version:
        from fastlm import __version__

        print(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


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
def info(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="First measure the machine's peaks and which backend is fastest for each operator and size, and use "
            "the results from now on. Takes minutes.",
        ),
    ] = False,
) -> None:
    """Show the available backends, why the others are not available, and the CPU and GPUs."""
    from fastlm.commands import info

    info.run(measure=measure)


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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Maximum number of new tokens. Beyond the model's context, only its last tokens are read."),
    ] = 200,
    temperature: Temperature = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens with this total probability only.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of the sample; the same seed gives the same text on the same device.")
    ] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Generate a continuation of a text; prints tokens as they are generated."""
    from fastlm.commands import generate

    generate.run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        threads=threads,
    )


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A model in GGUF format.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the directory in Hugging Face's format of a model in GGUF format, in float32."""
    from fastlm.commands import convert

    convert.run(file, out=out, overwrite=overwrite)


EncoderModel = Annotated[
    Path, typer.Option(help="Directory with config.json, weights and tokenizer in Hugging Face's format.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Number of tokens to which longer texts are truncated; default: the model's.")
]
MaxTokensPerBatch = Annotated[int, typer.Option(help="Number of tokens computed at once.", rich_help_panel="Machine")]
StoredDtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Of the weights (also fp32, bf16, fp16); auto: as stored.",
        rich_help_panel="Machine",
    ),
]


@app.command()
def encode(
    files: Annotated[
        list[Path], typer.Argument(help="Texts: .jsonl, .parquet and .arrow by --field, every other file by lines.")
    ],
    model: EncoderModel,
    out: Annotated[Path, typer.Option(help="The safetensors file to write: one tensor, `embeddings`.")],
    field: Field = "text",
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="mean|cls|last|max|weightedmean|mean_sqrt_len_tokens",
            help="Default: as modules.json says, otherwise the mean, and the last token of a causal model.",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Scale embeddings to length 1; default: as modules.json says, otherwise yes.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Put before every text; default: the model's.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="The name of one of the model's prompts.")] = None,
    max_length: MaxLength = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file in --out, and discard results of another model.")
    ] = False,
    max_tokens_per_batch: MaxTokensPerBatch = MAX_TOKENS_PER_BATCH,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write the embeddings of texts, in their order.

    Ctrl-C saves what is computed and exits with code 130; the same command continues.
    """
    from fastlm.commands import encode

    encode.run(
        files,
        directory=model,
        out=out,
        field=field,
        pooling=pooling,
        normalize=normalize,
        prompt=prompt,
        prompt_name=prompt_name,
        max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch,
        dtype=dtype,
        overwrite=overwrite,
        device=device,
        threads=threads,
    )


@app.command()
def rerank(
    files: Annotated[
        list[Path], typer.Argument(help="Texts: .jsonl, .parquet and .arrow by --field, every other file by lines.")
    ],
    model: EncoderModel,
    query: Annotated[str, typer.Option(help="To which the texts are compared.")],
    field: Field = "text",
    top: Annotated[int | None, typer.Option(help="Number of texts to print; default: all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines with score, place and text.")] = False,
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokensPerBatch = MAX_TOKENS_PER_BATCH,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score texts by their relevance to a query with a cross-encoder, and print them in descending order."""
    from fastlm.commands import rerank

    rerank.run(
        files,
        directory=model,
        query=query,
        field=field,
        top=top,
        as_json=json,
        max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch,
        dtype=dtype,
        device=device,
        threads=threads,
    )


@app.command()
def predict(
    model: Model,
    text: Annotated[
        str, typer.Argument(help="The text before the next token; for a BERT, a text with \\[MASK] tokens.")
    ],
    top: Annotated[int, typer.Option(help="Number of tokens to show.")] = 10,
    temperature: Annotated[
        float, typer.Option(help="The logits are divided by it before softmax; greater than 0.")
    ] = 1.0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Show the most likely next tokens or fillings of \\[MASK], with logits and probabilities."""
    from fastlm.commands import predict

    predict.run(model, text, top=top, temperature=temperature, device=device, threads=threads)


@app.command()
def bench(
    ctx: typer.Context,
    operators: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated list of benchmarks: {choices.listed(choices.BENCHMARKS)}. "
            "growth: time by context and width; accelerated: transformers' models. "
            f"Default: {choices.listed(choices.DEFAULT_CASES)}.",
            show_default=False,  # the list would be cut off
        ),
    ] = ",".join(choices.DEFAULT_CASES),
    dtypes: Annotated[
        str, typer.Option(help="float32, bfloat16 (also fp32, bf16) or both, comma-separated.")
    ] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(help="Comma-separated list of numbers of threads.")] = "1,2",
    directions: Annotated[
        str, typer.Option(help=f"Comma-separated list of {choices.listed(choices.DIRECTIONS)}.")
    ] = ",".join(choices.DIRECTIONS),
    model: Annotated[
        str, typer.Option(help=f"For training_step: comma-separated list of {choices.listed(choices.MODELS)}.")
    ] = "gpt2",
    recompute: Annotated[
        str, typer.Option(help="For training_step: comma-separated list of recomputation levels 0, 1, 2.")
    ] = str(RECOMPUTE),
    case: Annotated[
        str,
        typer.Option(
            help=f"For accelerated: comma-separated list of {choices.listed(choices.ACCELERATED)} "
            "(encoding of sentences, passages and documents; fine-tuning of the others). Default: all of them.",
            show_default=False,  # the list would be cut off
        ),
    ] = ",".join(choices.ACCELERATED),
    checkpoint: Annotated[Path | None, typer.Option(help="For encoding: directory of a MiniLM checkpoint.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also compare with torch.compile; needs a C++ compiler and takes minutes.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            help="Seconds per row, but at least five rounds; whole steps take 20 times as long, growth 5 times."
        ),
    ] = 3.0,
    json: Annotated[Path | None, typer.Option(help="Write all measurements to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot speedups, roofline, memory and growth to this file (.png, .svg, .pdf)."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Measure nothing: read the results from a file that --json wrote, and show or plot them."
        ),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Measure the GPU instead, at other sizes; takes a few minutes. "
            "Accepts --json, --markdown, --plot, --table, --limit.",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            help="With --gpu: write the table of the fastest backends to this file, in the format of `info --measure`, "
            "and with suffix .txt as Python source."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="With --gpu: number of seconds after which no case is started. Important cases are measured first."
        ),
    ] = None,
) -> None:
    """Compare fastlm with PyTorch on this machine, at the sizes of GPT-2 small."""
    if gpu:
        from fastlm.commands import bench_gpu

        options.refuse_others(ctx, "--gpu", {"gpu", "json", "markdown", "plot", "table", "limit"})
        bench_gpu.run(bench_gpu.Files(json, markdown, plot, table), limit)
        return

    from fastlm.commands import bench

    for name, given in (("table", table), ("limit", limit)):
        if given is not None:
            raise mismatch(name, "this option together with --gpu", f"{given} without --gpu")

    files = bench.Files(json, markdown, plot)
    if source is not None:
        options.refuse_others(ctx, "--from, which measures nothing", {"source", "json", "markdown", "plot"})
        bench.show(source, files)
        return
    bench.run(
        command=shlex.join(["fastlm", *sys.argv[1:]]),
        operators=operators,
        dtypes=dtypes,
        threads=threads,
        directions_given=directions,
        models=model,
        recompute=recompute,
        accelerated_cases=case,
        checkpoint=checkpoint,
        compiled=compiled,
        seconds=seconds,
        files=files,
        given=options.given(ctx),
    )


@app.command()
def profile(
    model: Annotated[str, typer.Option(help=f"One of {choices.listed(choices.MODELS)}.")] = "gpt2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (also fp32, bf16, fp16).")] = "float32",
    recompute: Annotated[int, typer.Option(help="Recomputation level 0, 1 or 2.")] = RECOMPUTE,
    steps: Annotated[int, typer.Option(help="Number of profiled training steps, after one warm-up step.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile to this file.")] = None,
    threads: Threads = None,
) -> None:
    """Profile a training step on the CPU: time in fastlm's kernels, in PyTorch's operators and in Python."""
    from fastlm.commands import profile

    profile.run(model=model, dtype=dtype, recompute=recompute, steps=steps, threads=threads, json_file=json)


def main() -> None:
    try:
        interrupts.raise_again()
        app()
    except KeyboardInterrupt:  # outside a command
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        interrupts.ignore()


if __name__ == "__main__":
    main()
