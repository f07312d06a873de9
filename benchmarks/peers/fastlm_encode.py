"""fastlm.encode or fastlm.rerank on the model through fastlm.accelerate."""

from pathlib import Path

import torch
from torch import Tensor

import fastlm
from benchmarks.peers.common import Run
from benchmarks.peers.shapes import is_reranker
from fastlm.benchmarking.compare import DTYPES
from fastlm.integrations.encoding.settings import from_directory

PACKAGE = "fastlm"
OPTIONS = "accelerate, tune_allocator; batches of so many tokens"
BATCHES = (1024, 4096, 16384)


def load(directory: Path, threads: int, dtype: str) -> Run:
    fastlm.tune_allocator()
    return (reranker if is_reranker(directory) else encoder)(directory, DTYPES[dtype])


def encoder(directory: Path, dtype: torch.dtype) -> Run:
    from sentence_transformers import SentenceTransformer

    model = fastlm.accelerate(SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": dtype}))

    def run(texts: list[str], batch: int, query: str | None) -> Tensor:
        return fastlm.encode(model, texts, normalize=True, max_tokens_per_batch=batch, progress=False)

    return run


def reranker(directory: Path, dtype: torch.dtype) -> Run:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
    model, tokenizer = fastlm.accelerate(model), AutoTokenizer.from_pretrained(directory)
    options = {"activation": "identity", "max_length": from_directory(directory)[1].max_length, "progress": False}

    def run(texts: list[str], batch: int, query: str | None) -> Tensor:
        assert query is not None
        return fastlm.rerank(model, query, texts, tokenizer=tokenizer, max_tokens_per_batch=batch, **options)

    return run
