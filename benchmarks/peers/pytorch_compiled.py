"""transformers on PyTorch, compiled once for batches of all sizes."""

from pathlib import Path

import torch
from transformers import AutoModel

from benchmarks.peers.common import BATCHES, Run, in_batches  # noqa: F401
from fastlm.benchmarking.compare import DTYPES

PACKAGE = "torch"
OPTIONS = "torch.compile (dynamic), SDPA, inference_mode"


def load(directory: Path, threads: int, dtype: str) -> Run:
    model = torch.compile(AutoModel.from_pretrained(directory, dtype=DTYPES[dtype]).eval(), dynamic=True)

    @torch.inference_mode()
    def hidden_states(ids, mask):
        return model(input_ids=ids, attention_mask=mask)[0]

    return in_batches(directory, hidden_states)
