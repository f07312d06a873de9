"""What all commands share: the application, how it reports errors, and options of several commands."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastlm.core.errors import Ended


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
