"""The command info, and what all commands share."""

import contextlib
import json

import pytest
import torch

import fastlm
from fastlm.backends import isa, selection, table
from fastlm.backends.rule import Rule
from fastlm.benchmarking import report
from fastlm.benchmarking import table as measured_table
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.gpu import plan
from fastlm.benchmarking.measure import Ratio
from tests.benchmarks.test_report import DESCRIBED
from tests.commands.support import fastlm_command, run


def test_info():
    assert run("info") == f"{fastlm.info()}\n"


def test_info_measure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(report, "machine", lambda threads, dtypes: DESCRIBED)

    def measured(rows, *ratio):
        others, sizes = {"torch": Baseline(1.0, Ratio(*ratio))}, {"rows": rows}
        case = ("linear", f"{rows} × 8 → 8", "float32", 2, "forward+backward", "cpu")
        return Row(*case, 1.0, {}, backends=others, sizes=sizes)

    rows = [measured(32, 0.8, 0.7, 0.9), measured(1024, 1.2, 1.1, 1.3)]
    monkeypatch.setattr(measured_table, "measure", lambda: iter(rows))
    table.forget()
    try:
        output = run("info", "--measure")
        assert "2 threads: reads 20.0 GB/s; multiply-adds 200 GFLOP/s in float32" in output
        assert "linear 32 × 8 → 8, float32: speedup over PyTorch 0.80 [0.70–0.90]; backend: torch\n" in output
        assert output.endswith(f"{fastlm.info()}\n")
        assert table.cpu_rules() == (Rule("linear", "float32", {"rows": (None, 181)}),)
    finally:
        table.forget()
        selection.forget()


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Simulates two GPUs of one model and one of another; nothing is launched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Card", "Card", "Other"][index])
    measured = []

    @contextlib.contextmanager
    def device(index):
        measured.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    table.forget()
    yield measured
    table.forget()
    selection.forget()


def test_info_measures_each_gpu_model(two_gpus, monkeypatch):
    """Without a compiled module for the CPU, only the GPUs are measured."""

    first, then = plan.planned()

    def measure(run, device, pairs, baselines):
        assert device == "cuda" and pairs == [*first, *then] and not baselines
        run.failed.append("gelu_mlp: out of memory")
        run.left_out.append("attention")
        slower = {} if two_gpus[-1] == 2 else {"cuda": Baseline(1e-6, Ratio(0.8, 0.7, 0.9))}
        sizes = {"rows": 64, "width": 64, "dropout": False}
        case = ("layernorm_residual", "64 × 64", "bfloat16", 1, "forward", "triton")
        yield Row(*case, 2e-6, {}, backends=slower, auto=True, sizes=sizes)

    monkeypatch.setattr(plan.Run, "measure", measure)
    monkeypatch.setattr(isa, "kernels", None)
    output = run("info", "--measure")
    assert two_gpus == [0, 2]
    assert "layernorm_residual 64 × 64, bfloat16, forward, triton: 2.0 µs; cuda 0.80 [0.70–0.90]\n" in output
    assert "failed: gelu_mlp: out of memory\nskipped, out of time: attention\n" in output and "Other\n" in output
    assert list(json.loads(table.user_table().read_text())) == ["Card"]
    rule = "layernorm_residual in bfloat16 (8 ≤ rows ≤ 512, 8 ≤ width ≤ 512)"
    assert f"GPU: Card: cuda for {rule}; otherwise triton, cuda, torch, reference\n" in output
    assert "nothing to compare" in output and "GPU: Other: not measured, backend order" in output


def test_version_and_help():
    assert run("--version") == f"{fastlm.__version__}\n"
    assert all(command in run() for command in ("demo", "info", "train", "generate", "predict", "bench"))
    for command in ("demo", "info", "train", "generate", "predict", "bench"):
        assert "--help" in run(command, "--help")
    result = fastlm_command("dance")
    assert result.exit_code == 2 and result.stderr == "error: No such command 'dance'.\n"
    assert "Did you mean 'train'?" in fastlm_command("trian").stderr
