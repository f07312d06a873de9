"""What only a GPU can show: devices and streams, CUDA graphs, device asserts, no recompilation by length.

`make gpu` also runs the operator tests there. tests/backends tests devices and kinds of launches without a GPU.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlm
from fastlm.backends import registry
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.models.decoding import graphs
from fastlm.training.objectives import NextToken
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each backend with kernels for this GPU, whichever of them auto selects."""
    found = registry.load(request.param)
    if why := found.unavailable() or found.refuses(torch.device("cuda", 0), torch.float32):
        pytest.skip(f"{request.param} {', '.join(why)}")
    with fastlm.use_backend(request.param):
        yield request.param


def gpt2(dropout=0.1):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=301,
        n_positions=128,
        n_embd=128,
        n_layer=2,
        n_head=2,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).cuda().train()


def test_auto_selects_the_kernels():
    """triton is selected, or cuda by the table of the GPU if it is built."""
    before = dict(fastlm.info().fallbacks)
    tokens = torch.randint(301, (2, 128), device="cuda")
    gpt2()(tokens, labels=tokens).loss.backward()
    new = {what for what, count in fastlm.info().fallbacks.items() if count != before.get(what)}
    assert not fastlm.info().backends["triton"] and all(what.endswith("triton instead of cuda") for what in new)


def test_the_same_step_as_on_the_cpu(backend):
    tokens = torch.randint(301, (2, 128), device="cpu")
    outcomes = []
    for device, name in (("cpu", "reference"), ("cuda", backend)):
        model = gpt2(dropout=0.0).to(device)
        with fastlm.use_backend(name):
            loss = model(tokens.to(device), labels=tokens.to(device)).loss
            loss.backward()
        outcomes.append((loss.item(), [p.grad.cpu() for p in model.parameters()]))
    assert abs(outcomes[0][0] - outcomes[1][0]) < 1e-4
    for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(a.abs().max().item(), 1e-3)


@pytest.mark.parametrize(
    "adamw",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
        lambda p: fastlm.optim.AdamW(p, lr=1e-3, max_grad_norm=1.0),
    ],
    ids=["torch", "fastlm"],
)
def test_a_training_step_in_a_graph(adamw, backend):
    tokens = torch.randint(301, (2, 128), device="cuda")
    model = gpt2()
    optimizer = adamw(model.parameters())
    fastlm.warmup(model, [(2, 128)])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(set(losses)) == len(
        losses
    )  # it learns, with another dropout mask in each replay


def test_decoding_in_a_graph(backend):
    query, key, value = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 700, 700))
    expected = fastlm.attention(query, key, value, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastlm.attention(query, key, value, causal=True)
    query.mul_(2)
    graph.replay()
    assert torch.equal(out, fastlm.attention(query, key, value, causal=True)) and not torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.95}, {"temperature": 1.0, "seed": 5}], ids=str
)
def test_generating_from_graphs(settings, dtype, backend, monkeypatch):
    """Replayed steps give the same tokens as launched ones, and in float32 as steps without a mask."""
    monkeypatch.setattr(graphs, "STEPS_PER_GRAPH", 32)
    model, tokens = gpt2().to(dtype), torch.randint(301, (3, 20), device="cuda")
    mask = (torch.arange(20, device="cuda") >= torch.tensor([[0], [3], [19]], device="cuda")).long()
    own, made = graphs.capture, []
    outcomes = {}
    for way in ("in place", "captured", "step by step"):
        monkeypatch.setattr(
            graphs,
            "capture",
            lambda *given, way=way: (
                made.append(way) or (own(*given) if way == "captured" else SimpleNamespace(replay=given[0]))
            ),
        )
        torch.manual_seed(1)
        outcomes[way] = model.generate(
            tokens, 60, attention_mask=mask, eos_token_id=(), cuda_graphs=way != "step by step", **settings
        )
    assert made == ["in place"] * 3 + ["captured"] * 3 and outcomes["captured"].shape == (3, 80)
    assert torch.equal(outcomes["captured"], outcomes["in place"])
    assert dtype != torch.float32 or torch.equal(outcomes["captured"], outcomes["step by step"])


def test_generating_with_the_reference_too():
    model, tokens = gpt2(), torch.randint(301, (2, 5), device="cuda")
    with fastlm.use_backend("reference"):
        assert torch.equal(model.generate(tokens, 40), model.generate(tokens, 40, cuda_graphs=False))


