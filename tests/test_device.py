"""Where the commands compute: which device is chosen, and that all that is computed then is on it.

No GPU is needed: PyTorch's meta device stands for one. On it nothing has a value, and a tensor that was left on the CPU does not go with one that was not.
(What only a real one shows is in kernels/test_gpu.py.)
"""

import dataclasses
import json
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.commands import demo, display, generate, predict, train
from fastlm.device import choose_device
from fastlm.models import load_model
from fastlm.training import data, loop
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.loop import Trainer
from fastlm.training.models import build
from fastlm.training.objectives import NextToken
from fastlm.training.settings import Settings

TINY = [
    "--layers",
    1,
    "--heads",
    2,
    "--width",
    32,
    "--context",
    16,
    "--batch",
    4,
    "--steps",
    7,
    "--eval-every",
    3,
    "--warmup",
    2,
    "--threads",
    1,
]
TEXT = "for line in lines:\n    print(line, 'naïve')\n" * 60


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


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
def test_the_gpu_is_chosen_where_there_is_one(monkeypatch, name, number, expected):
    gpus(monkeypatch, number)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    "name, number, message",
    [
        ("gpu", 1, "device: expected auto, cpu, cuda or one of several GPUs as cuda:1, got 'gpu'"),
        ("cuda:", 1, "device: expected auto, cpu, cuda or one of several GPUs as cuda:1, got 'cuda:'"),
        ("cuda", 0, "device: expected auto or cpu, as PyTorch .* (finds no GPU|is built for CPUs alone), got 'cuda'"),
        ("cuda:1", 1, "device: expected cuda:0, the only GPU, got 'cuda:1'"),
        ("cuda:2", 2, "device: expected a GPU from cuda:0 to cuda:1, got 'cuda:2'"),
    ],
)
@pytest.mark.parametrize(
    "command", ["train --data text.txt", "demo", "generate --model . --prompt x", "predict --model . x"]
)
def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch, tmp_path, command, name, number, message):
    monkeypatch.chdir(tmp_path)
    gpus(monkeypatch, number)
    result = CliRunner().invoke(app, [*command.split(), "--device", name])
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_the_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert display.computer(torch.device("cuda:1")) == "A100 (cuda:1)"


COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)


class Elsewhere(TorchDispatchMode):
    """Refuses operators on tensors of both devices, but for numbers (0-d), which a GPU takes from the CPU too. What is read back is 1."""

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
            if operator is torch.ops.aten._local_scalar_dense:
                return 1
            self.ran.add(str(operator))
            if operator is torch.ops.aten.exponential_:  # meta tensors have it, but not by a generator
                return arguments[0]
        assert operator in COPIES or len(devices) <= 1, f"{function} on {devices}"
        return function(*arguments, **options)


class OnTheCPU(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@pytest.fixture
def elsewhere(monkeypatch):
    """All commands choose it."""
    for command in (demo, generate, predict, train, loop):
        monkeypatch.setattr(command, "choose_device", lambda name="auto": torch.device("meta"))
    made = torch.optim.AdamW.__init__
    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", lambda self, *a, fused=None, **k: made(self, *a, **k)
    )  # which meta tensors have no kernel for
    monkeypatch.setattr(torch, "Generator", OnTheCPU)  # meta has none
    with Elsewhere() as mode:
        yield mode


def succeeds(*arguments):
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
def test_train_predict_and_generate_leave_nothing_behind(elsewhere, text_file, tmp_path, objective):
    out = tmp_path / "out"
    assert "float32, meta\n" in succeeds(
        "train", "--data", text_file, *TINY, "--dropout", 0.1, "--objective", objective, "--out", out
    )
    assert {"fastlm.attention_forward", "fastlm.linear_cross_entropy_forward", "aten._foreach_mul"} <= elsewhere.ran, (
        sorted(elsewhere.ran)
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["device"] == "meta" and summary["val_loss"] == 1 and summary["steps"] == 7
    assert load_model(out).device.type == "cpu"  # a checkpoint belongs to no device
    elsewhere.ran.clear()
    assert "probability" in succeeds("predict", "--model", out, "for[MASK]")
    assert "fastlm.attention_forward" in elsewhere.ran
    if objective == "next-token":
        elsewhere.ran.clear()
        assert succeeds("generate", "--model", out, "--prompt", "for", "--max-new-tokens", 3).endswith("\n")
        assert "fastlm.attention_forward" in elsewhere.ran
    with pytest.raises(ValueError, match=r"input_ids: expected a tensor on meta, as the model, got cpu"):
        load_model(out).to("meta")(torch.zeros(1, 4, dtype=torch.int64))


def test_demo_leaves_nothing_behind(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, layers=1, heads=2, width=32, context=64, batch=4)
    )
    monkeypatch.setattr(demo, "CORPUS_BYTES", 100_000)
    monkeypatch.setattr(demo, "PAIRS", 4)
    assert "the losses agree" in succeeds("demo", "--out", tmp_path / "out", "--seconds", 0.2)
    assert {"fastlm.attention_forward", "aten.gelu"} <= elsewhere.ran  # ours and PyTorch's
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["device"] == "meta"


