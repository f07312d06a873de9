"""The `fastlm` command. Here are the arguments and their help; each command's work is in fastlm/commands/, loaded when it is called."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastlm.training.settings import Settings

DEFAULT = Settings()


class OneLineErrors(TyperGroup):
    """What a user did wrong is one line on stderr and a non-zero exit code, whether the parser, a check of ours or the system noticed it; Ctrl-C is 130."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.get("standalone_mode", True)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # of the parser, whichever version of click it stands on
                raise
            say_error(error.format_message())
            code = getattr(error, "exit_code", 2)
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        from fastlm.backends import Unsupported

        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the parser's own affair: `fastlm bench | head` is not an error of the user's
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except (ValueError, OSError, Unsupported) as error:
            say_error(str(error))
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error) and "out of memory" not in str(error):  # the latter a GPU's
                raise
            say_error("not enough memory for this model and batch: lower --batch, --context, --width or --layers")
        raise typer.Exit(1)


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
        help="auto: the GPU (NVIDIA's or AMD's) where PyTorch finds one, else the CPU.",
        rich_help_panel="Machine",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; PyTorch's own number when not given.", rich_help_panel="Machine")
]
Model = Annotated[
    Path,
    typer.Option(
        help="A folder with config.json, the weights and the tokenizer: what `fastlm train` writes, or Hugging Face's."
    ),
]
Temperature = Annotated[
    float, typer.Option(help="Below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest token.")
]


@app.callback(invoke_without_command=True)
def fastlm(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """GPT-2 and BERT, trained and run faster on the machine you have.

    Start with [bold]fastlm demo[/bold]: it downloads nothing and takes under three minutes.
    """
    if version:
        from fastlm import __version__

        print(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the loss curve and summary.json.")] = Path(
        "runs/demo"
    ),
    seconds: Annotated[
        float, typer.Option(help="How long to train; comparing and sampling come on top, about half a minute.")
    ] = 100.0,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the sample.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a small GPT on the Python standard library's source, beside the same model of plain PyTorch operators, and let it write."""
    from fastlm.commands import demo

    demo.run(out=out, seconds=seconds, seed=seed, device=device, threads=threads)


@app.command()
def info(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure first what the machine can do and which backend is the fastest where, on a GPU too, to let it serve there from now on; minutes.",
        ),
    ] = False,
) -> None:
    """What is built, what this machine can use, and why the rest is not used."""
    from fastlm.commands import info

    info.run(measure=measure)


@app.command()
def train(
    data: Annotated[
        list[Path], typer.Option(metavar="PATH…", help="Files, folders or patterns; read in this order as one text.")
    ],
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="More of --data, as a shell expands a pattern.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the tokenizer and summary.json.")] = Path(
        "runs/train"
    ),
    tokenizer: Annotated[
        str, typer.Option(metavar="byte|char", help="byte: 256 tokens, any file; char: the characters of a UTF-8 text.")
    ] = "byte",
    objective: Annotated[
        str, typer.Option(metavar="next-token|masked-token", help="next-token trains a GPT-2, masked-token a BERT.")
    ] = DEFAULT.objective,
    val_fraction: Annotated[
        float, typer.Option(help="The share of the text, at its end, that is kept for validation.")
    ] = 0.1,
    val_file: Annotated[
        Path | None, typer.Option(help="A text of its own for validation, in place of --val-fraction.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = DEFAULT.eval_every,
    layers: Annotated[int, typer.Option(help="Transformer layers.", rich_help_panel="Model")] = DEFAULT.layers,
    heads: Annotated[int, typer.Option(help="Attention heads per layer.", rich_help_panel="Model")] = DEFAULT.heads,
    width: Annotated[
        int, typer.Option(help="Numbers per token; a multiple of --heads.", rich_help_panel="Model")
    ] = DEFAULT.width,
    context: Annotated[
        int, typer.Option(help="Tokens that the model sees at most.", rich_help_panel="Model")
    ] = DEFAULT.context,
    dropout: Annotated[
        float, typer.Option(help="Probability that training drops a value, in [0, 1).", rich_help_panel="Model")
    ] = DEFAULT.dropout,
    batch: Annotated[
        int, typer.Option(help="Sequences of one context per step.", rich_help_panel="Optimiser")
    ] = DEFAULT.batch,
    steps: Annotated[int, typer.Option(help="Updates of the weights.", rich_help_panel="Optimiser")] = DEFAULT.steps,
    lr: Annotated[
        float, typer.Option(help="The highest learning rate, reached after --warmup.", rich_help_panel="Optimiser")
    ] = DEFAULT.lr,
    min_lr: Annotated[
        float, typer.Option(help="The learning rate from --decay-steps on.", rich_help_panel="Optimiser")
    ] = DEFAULT.min_lr,
    warmup: Annotated[
        int, typer.Option(help="Steps in which the rate rises.", rich_help_panel="Optimiser")
    ] = DEFAULT.warmup,
    decay_steps: Annotated[
        int | None,
        typer.Option(
            help="Step at which the cosine reaches --min-lr; without it the last.", rich_help_panel="Optimiser"
        ),
    ] = None,
    beta1: Annotated[
        float, typer.Option(help="AdamW's mean of gradients.", rich_help_panel="Optimiser")
    ] = DEFAULT.beta1,
    beta2: Annotated[
        float, typer.Option(help="AdamW's mean of squared gradients.", rich_help_panel="Optimiser")
    ] = DEFAULT.beta2,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's, of matrices only.", rich_help_panel="Optimiser")
    ] = DEFAULT.weight_decay,
    grad_clip: Annotated[
        float, typer.Option(help="Largest norm of all gradients together; 0: unlimited.", rich_help_panel="Optimiser")
    ] = DEFAULT.grad_clip,
    seed: Annotated[
        int, typer.Option(help="Of the weights, the batches and dropout.", rich_help_panel="Optimiser")
    ] = DEFAULT.seed,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16",
            help="bf16: bfloat16 activations and products, float32 weights, sums and optimiser.",
            rich_help_panel="Machine",
        ),
    ] = DEFAULT.dtype,
    recompute: Annotated[
        int,
        typer.Option(
            metavar="0|1|2",
            help="What backward computes again, not keeps: 1 the GELU, 2 the product before it too.",
            rich_help_panel="Machine",
        ),
    ] = DEFAULT.recompute,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a model from scratch on text.

    Ctrl-C ends the training and saves what was learnt; the exit code is then 130.
    """
    from fastlm.commands import train

    settings = Settings(
        objective=objective,
        layers=layers,
        heads=heads,
        width=width,
        context=context,
        batch=batch,
        steps=steps,
        lr=lr,
        min_lr=min_lr,
        warmup=warmup,
        decay_steps=decay_steps,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        dropout=dropout,
        seed=seed,
        dtype=dtype,
        eval_every=eval_every,
        recompute=recompute,
    )
    train.run(
        [*data, *(more or [])],
        settings,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        val_file=val_file,
        out=out,
        device=device,
        threads=threads,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write at most; without it up to 200, as far as the context has room.")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens that together have this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text on the same device.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Continue a text, token by token as it is written."""
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
def predict(
    model: Model,
    text: Annotated[str, typer.Argument(help="What comes before; or, for a BERT, a text with \\[MASK] in it.")],
    top: Annotated[int, typer.Option(help="How many tokens to show.")] = 10,
    temperature: Annotated[float, typer.Option(help="Divides the scores before softmax; above 0.")] = 1.0,
    device: Device = "auto",
) -> None:
    """Show the likeliest next tokens, or the likeliest fillings of \\[MASK], with their scores and probabilities."""
    from fastlm.commands import predict

    predict.run(model, text, top=top, temperature=temperature, device=device)