def test_nothing_synchronises(backend):
    tokens = torch.randint(301, (2, 128), device="cuda")
    model = gpt2()
    model(tokens, labels=tokens).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, labels=tokens).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_the_current_stream(backend):
    """A kernel on another stream would read x too early."""
    x, w = torch.zeros(64, 256, device="cuda"), torch.ones(256, device="cuda")
    expected = fastlm.layernorm_residual(torch.arange(64 * 256, device="cuda").view(64, 256).float(), None, w)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(torch.arange(64 * 256, device="cuda").view(64, 256))
        y, _ = fastlm.layernorm_residual(x, None, w)
    stream.synchronize()
    torch.testing.assert_close(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_the_second_gpu_runs_there(backend):
    x, w = torch.randn(8, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    query = torch.randn(1, 2, 40, 64, device="cuda:1")
    for _ in range(2):  # the second launch is direct
        y, _ = fastlm.layernorm_residual(x, None, w)
        out = fastlm.attention(query, query, query)
        assert (
            y.device.index == out.device.index == 1
            and torch.cuda.current_device() == 0 == torch.empty(1, device="cuda").device.index
        )
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,), w))
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, query, query))


WRONG = {
    "a target": "linear_cross_entropy(x[:, 0], x[0, 0].expand(9, 8), torch.tensor([0, 99])",
    "a target of linear_log_prob": "linear_log_prob(x[:, 0], x[0, 0].expand(9, 8), torch.tensor([0, 99])",
    "cu_seqlens": "attention_varlen(x, x, x, torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 2, 2])",
    "a last start": "attention_varlen(x, x, x, torch.tensor([0, 2]), torch.tensor([0, 1])",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_value_out_of_range_is_a_device_assert(what, backend):
    """In a process of its own, which a device assert makes unusable."""
    call = f"fastlm.{WRONG[what]}, backend={backend!r})"
    setup = "import torch, fastlm; torch.set_default_device('cuda'); x = torch.ones(2, 1, 8)"
    code = f"{setup}; {call}; torch.cuda.synchronize()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode != 0 and "assert" in (done.stderr + done.stdout).lower()


def test_no_length_recompiles():
    from fastlm.kernels import attention

    def run(tokens):
        q = torch.randn(1, 2, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        fastlm.attention(q, q, q, causal=True).sum().backward()

    def kernels():
        caches = attention.attention_forward_kernel.device_caches
        return sum(len(cache[0]) for cache in caches.values())

    run(128)
    before = kernels()
    for tokens in (1, 2, 100, 129, 130, 144, 257):
        run(tokens)
    assert kernels() <= before + 2  # the strides of a single token are another kind


def needs_memory(gib):
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free memory")


def test_layernorm_of_more_than_4_gib():
    needs_memory(12)
    rows, width = 2**20 + 3, 2064  # offsets beyond 32 bits, of elements and of bytes
    x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16).expand(rows, width).clone()
    x[-1] = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, width, device="cuda", dtype=torch.bfloat16)
    y, _ = fastlm.layernorm_residual(x, None, weight, bias, backend="triton")
    assert x.numel() > 2**31
    assert torch.equal(y[:-1].amin(0), y[0]) and torch.equal(y[:-1].amax(0), y[0])
    for row in (0, rows - 1):
        expected = torch.nn.functional.layer_norm(x[row].float(), (width,), weight.float(), bias.float())
        torch.testing.assert_close(y[row].float(), expected, atol=2e-2, rtol=2e-2)


def test_attention_of_more_than_4_gib():
    needs_memory(24)
    batch, heads, tokens, head_dim = 2**16 + 3, 4, 130, 64
    small = torch.randn(3, 1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.expand(batch, heads, tokens, head_dim).contiguous() for x in small)
    assert q.numel() > 2**31
    out = fastlm.attention(q, k, v, causal=True, backend="triton")
    assert torch.equal(out.amin(0), out[0]) and torch.equal(out.amax(0), out[0])
    expected = torch.nn.functional.scaled_dot_product_attention(*small.float(), is_causal=True)
    torch.testing.assert_close(out[-1:].float(), expected, atol=2e-2, rtol=2e-2)


# The commands, in processes of their own, because here new tensors are on the GPU.