@pytest.mark.parametrize("kind, objective", [(PlainGPT2, "next-token"), (PlainBert, "masked-token")])
def test_the_model_compared_with_is_where_ours_is(text_file, kind, objective):
    corpus = data.load([text_file], masked=True)
    model = build(Settings(objective=objective, layers=1, heads=2, width=32, context=16), corpus.tokenizer)
    assert all(p.is_meta for p in kind.like(model.to("meta")).parameters())


def test_a_tensor_that_is_left_behind_is_noticed():
    with Elsewhere(), pytest.raises(AssertionError, match=r"aten.add.Tensor on {'(meta', 'cpu|cpu', 'meta)'}"):
        torch.ones(3) + torch.ones(3, device="meta")


def test_warming_up_changes_nothing(elsewhere, corpus):
    trainer = Trainer(build(SMALL, corpus.tokenizer).to("meta"), SMALL, NextToken().loss)
    elsewhere.ran.clear()
    trainer.warm_up()
    assert {"fastlm.attention_forward", "fastlm.attention_backward"} <= elsewhere.ran
    assert "aten._foreach_mul" not in elsewhere.ran  # the optimiser's: see above
    assert not trainer.unread and all(p.grad is None for p in trainer.parameters)


def test_a_gpu_without_room_is_one_line(monkeypatch, text_file):
    def build(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "build", build)
    result = CliRunner().invoke(app, ["train", "--data", str(text_file)])
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: not enough memory for this model and batch: lower --batch, --context, --width or --layers\n"
    )


@pytest.fixture
def corpus(text_file):
    return data.load([text_file])


SMALL = Settings(layers=1, heads=2, width=32, context=16, batch=4, steps=12, eval_every=5)


def test_autocast_is_the_devices(monkeypatch, corpus):
    trainer = Trainer(build(SMALL, corpus.tokenizer), dataclasses.replace(SMALL, dtype="bf16"), lambda *batch: None)
    for place in ("cpu", "cuda"):
        trainer.device = torch.device(place, 0)
        monkeypatch.setattr(torch, "autocast", lambda *a, **k: (a, k))
        assert trainer.autocast() == ((place,), {"dtype": torch.bfloat16})


def test_on_a_gpu_losses_are_read_a_few_times_a_second(monkeypatch, corpus):
    """All of them, in order, and before an evaluation."""

    class Seen(loop.Report):
        def __init__(self):
            self.events = []

        def stepped(self, step, loss, tokens_per_second):
            self.events.append((step, loss))

        def evaluated(self, step, train_loss, val_loss):
            self.events.append((step, train_loss, val_loss))

    each, together, readings = Seen(), Seen(), []
    expected = loop.train(SMALL, corpus, report=each)
    read = Trainer.read
    monkeypatch.setattr(Trainer, "read", lambda self: readings.append(len(self.unread)) or read(self))
    monkeypatch.setattr(Trainer, "due", False)
    result = loop.train(SMALL, corpus, report=together)
    assert readings == [5, 5, 2]
    assert together.events == each.events and result.losses == expected.losses and result.steps == 12


def test_when_losses_are_due(corpus, monkeypatch):
    trainer = Trainer(build(SMALL, corpus.tokenizer), SMALL, lambda *batch: None)
    assert trainer.due
    trainer.device = torch.device("cuda", 0)
    monkeypatch.setattr(loop.time, "monotonic", lambda: trainer.last_read + 0.5 * loop.READ_EVERY)
    assert not trainer.due
    monkeypatch.setattr(loop.time, "monotonic", lambda: trainer.last_read + 2 * loop.READ_EVERY)
    assert trainer.due
