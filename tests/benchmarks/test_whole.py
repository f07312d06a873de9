import dataclasses
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlm import allocator
from fastlm.benchmarking import whole
from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.worker import Worker
from fastlm.models import bench as models
from fastlm.training import bench
from fastlm.training.bench import BASELINES, MODELS, Subject

SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 32}
GPT = Subject("GPT-2", 1, 32, 2, 50, 2, 16)
BERT = Subject("BERT", 1, 32, 2, 50, 4, 16, 0.1)
LLAMA = Subject("Llama", 1, 32, 4, 50, 2, 16, kv_heads=2, hidden=48)
WORK = {"dtype": "float32", "number_of_threads": 1, "subject": dataclasses.asdict(GPT), "tuned": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "subject, dtype",
    [(GPT, "float32"), (BERT, "bfloat16"), pytest.param(LLAMA, "float32", marks=pytest.mark.nightly)],
    ids=["GPT-2", "BERT", "Llama"],
)
def test_steps_are_compared_between_processes(subject, dtype, monkeypatch):
    peaks = {torch.float32: 1e9, torch.bfloat16: 1e8}
    monkeypatch.setattr(whole, "peak", lambda threads, kind: peaks[kind])
    monkeypatch.setattr(whole, "arithmetic", lambda threads, kind: Probe(lambda: None, peaks[kind] / 100))
    monkeypatch.setattr(whole, "best", lambda call: 0.01)
    row = whole.compare_steps(dtype, 1, subject=subject, rounds=5, recompute=2)
    assert row.recompute == 2
    assert list(row.baselines) == ["eager", "eager tuned"] and row.shape == str(subject)
    assert row.tokens == subject.batch * 16 and row.seconds > 0 and "cpu" in row.backend
    assert row.share == pytest.approx(subject.flops() / 1e9 / row.seconds)  # of the faster arithmetic, in both dtypes
    # PyTorch itself is not counted.
    assert 0 < row.bytes_held < 1 << 30 and all(0 < b.bytes < 1 << 30 for b in row.baselines.values())


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_a_worker_is_tuned_as_asked_whatever_the_user_set(tuned, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # must neither tune the untuned worker nor prevent tuning
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=100000")
    with Worker("whole.step_timer", WORK | {"library": "torch", "tuned": tuned}) as worker:
        assert worker() > 0 and worker.ask()["tuned"] == tuned
        seen = dict(
            pair.split("=", 1) for pair in open(f"/proc/{worker.process.pid}/environ").read().split("\0") if "=" in pair
        )
        assert not {*allocator.VARIABLES, "GLIBC_TUNABLES"} & set(seen)
    assert worker.process.returncode == 0


@pytest.mark.parametrize("library", ["fastlm", "torch"])
def test_a_step_recomputes_at_the_given_level(library, monkeypatch):
    trainers, create = [], bench.Trainer
    monkeypatch.setattr(
        bench, "Trainer", lambda *args, **settings: (trainers.append(create(*args, **settings)), trainers[-1])[1]
    )
    expected = []
    monkeypatch.setattr(whole, "resident_growth", lambda bytes: expected.append(bytes))
    whole.step_timer(**WORK, library=library, recompute=0)
    (trainer,) = trainers
    if library == "fastlm":
        assert trainer.model.recompute == 0 and expected == [0]  # its moments exist before
    else:
        assert expected == [8 * sum(p.numel() for p in trainer.parameters)]


@pytest.mark.parametrize("subject", [GPT, BERT, LLAMA], ids=lambda subject: subject.kind)
def test_the_memory_of_a_baseline_is_its_own(subject, monkeypatch):
    """fastlm's model, which has the same weights, is freed before: freed later, it would hide part of the step."""
    drawn, draw, alive = [], Subject.model, []

    def model(*args):
        made = draw(*args)
        drawn.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Subject, "model", model)
    monkeypatch.setattr(whole, "resident_growth", lambda bytes: alive.extend(made() for made in drawn))
    whole.step_timer(**WORK | {"library": "torch", "subject": dataclasses.asdict(subject)})
    assert alive == [None]


def test_a_worker_that_fails_is_an_error():
    work = WORK | {"library": "torch", "subject": WORK["subject"] | {"batch": 0}}
    with (
        Worker("whole.step_timer", work) as worker,
        pytest.raises(RuntimeError, match=r"step_timer .* ended with exit code 1"),
    ):
        worker()


