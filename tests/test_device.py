"""Device selection of the commands, and that they compute on the selected device.

PyTorch's meta device stands in for a GPU: its tensors have no values, and operators on tensors of both devices are
errors. Tests that need a real GPU are in kernels/test_gpu.py.
"""

import dataclasses
import json
import re
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.commands import demo, display, process, train
from fastlm.device import choose_device, seed_generator
from fastlm.models import load_model
from fastlm.training import data, loop, report
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.models import build
from fastlm.training.objectives import NextToken
from fastlm.training.settings import Settings
from fastlm.training.trainer import READ_INTERVAL, Trainer

TINY = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --steps 7 --eval-every 3 --warmup 2 --threads 1".split()
TEXT = "for line in lines:\n    print(line, 'naïve')\n" * 60


def simulate_gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_a_seeded_generator_draws_as_after_manual_seed():
    torch.manual_seed(7)
    expected = torch.randn(5)
    seed_generator(torch.device("cpu"), 7)
    assert torch.equal(torch.randn(5), expected)


@pytest.mark.parametrize(
    "name, number, expected",
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cpu", 1, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_choose_device(monkeypatch, name, number, expected):
    simulate_gpus(monkeypatch, number)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    "name, number, message",
    [
        ("gpu", 1, "device: expected auto, cpu, cuda or cuda:N, got 'gpu'; did you mean 'cuda'\\?"),
        ("cdua", 1, "device: expected auto, cpu, cuda or cuda:N, got 'cdua'; did you mean 'cuda'\\?"),
        ("cuda:", 1, "device: expected auto, cpu, cuda or cuda:N, got 'cuda:'; did you mean 'cuda'\\?"),
        (
            "cuda",
            0,
            "device: expected auto or cpu, as PyTorch .* (finds no GPU|is built without GPU support), got 'cuda'",
        ),
        ("cuda:1", 1, "device: expected cuda:0, the only GPU, got 'cuda:1'"),
        ("cuda:2", 2, "device: expected a GPU from cuda:0 to cuda:1, got 'cuda:2'"),
    ],
)
@pytest.mark.parametrize(
    "command", ["train --data text.txt", "demo", "generate --model . --prompt x", "predict --model . x"]
)
def test_missing_device_is_a_one_line_error(monkeypatch, tmp_path, command, name, number, message):
    monkeypatch.chdir(tmp_path)
    simulate_gpus(monkeypatch, number)
    result = CliRunner().invoke(app, [*command.split(), "--device", name])
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert display.describe_device(torch.device("cuda:1")) == "A100 (cuda:1)"


COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)


