"""CTranslate2. It pads token ids itself."""

import tempfile
from pathlib import Path

import numpy
import torch

from benchmarks.peers.common import BATCHES, Run, in_batches  # noqa: F401

PACKAGE = "ctranslate2"
OPTIONS = "compute_type {dtype}, intra_threads, inter_threads 1"


def load(directory: Path, threads: int, dtype: str) -> Run:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        converted = ctranslate2.converters.TransformersConverter(str(directory)).convert(f"{folder}/model")
        encoder = ctranslate2.Encoder(converted, "cpu", compute_type=dtype, intra_threads=threads, inter_threads=1)

    def hidden_states(ids, mask):
        texts = [row[:length].tolist() for row, length in zip(ids, mask.sum(1).tolist(), strict=True)]
        return torch.from_numpy(numpy.array(encoder.forward_batch(texts).last_hidden_state))

    return in_batches(directory, hidden_states)
