"""fastlm.encode on the model through fastlm.accelerate."""

from pathlib import Path

import fastlm
from benchmarks.peers.common import Embed

PACKAGE = "fastlm"
OPTIONS = "accelerate, tune_allocator; batches of so many tokens"
BATCHES = (1024, 4096, 16384)


def load(directory: Path, threads: int) -> Embed:
    from sentence_transformers import SentenceTransformer

    fastlm.tune_allocator()
    model = fastlm.accelerate(SentenceTransformer(str(directory), device="cpu"))
    return lambda texts, batch: fastlm.encode(model, texts, normalize=True, max_tokens_per_batch=batch, progress=False)