@app.command()
def bench(
    operators: Annotated[
        str,
        typer.Option(
            help="Some of attention, attention_varlen, layernorm_residual, gelu_mlp, linear, linear_cross_entropy, "
            "attention_512_tokens, attention_2048_tokens, attention_dropout, layernorm_residual_16384_rows, linear_1_row, linear_4_rows, "
            "linear_16_rows, linear_64_rows, adamw, training_step, growth (with context and width), generation, accelerated; commas between."
        ),
    ] = "attention,attention_varlen,layernorm_residual,gelu_mlp,linear,linear_cross_entropy",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16 or both, a comma between.")] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(help="Numbers of threads, commas between.")] = "1,2",
    directions: Annotated[
        str, typer.Option(help="Some of forward, backward, forward+backward; commas between.")
    ] = "forward,backward,forward+backward",
    model: Annotated[
        str, typer.Option(help="Of training_step: some of gpt2, gpt2-dropout, bert, small, tiny; commas between.")
    ] = "gpt2",
    recompute: Annotated[
        str, typer.Option(help="Of training_step: levels 0, 1, 2 of the model's recomputation; commas between.")
    ] = str(DEFAULT.recompute),
    case: Annotated[
        str,
        typer.Option(
            help="Of accelerated (transformers' models): some of encoding (sentences), bert, gpt2 (fine-tuning); commas between."
        ),
    ] = "encoding,bert,gpt2",
    checkpoint: Annotated[Path | None, typer.Option(help="Of encoding: the folder of a MiniLM checkpoint.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also against torch.compile: needs a C++ compiler, and minutes.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            help="For each row, at least five rounds; whole steps take twenty times as long, those of growth five."
        ),
    ] = 3.0,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured into this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table into this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw throughput, roofline, memory and growth into this file (.png, .svg, .pdf)."),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="On the GPU instead, with its own sizes; a few minutes. Takes --json, --markdown, --plot, --table, --limit.",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            help="With --gpu: write who comes first for what into this file, as `info --measure` keeps it, and as source beside it (.txt)."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="With --gpu: seconds after which no case is begun; the most important ones come first."),
    ] = None,
) -> None:
    """Compare with PyTorch on this machine, at the sizes of GPT-2 small."""
    if gpu:
        from fastlm.commands import bench_gpu

        bench_gpu.run(bench_gpu.Files(json, markdown, plot, table), limit)
        return

    from fastlm.commands import bench
    from fastlm.ops.boundary import mismatch

    for name, given in (("table", table), ("limit", limit)):
        if given is not None:
            raise mismatch(name, "--gpu with it", f"{given} for the CPU")

    bench.run(
        operators=operators,
        dtypes=dtypes,
        threads=threads,
        ways=directions,
        models=model,
        recompute=recompute,
        accelerated_cases=case,
        checkpoint=checkpoint,
        compiled=compiled,
        seconds=seconds,
        json_file=json,
        markdown_file=markdown,
        plot_file=plot,
    )


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="One of gpt2, gpt2-dropout, bert, small, tiny.")] = "gpt2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; fp32 and bf16 for short.")] = "float32",
    recompute: Annotated[int, typer.Option(help="Level 0, 1 or 2 of the model's recomputation.")] = DEFAULT.recompute,
    steps: Annotated[int, typer.Option(help="Training steps to look at, after one that warms up.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile into this file.")] = None,
    threads: Threads = None,
) -> None:
    """Show where a training step on the CPU spends its time: in fastlm's kernels, in PyTorch's operators, in Python."""
    from fastlm.commands import profile

    profile.run(model=model, dtype=dtype, recompute=recompute, steps=steps, threads=threads, json_file=json)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
