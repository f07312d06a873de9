"""fastlm rerank: prints texts by their relevance to a query."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlm.commands import texts
from fastlm.commands.encode import dtype_of
from fastlm.commands.process import needs_transformers, set_up
from fastlm.training.settings import check_integer


def run(
    files: Sequence[Path],
    *,
    directory: Path,
    query: str,
    field: str,
    top: int | None,
    as_json: bool,
    max_length: int | None,
    max_tokens_per_batch: int,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    chosen = set_up(device, threads)
    parameters = dtype_of(dtype)
    if top is not None:
        check_integer("top", top, 1)
    read = texts.read(files, field)
    with needs_transformers():
        from fastlm.integrations.encoding import forward, pairs
    budget = forward.check_budget(max_tokens_per_batch)
    described = pairs.scorer(directory, max_length=max_length, dtype=parameters, device=chosen)
    try:
        tokenizing = described.tokenizing(query, read.texts)
        scores = forward.gather(described.run(tokenizing, budget), len(read.texts), "pair", None)
    except ValueError as error:
        raise ValueError(re.sub(r"^texts\[(\d+)\]", lambda m: read.place(int(m[1])), str(error))) from None
    assert scores is not None  # there is a text
    if tokenizing.truncated:
        print(tokenizing.truncated_in_words("pair"), file=sys.stderr)
    for i in torch.argsort(scores, descending=True, stable=True).tolist()[:top]:
        score, text = scores[i].item(), read.texts[i]
        if as_json:
            print(json.dumps({"score": score, "place": read.place(i), "text": text}, ensure_ascii=False))
        else:
            print(f"{score:.6g}\t{' '.join(text.split())}")
