"""OpenVINO, converted from PyTorch."""

from pathlib import Path

import torch
from transformers import AutoModel

from benchmarks.peers.common import BATCHES, Run, in_batches  # noqa: F401

PACKAGE = "openvino"
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
OPTIONS = "INFERENCE_NUM_THREADS, PERFORMANCE_HINT latency, INFERENCE_PRECISION_HINT {dtype}"


def load(directory: Path, threads: int, dtype: str) -> Run:
    import openvino

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    converted = openvino.convert_model(model, example_input={"input_ids": ids, "attention_mask": mask})
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def hidden_states(ids, mask):
        return torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

    return in_batches(directory, hidden_states)
