"""ONNX Runtime: exported by torch.onnx with its optimizer, then optimized by the session."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

from benchmarks.peers.common import BATCHES, Run, in_batches  # noqa: F401

PACKAGE = "onnxruntime"
NEEDS = ("onnxruntime", "onnx", "onnxscript")
OPTIONS = "torch.onnx (dynamo), graph_optimization_level all, intra_op_num_threads, sequential execution"
NAMES = ("input_ids", "attention_mask")


class Hidden(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def load(directory: Path, threads: int, dtype: str) -> Run:
    import onnxruntime

    if dtype != "float32":
        raise ValueError(f"it has no kernels in {dtype} for CPUs")

    model = Hidden(AutoModel.from_pretrained(directory, dtype=torch.float32).eval())
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    sizes = {0: "batch", 1: "tokens"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (ids, mask),
            file,
            input_names=NAMES,
            dynamic_shapes=(sizes, sizes),
            dynamo=True,
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def hidden_states(ids, mask):
        return torch.from_numpy(session.run(None, dict(zip(NAMES, (ids.numpy(), mask.numpy()), strict=True)))[0])

    return in_batches(directory, hidden_states)
