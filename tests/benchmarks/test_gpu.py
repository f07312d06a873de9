"""The measurements on a GPU, on the CPU: the same code with another clock and small sizes."""

import json

import pytest
import torch

from fastlm.benchmarking import gpu
from tests.support import error

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 16}


def test_every_case_compares_what_is_the_same():
    """Ours and the rival's results and gradients agree: else there would be nothing to compare."""
    torch.manual_seed(0)
    names = []
    for name, _, functions, inputs, upstream, forward, both in gpu.operator_cases("cpu", torch.float32, small=True):
        names.append(name)
        outcomes = []
        for function in functions.values():
            leaves = [x.detach().requires_grad_() for x in inputs]
            results = function(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            outcomes.append([*(r.detach() for r in results), *torch.autograd.grad(results, leaves, upstream)])
        for those in outcomes[:-1]:
            for a, b in zip(those, outcomes[-1], strict=True):
                assert error(a, b.double()) < 1e-4
        assert both.flops > forward.flops > 0 and both.bytes > forward.bytes > 0
    assert names == ["attention", "layernorm_residual", "gelu_mlp", "linear_cross_entropy"]


def test_rows_as_files(tmp_path):
    pytest.importorskip("matplotlib")
    rows = list(gpu.operators("cpu", (torch.float32,), small=True, rounds=3, least=0))
    rows += gpu.training_step("cpu", 2, 16, SIZES, compiled=False, rounds=2, least=0)
    on_cuda = [row.direction for row in rows if row.served_by == "cuda"]  # in the emulator: a row for each of auto's
    directions = ["forward", "forward+backward"] * 4 + ["step"]
    assert [row.direction for row in rows if row.served_by != "cuda"] == directions and on_cuda in ([], directions)
    described = gpu.describe("cpu", gpu.peaks("cpu", (torch.float32,), 64, 1 << 16))
    step = next(row for row in rows if row.operator == "training_step")
    step.peak_bytes = {"fastlm": 1 << 30, "eager": 2 << 30}
    text = gpu.markdown(rows, described)
    assert "fastlm 1.00 GiB (100%), eager 2.00 GiB (50%)" in text and text.count("| `") == len(rows)
    assert all(0 < gpu.share(row, described["peaks"]) for row in rows if row.operator != "training_step") and gpu.share(step, described["peaks"]) is None
    gpu.draw(tmp_path / "bench.png", rows, described)
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert json.dumps(described)