GROWTH = """
import torch
from fastlm.benchmarking.memory import resident_growth
kept = torch.ones(4 << 20)
growth = resident_growth(8 << 20)
before = growth()
first = torch.ones(16 << 20)
del first
second = torch.ones(4 << 20)
print(growth() - before)
"""


def test_resident_growth_beyond_the_expected():
    """The peak, not the last value. In a new process: memory that other tests freed would be reused."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert 55 << 20 <= int(done.stdout) <= 75 << 20


@pytest.mark.parametrize("subject", [GPT, dataclasses.replace(BERT, dropout=0.0), LLAMA], ids=lambda each: each.kind)
def test_flops_are_those_that_pytorch_counts(subject):
    """Products with weights exactly; PyTorch counts masked scores too, and logits of every token."""
    model = subject.model()
    kind = BASELINES[subject.kind]
    plain = kind.like(model)
    inputs, targets = subject.pairs()
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    ):
        kind.loss(plain, inputs, targets).backward()
    counts = counter.get_flop_counts()["Global"]
    weights = sum(count for function, count in counts.items() if "attention" not in str(function))
    tokens, width = subject.batch * subject.context, subject.width
    head = subject.vocabulary * width + (width**2 if subject.kind == "BERT" else 0)
    unpredicted = tokens - int((targets >= 0).sum())
    keys_per_query = 16 if subject.kind == "BERT" else 17 / 2
    attention = 3.5 * 4 * tokens * keys_per_query * width
    assert subject.flops() == weights - 6 * unpredicted * head + attention
    assert unpredicted > 0 if subject.kind == "BERT" else unpredicted == 0


def test_gpt2_small_takes_three_quarters_of_a_gigaflop_per_token():
    assert MODELS["gpt2"].flops() / 1024 == pytest.approx(0.775e9, rel=2e-3)


@pytest.mark.parametrize("subject", [GPT, BERT], ids=["GPT-2", "BERT"])
def test_the_baseline_has_the_same_dropouts(subject):
    """Without dropout the losses are equal; with it, the spread of both losses is as wide."""
    inputs, targets = subject.pairs()
    for dropout in (0.0, 0.3):
        model = dataclasses.replace(subject, dropout=dropout).model().train()
        plain = BASELINES[subject.kind].like(model).train()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5)  # so that the loss depends on the layers
            plain.load_state_dict(model.state_dict())
            ours = torch.stack([subject.objective().loss(model, inputs, targets) for _ in range(100)])
            baseline = torch.stack([plain.loss(plain, inputs, targets) for _ in range(100)])
        if dropout == 0:
            torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-5)
        else:
            assert 0.5 < ours.std() / baseline.std() < 2 and ours.std() > 1e-3
            assert abs(ours.mean() - baseline.mean()) < 5 * (ours.var() / 100 + baseline.var() / 100).sqrt()


LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name, sizes", [("gpt2", SIZES), ("smollm2", LLAMA_SIZES)])
def test_generation_is_compared(name, sizes):
    row = whole.compare_generation(name, "bfloat16", 1, sizes=sizes, prompt=4, new_tokens=6, rounds=5)
    assert row.operator == "generation" and row.tokens == 6 and list(row.baselines) == ["eager"]
    assert row.bound == "memory" and 0 < row.share < 1


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_that_a_token_reads(tied):
    """Both norms of a layer and the last, its projections, and the output projection; not the embedding."""
    model = models.generator("smollm2", torch.float32, LLAMA_SIZES | {"tie_word_embeddings": tied})
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert models.bytes_per_token(model) == 4 * (layer + 32 + 50 * 32)


def test_the_baseline_generates_the_same_tokens():
    model, tokens = models.generator("smollm2", torch.float32, LLAMA_SIZES), torch.arange(5)[None]
    ours = model.generate(tokens, max_new_tokens=8, eos_token_id=())
    assert torch.equal(bench.baseline_generate("smollm2", model)(tokens, 8), ours)


def test_the_baseline_of_a_llama_has_the_same_loss():
    model = LLAMA.model().train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that the loss depends on the layers
    plain = BASELINES["Llama"].like(model).train()
    inputs, targets = LLAMA.pairs()
    ours, theirs = LLAMA.objective().loss(model, inputs, targets), BASELINES["Llama"].loss(plain, inputs, targets)
    assert abs(ours.item() - 3.9) > 0.1  # that of equal probabilities
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_model_can_be_chosen_by_name():
    assert list(MODELS) == ["gpt2", "gpt2-dropout", "bert", "smollm2", "small", "tiny"]
    assert (MODELS["bert"].batch, MODELS["bert"].context, MODELS["bert"].dropout) == (8, 128, 0.1)
