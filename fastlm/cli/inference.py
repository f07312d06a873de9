"""The arguments of the commands that run a model."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.app import Device, Field, Model, Overwrite, Temperature, Threads, app
from fastlm.integrations.encoding.schedule import MAX_TOKENS_PER_BATCH


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