def succeeds(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "fastlm.cli", *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(folder, *options):
    """Trains a small model on a text for 12 steps. Returns its folder and summary.json."""
    (folder / "text.txt").write_text("for line in lines:\n    print(line, 'words')\n" * 60)
    sizes = "--layers 2 --heads 2 --width 64 --context 32 --batch 4 --steps 12 --eval-every 6 --warmup 2".split()
    out = folder / "-".join(options).replace(":", "")
    succeeds("train", "--data", folder / "text.txt", *sizes, *options, "--out", out)
    return out, json.loads((out / "summary.json").read_text())


# float32 rounds by 2^-24, which twelve steps amplify to some millionths. bfloat16 rounds by 2^-9.
@pytest.mark.parametrize(
    "objective, dtype, apart",
    [
        ("next-token", "fp32", 1e-4),
        ("masked-token", "fp32", 1e-4),
        ("next-token", "bf16", 0.05),
        ("next-token", "fp16", 0.05),
    ],
)
def test_train_takes_the_gpu_and_reaches_the_loss_of_the_cpu(tmp_path, objective, dtype, apart):
    options = ["--objective", objective, "--dtype", dtype]
    out, ours = trained(tmp_path, *options)
    _, on_cpu = trained(tmp_path, *options, "--device", "cpu")
    assert (ours["settings"]["device"], on_cpu["settings"]["device"]) == ("cuda:0", "cpu")
    for a, b in zip(ours["evaluations"], on_cpu["evaluations"], strict=True):
        assert a == pytest.approx(b, abs=apart)
    assert "probability" in succeeds("predict", "--model", out, "for[MASK]")
    if objective == "next-token":
        assert succeeds("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10).startswith("for ")


def test_the_demo_agrees_with_pytorch(tmp_path):
    assert "the losses agree" in succeeds("demo", "--out", tmp_path, "--seconds", 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_train_on_the_second_gpu(tmp_path):
    (_, first), (_, second) = trained(tmp_path), trained(tmp_path, "--device", "cuda:1")
    assert second["settings"]["device"] == "cuda:1" and second["evaluations"] == first["evaluations"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_the_trainer_does_not_synchronise(dtype):
    """Neither do the copy of the batch and the clipping."""
    trainer = Trainer(gpt2(), Settings(dtype=dtype), NextToken().loss)
    inputs, targets = NextToken().pairs(torch.randint(301, (2, 129), device="cpu"))
    for _ in range(2):
        trainer.step(inputs, targets, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.begin_step(inputs, targets, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer.read()) == 3


@pytest.mark.parametrize("kind", ["loss", "gradient", "spike"])
def test_a_skipped_step_changes_nothing(kind):
    """The decision is made on the GPU."""
    trainer = Trainer(gpt2(), Settings(), NextToken().loss)
    inputs, targets = NextToken().pairs(torch.randint(301, (2, 129), device="cpu"))
    trainer.step(inputs, targets, 1e-3)
    before = [x.clone() for x in (*trainer.parameters, *trainer.state().values())]
    p = trainer.parameters[-1]
    plain = trainer.parallel.loss_function

    def loss(*batch):
        loss = plain(*batch)
        # The gradient of a root at 0 is not finite.
        return {"loss": loss * float("inf"), "gradient": loss + (0 * p.sum()).sqrt(), "spike": loss}[kind]

    trainer.parallel.loss_function = loss
    trainer.max_loss = 0.5 if kind == "spike" else float("inf")
    trainer.begin_step(inputs, targets, 1e-3)
    (outcome,) = trainer.read()
    assert outcome.skipped
    after = (*trainer.parameters, *trainer.state().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("way", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_the_optimisers_state_moves_between_devices(way):
    start = torch.linspace(-1, 1, 24, device="cpu").view(4, 6)

    def begun(device):
        p = torch.nn.Parameter(start.to(device).clone())
        return p, fastlm.optim.AdamW([p], lr=0.1, max_grad_norm=1.0)

    def steps(p, optimizer, numbers):
        for i in numbers:
            p.grad = (start * (i + 1)).cos().to(p.device)
            optimizer.step()

    expected, whole = begun("cpu")
    steps(expected, whole, range(4))
    p, first = begun(way[0])
    steps(p, first, range(2))
    moved, second = begun(way[1])
    with torch.no_grad():
        moved.copy_(p)
    second.load_state_dict(first.state_dict())
    assert {value.device.type for value in second.state[moved].values()} == {way[1]}
    steps(moved, second, range(2, 4))
    torch.testing.assert_close(moved.cpu(), expected, rtol=1e-6, atol=1e-6)