class MetaDevice(TorchDispatchMode):
    """Rejects operators on tensors of both devices, except 0-d CPU tensors, as CUDA does. Values read back are 1."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        operator, given = function.overloadpacket, tree_leaves((arguments, options))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.is_meta}
        if "meta" in devices:
            if operator in COPIES[:2] and torch.device("cpu") in [x for x in given if isinstance(x, torch.device)]:
                return torch.ones(tensors[0].shape, dtype=tensors[0].dtype, device="cpu")
            if operator is torch.ops.aten.copy_ and not arguments[0].is_meta:
                return arguments[0].fill_(1)
            if operator is torch.ops.aten._local_scalar_dense:
                return 1
            self.ran.add(str(operator))
            if operator is torch.ops.aten.exponential_:  # on meta, unsupported with a generator
                return arguments[0]
        assert operator in COPIES or len(devices) <= 1, f"{function} on {devices}"
        return function(*arguments, **options)


class CPUGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@pytest.fixture
def on_meta(monkeypatch):
    """All commands choose the meta device."""
    for module in (process, loop):
        monkeypatch.setattr(module, "choose_device", lambda name="auto": torch.device("meta"))
    original = torch.optim.AdamW.__init__
    # The fused implementation has no kernel for meta tensors.
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda self, *a, fused=None, **k: original(self, *a, **k))
    monkeypatch.setattr(torch, "Generator", CPUGenerator)  # there is none for meta
    with MetaDevice() as mode:
        yield mode


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("objective", ["next-token", "masked-token"])
def test_train_predict_and_generate_on_the_device(on_meta, text_file, tmp_path, objective):
    out = tmp_path / "out"
    assert "float32, meta\n" in run(
        "train", "--data", text_file, *TINY, "--dropout", 0.1, "--objective", objective, "--out", out
    )
    assert {"fastlm.attention_forward", "fastlm.linear_cross_entropy_forward", "aten._foreach_mul"} <= on_meta.ran, (
        sorted(on_meta.ran)
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["device"] == "meta" and summary["val_loss"] == 1 and summary["steps"] == 7
    assert load_model(out).device.type == "cpu"  # checkpoints do not depend on the device
    on_meta.ran.clear()
    assert "probability" in run("predict", "--model", out, "for[MASK]")
    assert "fastlm.attention_forward" in on_meta.ran
    if objective == "next-token":
        on_meta.ran.clear()
        assert run("generate", "--model", out, "--prompt", "for", "--max-new-tokens", 3).endswith("\n")
        assert "fastlm.attention_forward" in on_meta.ran
    with pytest.raises(ValueError, match=r"input_ids: expected a tensor on meta, as the model, got cpu"):
        load_model(out).to("meta")(torch.zeros(1, 4, dtype=torch.int64))


def test_demo_on_the_device(on_meta, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, layers=1, heads=2, width=32, context=64, batch=4)
    )
    monkeypatch.setattr(demo, "CORPUS_BYTES", 100_000)
    monkeypatch.setattr(demo, "PAIRS", 4)
    assert "losses agree" in run("demo", "--out", tmp_path / "out", "--seconds", 0.2)
    assert {"fastlm.attention_forward", "aten.gelu"} <= on_meta.ran  # fastlm's model and the baseline
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["device"] == "meta"


@pytest.mark.parametrize("kind, objective", [(PlainGPT2, "next-token"), (PlainBert, "masked-token")])
def test_baseline_is_on_the_same_device(text_file, kind, objective):
    corpus = data.load([text_file], masked=True)
    model = build(Settings(objective=objective, layers=1, heads=2, width=32, context=16), corpus.tokenizer)
    assert all(p.is_meta for p in kind.like(model.to("meta")).parameters())


def test_mixed_devices_are_detected():
    with MetaDevice(), pytest.raises(AssertionError, match=r"aten.add.Tensor on {'(meta', 'cpu|cpu', 'meta)'}"):
        torch.ones(3) + torch.ones(3, device="meta")


def test_warm_up_changes_no_state(on_meta, corpus):
    trainer = Trainer(build(SMALL, corpus.tokenizer).to("meta"), SMALL, NextToken().loss)
    on_meta.ran.clear()
    trainer.warm_up()
    assert {"fastlm.attention_forward", "fastlm.attention_backward"} <= on_meta.ran
    assert "aten._foreach_mul" not in on_meta.ran  # the optimiser's
    assert not trainer.pending and all(p.grad is None for p in trainer.parameters)


def test_gpu_out_of_memory_is_a_one_line_error(monkeypatch, text_file, tmp_path):
    def build(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "build", build)
    result = CliRunner().invoke(app, ["train", "--data", str(text_file), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: out of memory: reduce --batch, --context, --width, --layers or --max-tokens-per-batch\n"
    )


@pytest.fixture
def corpus(text_file):
    return data.load([text_file])


SMALL = Settings(layers=1, heads=2, width=32, context=16, batch=4, steps=12, eval_every=5)


def test_autocast_of_the_device(monkeypatch, corpus):
    trainer = Trainer(build(SMALL, corpus.tokenizer), dataclasses.replace(SMALL, dtype="bf16"), lambda *batch: None)
    for device_type in ("cpu", "cuda"):
        trainer.device = torch.device(device_type, 0)
        monkeypatch.setattr(torch, "autocast", lambda *a, **k: (a, k))
        assert trainer.autocast() == ((device_type,), {"dtype": torch.bfloat16})


def test_losses_are_read_together_on_a_gpu(monkeypatch, corpus):
    """All losses are reported, in order, and before an evaluation."""

    class RecordingReport(report.Report):
        def __init__(self):
            self.events = []

        def on_step(self, step):
            self.events.append((step.step, step.loss))

        def on_evaluation_end(self, step, train_loss, val_loss):
            self.events.append((step, train_loss, val_loss))

    each, together, reads = RecordingReport(), RecordingReport(), []
    expected = loop.train(SMALL, corpus, report=each)
    read = Trainer.read
    monkeypatch.setattr(Trainer, "read", lambda self: reads.append(len(self.pending)) or read(self))
    monkeypatch.setattr(Trainer, "should_read", False)
    result = loop.train(SMALL, corpus, report=together)
    assert reads == [5, 5, 2]
    assert together.events == each.events and result.losses == expected.losses and result.steps == 12


def test_read_interval(corpus, monkeypatch):
    trainer = Trainer(build(SMALL, corpus.tokenizer), SMALL, lambda *batch: None)
    assert trainer.should_read
    trainer.device = torch.device("cuda", 0)
    monkeypatch.setattr(time, "monotonic", lambda: trainer.last_read + 0.5 * READ_INTERVAL)
    assert not trainer.should_read
    monkeypatch.setattr(time, "monotonic", lambda: trainer.last_read + 2 * READ_INTERVAL)
    assert trainer.should_read
