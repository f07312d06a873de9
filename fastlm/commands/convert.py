"""fastlm convert: from GGUF to a directory in Hugging Face's format."""

from pathlib import Path

from fastlm.commands.display import quantity, say
from fastlm.commands.process import check_alone
from fastlm.models.gguf import convert_gguf
from fastlm.training import checkpoint
from fastlm.training.run import forget


def run(file: Path, *, out: Path, overwrite: bool) -> None:
    check_alone()
    out = checkpoint.prepare(out, overwrite=overwrite)
    try:
        config = convert_gguf(file, out)
    except ImportError as error:
        raise ValueError(str(error)) from None
    forget(out)
    say(f"{config.model_type}, {quantity(config.num_hidden_layers, 'layer')}; saved to {out}")
