"""fastlm eval: how well a model predicts texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastlm.commands.display import quantity, say
from fastlm.commands.process import set_up
from fastlm.commands.targets import check_target
from fastlm.core.errors import mismatch
from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel
from fastlm.training import data
from fastlm.training.checkpoint import write_json
from fastlm.training.data.records import is_records, records
from fastlm.training.data.texts import characters
from fastlm.training.evaluation import score_causal, score_masked
from fastlm.training.settings import check_seed


def run(
    directory: Path,
    paths: list[Path],
    *,
    field: str,
    context: int | None,
    stride: int | None,
    seed: int,
    json: Path | None,
    device: str,
    threads: int | None,
) -> None:
    check_seed(seed)
    check_target("json", json)
    chosen = set_up(device, threads)
    files = data.find_files("data", paths).found
    model, tokenizer = load_model(directory).to(chosen), load_tokenizer(directory)
    if isinstance(model, LanguageModel):
        causal = score_causal(model, tokenizer.tokenizer, texts(files, field), context=context, stride=stride)
        say(f"{causal.tokens:,} tokens, {causal.bytes:,} bytes, {quantity(len(files), 'file')}")
        say(f"loss {causal.loss:.4f} nats per token")
        say(f"perplexity {causal.perplexity:.2f}")
        say(f"bits per byte {causal.bits_per_byte:.4f}")
        found = causal.as_dict()
    elif isinstance(model, EncoderForMaskedLM):
        if stride is not None:
            raise mismatch("stride", "no value for a masked-token model", stride)
        masked = score_masked(
            model, tokenizer.tokenizer, tokenizer.mask_token_id, texts(files, field), context=context, seed=seed
        )
        say(f"{masked.masked:,} of {masked.tokens:,} tokens masked, {quantity(len(files), 'file')}")
        say(f"loss {masked.loss:.4f} nats per masked token")
        say(f"masked accuracy {100 * masked.accuracy:.2f} %")
        found = masked.as_dict()
    else:
        raise mismatch("model", "a model that predicts the next or a masked token", f"a {type(model).__name__}")
    if json is not None:
        about: dict[str, Any] = {
            "model": str(directory),
            "data": [str(path) for path in paths],
            "dtype": str(model.dtype),
        }
        about |= {"context": context, "stride": stride, "seed": seed, "threads": torch.get_num_threads()}
        write_json(json, found | {"settings": about})


def texts(files: list[Path], field: str) -> Iterator[str | Iterator[str]]:
    """Every file in parts, or every record of one."""
    for file in files:
        if is_records(file):
            yield from (record.text for record in records(file, field))
        else:
            yield characters(file, "UTF-8 text")
