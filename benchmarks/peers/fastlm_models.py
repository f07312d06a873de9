"""fastlm.encode or fastlm.rerank on the model as a fastlm.models.Encoder."""

from pathlib import Path

from torch import Tensor

import fastlm
from benchmarks.peers.common import Run
from benchmarks.peers.shapes import is_reranker
from fastlm.benchmarking.compare import DTYPES
from fastlm.integrations.encoding.settings import from_directory
from fastlm.integrations.encoding.tokens import load_tokenizer

PACKAGE = "fastlm"
OPTIONS = "fastlm.models.Encoder, tune_allocator; batches of so many tokens"
BATCHES = (1024, 4096, 16384)


def load(directory: Path, threads: int, dtype: str) -> Run:
    fastlm.tune_allocator()
    model, tokenizer = fastlm.models.Encoder.from_pretrained(directory).to(DTYPES[dtype]), load_tokenizer(directory)
    options = {"tokenizer": tokenizer, "max_length": from_directory(directory)[1].max_length, "progress": False}

    def encode(texts: list[str], batch: int, query: str | None) -> Tensor:
        return fastlm.encode(model, texts, pooling="mean", normalize=True, max_tokens_per_batch=batch, **options)

    def rerank(texts: list[str], batch: int, query: str | None) -> Tensor:
        assert query is not None
        return fastlm.rerank(model, query, texts, activation="identity", max_tokens_per_batch=batch, **options)

    return rerank if is_reranker(directory) else encode
