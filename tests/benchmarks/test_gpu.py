"""The measurements on a GPU, on the CPU: the same code with another clock and small sizes."""

import dataclasses
import functools
import json
import os
import signal
import types

import pytest
import torch

import fastlm
from fastlm.backends import registry, selection, table
from fastlm.backends.rule import Rule
from fastlm.benchmarking import plots, report
from fastlm.benchmarking.compare import Baseline
from fastlm.benchmarking.gpu import plan, timing
from fastlm.benchmarking.gpu.models import generation, training_step
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.operators import benchmarks, work_of
from fastlm.commands import bench_gpu
from fastlm.ops.attention import baselines
from fastlm.ops.attention import bench as attention
from fastlm.ops.benchmark import Problem
from fastlm.training.bench import Subject
from tests.benchmarks.small import shrunk, small
from tests.support import check_drawn, error

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 16}
GPT = Subject("GPT-2", 1, 16, 2, 31, 2, 16)
QUICK = {"rounds": 3, "least": 0}
LENGTHS = [16, 2, 4, 6, 8, 8, 8, 12]

# Each kind of case once.
CASES = []
for case in (case for benchmark in benchmarks().values() for case in benchmark.gpu_cases):
    if (case.make, case.sizes.get("causal"), case.sizes.get("layout")) not in {
        (other.make, other.sizes.get("causal"), other.sizes.get("layout")) for other in CASES
    }:
        CASES.append(case)
SMALL = [(shrunk(case, compiled=False), "float32") for case in CASES]
(LAYERNORM,) = (pair for pair in SMALL if pair[0].name == "layernorm_residual")
(GELU_MLP, _) = (pair for pair in SMALL if pair[0].name == "gelu_mlp")


def small_step(device="cpu", **options):
    return training_step(device, GPT, **{"rounds": 2, "least": 0, **options})


def small_generation(device="cpu", batch=2, **options):
    return generation(device, batch, 6, 5, SIZES, **{"rounds": 2, "least": 0, **options})


def outcome(function, problem: Problem, gradients=True):
    """The results, then the gradients."""
    leaves = [x.detach().requires_grad_(gradients and bool(problem.upstream)) for x in problem.inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = torch.autograd.grad(results, leaves, problem.upstream) if leaves[0].requires_grad else ()
    return [*(r.detach() for r in results), *found]


def assert_same(function, problem, gradients=True):
    pairs = zip(outcome(function, problem, gradients), outcome(problem.ours, problem, gradients), strict=True)
    for found, expected in pairs:
        assert error(found, expected.double()) < 1e-4


# The baselines


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_baselines_compute_the_same(case):
    problem = small(case)
    for baseline in problem.baselines.values():
        assert_same(baseline, problem)


@pytest.mark.parametrize("causal", [True, False])
def test_padding(causal):
    problem = attention.packed(torch.float32, tokens=64, heads=2, head_dim=16, causal=causal)
    assert_same(baselines.padded(LENGTHS, causal, "cpu"), problem)


def test_nested_tensors():
    """On a CPU PyTorch supports contiguous ones without a causal mask."""
    problem = attention.packed(torch.float32, tokens=64, heads=2, head_dim=16)
    problem = dataclasses.replace(problem, inputs=[x.contiguous() for x in problem.inputs])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    assert_same(baselines.nested(LENGTHS, cu_seqlens, causal=False), problem)


@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_has_the_same_mask(causal):
    """Forward and not compiled: there is no gradient on a CPU."""
    problem = attention.dense(torch.float32, batch=2, heads=2, tokens=32, head_dim=16, causal=causal)
    flex = baselines.flex(baselines.causal_mask if causal else None, 32, "cpu", compiled=False)
    assert_same(flex, problem, gradients=False)
    problem = attention.packed(torch.float32, tokens=64, heads=2, head_dim=16, causal=causal)
    assert_same(baselines.flex_packed(LENGTHS, causal, "cpu", compiled=False), problem, gradients=False)


class Flash(types.ModuleType):
    """flash-attn's functions, and PyTorch's varlen_attn, with their documented arguments, from PyTorch's operators."""

    def __init__(self):
        super().__init__("flash_attn")
        self.called = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self.called.append("flash_attn_func")
        return baselines.sdpa(causal)(*baselines.tokens_first(q, k, v)).transpose(1, 2)

    def flash_attn_with_kvcache(self, q, k_cache, v_cache, k=None, v=None, causal=False):
        self.called.append("flash_attn_with_kvcache")
        return baselines.sdpa(causal)(*baselines.tokens_first(q, k_cache, v_cache)).transpose(1, 2)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        self.called.append("flash_attn_varlen_func")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        return baselines.by_sequence(lengths, causal)(q, k, v)

    def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        out = self.flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=causal)
        self.called[-1] = "varlen_attn"
        return out


def test_baselines_that_only_a_gpu_has(monkeypatch):
    """flash-attn and PyTorch's packed attention are called as documented."""
    flash = Flash()
    monkeypatch.setattr(baselines, "installed", lambda name: flash)
    monkeypatch.setattr(baselines, "has_16_bit_kernels", lambda device, dtype: True)
    for case, _ in SMALL:
        if case.make in (attention.dense, attention.decode, attention.packed):
            problem = case.problem(torch.float32)
            for name in {"flash-attn", "torch varlen"} & {*problem.baselines}:
                assert_same(problem.baselines[name], problem)
            assert case.make is attention.packed or {"sdpa flash", "sdpa cudnn"} <= {*problem.baselines}
    assert {*flash.called} == {
        "flash_attn_func",
        "flash_attn_with_kvcache",
        "flash_attn_varlen_func",
        "varlen_attn",
    }


def test_work_of_causal_and_decoding_attention():
    """Two FLOPs per multiply-add of the products of scores that are not masked."""
    problem = attention.dense(torch.bfloat16, batch=2, heads=4, tokens=3, head_dim=8)
    forward, both = work_of(problem, "forward"), work_of(problem, "forward+backward")
    scores = 3 + 2 + 1
    assert (forward.flops, both.flops) == (2 * 4 * scores * 8 * 4, 2 * 4 * scores * 8 * 14)
    assert (forward.bytes, both.bytes) == (4 * 192 * 2, 12 * 192 * 2)
    decode = work_of(attention.decode(torch.bfloat16, batch=2, heads=4, tokens=3, head_dim=8), "forward")
    assert (decode.flops, decode.bytes) == (2 * 4 * 3 * 8 * 4, 2 * 4 * 8 * (3 + 3 + 1 + 1) * 2)
    packed = attention.packed(torch.bfloat16, tokens=64, heads=4, head_dim=8, repeats=2, causal=True)
    pairs = 2 * sum(n * (n + 1) // 2 for n in LENGTHS)
    assert work_of(packed, "forward").flops == pytest.approx(4 * 8 * 4 * pairs)


# The plan


def test_the_plan():
    """The most important cases come first, and no case twice."""
    first, then = plan.planned()
    assert {(case.name, dtype) for case, dtype in first} == {
        ("attention", "bfloat16"),
        ("layernorm_residual", "bfloat16"),
    }
    everything = [(str(case), dtype) for case, dtype in (*first, *then)]
    assert len({*everything}) == len(everything)
    priorities = [case.priority for case, _ in (*first, *then)]
    assert priorities == sorted(priorities)
    # Few rows and many, few sequences and many, as the axes of the selection table need.
    rows = {case.sizes["rows"] for case, _ in then if case.name == "layernorm_residual" and case.priority == 1}
    batches = {case.sizes["batch"] for case, _ in then if case.name == "attention_decode"}
    assert {8, 128, 1024} <= rows and len(batches) >= 3


TOO_SLOW = timing.too_slow


@pytest.fixture(autouse=True)
def no_operator_is_too_slow(monkeypatch):
    """On a busy machine one may look so."""
    monkeypatch.setattr(timing, "too_slow", lambda call, ours, device: False)


def measured(pairs=SMALL, **options):
    run = plan.Run()
    rows = list(run.measure("cpu", pairs, **QUICK, **options))
    assert run.failed == run.left_out == []
    return rows


def test_rows_as_files(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*measured(), *small_step()]
    on_cpu = [row for row in rows if row.backend == "cpu" and row.operator != "training_step"]
    expected = [d for case, _ in SMALL for d in case.directions if d != "backward"]
    assert [row.direction for row in on_cpu] == expected
    assert {row.backend for row in rows} <= {"cpu", "torch", "auto"}
    assert all("torch" in row.backends and "torch" not in row.baselines and row.baselines for row in on_cpu)
    for row in on_cpu:
        assert tuple(row.sizes) == registry.operators()[row.operator].size_names
    described = report.gpu("cpu", timing.peaks("cpu", (torch.float32,), 64, 1 << 16))
    step = next(row for row in rows if row.operator == "training_step")
    eager = Baseline(1e-3, Ratio(1.0, 0.9, 1.1), 2 << 30)
    rows[rows.index(step)] = step = dataclasses.replace(step, bytes_held=1 << 30, baselines={"eager": eager})
    text = report.gpu_markdown(rows, described, ["attention: out of memory"], ["gelu_mlp"])
    assert "auto 1.00 GiB (100%), eager 2.00 GiB (50%)" in text and text.count("| `") == len(rows)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert text.endswith("\nFailed:\n\n- attention: out of memory\n\nLeft out, as the time ran out:\n\n- gelu_mlp\n")
    assert all((report.gpu_share(row, described["peaks"]) or 0) > 0 for row in rows if row.operator != "training_step")
    assert report.gpu_share(step, described["peaks"]) is None
    plots.draw(tmp_path / "bench.png", plots.figure_of_gpu(rows, described))
    check_drawn(tmp_path / "bench.png")
    assert json.dumps([described, [row.as_dict() for row in rows]])


def test_all_generations_give_the_same_tokens(monkeypatch):
    outcomes = []
    interleaved_calls = timing.interleaved_calls

    def spy(calls, device, **options):
        outcomes.extend((name, call()) for name, call in calls.items())
        return interleaved_calls(calls, device, **options)

    monkeypatch.setattr(timing, "interleaved_calls", spy)
    row, *_ = small_generation()
    names = [name for name, _ in outcomes]
    assert names[0] == "auto" and names[-2:] == ["step by step", "eager"]
    assert {*row.baselines} == {"step by step", "eager"} and row.auto
    assert all(torch.equal(tokens, outcomes[0][1]) and tokens.shape == (2, 11) for _, tokens in outcomes)
    parameters = sum(p.numel() for p in fastlm.models.GPT2LMHeadModel(fastlm.models.GPT2Config(**SIZES)).parameters())
    assert (row.work.flops, row.work.bytes) == (
        2 * parameters * 2 * 11,
        2 * (5 * parameters + 2 * 16 * 2 * (6 + 7 + 8 + 9 + 10)),
    )


@pytest.mark.parametrize("first", ["torch", "cpu"])
def test_the_automatic_selection_is_marked(first, monkeypatch):
    """It has a row of its own, even if it is PyTorch's operator."""
    rule = Rule("layernorm_residual", "float32", {"rows": (48, 48), "width": (64, 64)}, first)
    monkeypatch.setattr(table, "cpu_rules", lambda: (rule,))
    rows = measured([LAYERNORM], baselines=False)
    assert {row.backend for row in rows if row.auto} == {first} and not any(row.baselines for row in rows)
    assert ("torch" in {row.backend for row in rows}) == (first == "torch")
    assert {name for row in rows if row.backend == "cpu" for name in row.backends} >= {"torch"}


def test_the_time_limit():
    run = plan.Run(limit=1000)
    rows = run.measure("cpu", SMALL, **QUICK)
    first = next(rows)
    run.limit = 0
    rest = list(rows)
    assert {row.shape for row in (first, *rest)} == {first.shape}  # what has started is finished
    assert run.left_out == [f"{case}, {dtype}" for case, dtype in SMALL[1:]] and not run.failed


def test_a_failure_does_not_stop_the_measurements(monkeypatch):
    """The rows of other backends are there, and the failure is reported."""
    implementation_of = registry.Registered.implementation

    def fails(call):
        raise RuntimeError("an illegal memory access\nwas encountered")

    def implementation(operator, backend):
        found = implementation_of(operator, backend)
        return dataclasses.replace(found, forward=fails) if backend == "cpu" else found

    monkeypatch.setattr(registry.Registered, "implementation", implementation)
    selection.forget()
    run = plan.Run()
    rows = list(run.measure("cpu", [LAYERNORM], **QUICK))
    selection.forget()
    assert not any(row.backend == "cpu" for row in rows)
    assert "forward by cpu: an illegal memory access was encountered; forward+backward" in run.failed[0]
    assert run.failed[0].startswith("layernorm_residual, ")


def test_a_baseline_that_fails_is_left_out():
    case, _ = LAYERNORM

    def make(*arguments, **sizes):
        problem = case.make(*arguments, **sizes)
        return dataclasses.replace(problem, baselines={**problem.baselines, "old": lambda x: x})

    rows = list(timing.compare(dataclasses.replace(case, make=make), torch.float32, "cpu", **QUICK))
    assert rows and all({*row.baselines} == {"eager"} for row in rows)


def test_an_operator_of_pytorch_that_is_too_slow_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "too_slow", lambda call, ours, device: True)
    rows = measured([LAYERNORM])
    assert rows and not any("torch" in row.backends for row in rows)


@pytest.mark.parametrize("seconds, expected", [([0.01, 0.01, 0.02], False), ([0.1, 0.1, 3.0], True), ([3.0], False)])
def test_too_slow(seconds, expected, monkeypatch):
    """The last is PyTorch's. Milliseconds are never too slow, and without kernels there is nothing else to select."""
    times = iter(seconds)
    monkeypatch.setattr(timing, "timer_of", lambda call, device: lambda n: next(times))
    assert TOO_SLOW(None, [None] if len(seconds) > 1 else [], "cpu") is expected


# The command


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(plan, "planned", lambda: (SMALL[:1], [LAYERNORM, GELU_MLP]))
    monkeypatch.setattr(
        bench_gpu, "training_step", lambda device, compiled=False: iter(() if compiled else small_step())
    )
    monkeypatch.setattr(bench_gpu, "generation", small_generation)
    monkeypatch.setattr(bench_gpu, "peaks", lambda device, dtypes: timing.peaks(device, (torch.float32,), 64, 1 << 16))
    monkeypatch.setattr(timing, "interleaved_calls", functools.partial(timing.interleaved_calls, **QUICK))


def all_files(folder):
    return bench_gpu.Files(folder / "b.json", folder / "b.md", folder / "b.png", folder / "t.json")


def test_the_command_writes_its_files(small_plan, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bench_gpu.run(all_files(tmp_path), limit=600, device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.json", "b.md", "b.png", "t.json", "t.txt"]
    content = json.loads((tmp_path / "b.json").read_text())
    assert list(dict.fromkeys(row["operator"] for row in content["rows"])) == [
        "attention",
        "training_step",
        "generation",
        "layernorm_residual",
        "gelu_mlp",
    ]
    assert content["failed"] == content["left_out"] == [] and not content["stopped"]
    # Rules of the emulated CUDA kernels, where they are: without them there are no two backends to compare here.
    (found,) = json.loads((tmp_path / "t.json").read_text()).values()
    entry = eval(f"{{{(tmp_path / 't.txt').read_text()}}}", {"Rule": Rule})
    assert entry == {"cpu": tuple(table.parse_rule(row, "cuda") for row in found)}
    assert "`gelu_mlp`" in (tmp_path / "b.md").read_text()


def test_sigterm_keeps_what_was_measured(small_plan, monkeypatch, tmp_path, capsys):
    """As `timeout` sends it, here in the middle of a row."""
    pytest.importorskip("matplotlib")
    before = signal.getsignal(signal.SIGTERM)

    def step(device, compiled=False):
        yield from small_step()
        os.kill(os.getpid(), signal.SIGTERM)
        yield from small_step()

    monkeypatch.setattr(bench_gpu, "training_step", step)
    with pytest.raises(bench_gpu.typer.Exit) as raised:
        bench_gpu.run(all_files(tmp_path), device="cpu")
    assert raised.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["stopped"] and {row["operator"] for row in content["rows"]} == {"attention", "training_step"}
    assert (tmp_path / "b.png").exists() and f"the {len(content['rows'])} rows" in capsys.readouterr().err


def test_a_failure_is_in_the_files_and_the_exit_status(small_plan, monkeypatch, tmp_path, capsys):
    def step(device, compiled=False):
        if not compiled:
            yield from small_step()
            raise RuntimeError("no compiler")

    monkeypatch.setattr(bench_gpu, "training_step", step)
    with pytest.raises(bench_gpu.typer.Exit) as raised:
        bench_gpu.run(bench_gpu.Files(json=tmp_path / "b.json"), device="cpu")
    content = json.loads((tmp_path / "b.json").read_text())
    assert raised.value.exit_code == 1
    assert content["failed"] == ["training step: no compiler"] and content["rows"][-1]["operator"] == "gelu_mlp"
    assert capsys.readouterr().err == "error: training step: no compiler\n"


def test_a_step_that_fails_leaves_the_others(monkeypatch):
    """Such as PyTorch's compiler without a C++ compiler."""

    def no_compiler(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = []
    with pytest.raises(RuntimeError, match="compiled: no compiler"):
        for row in training_step("cpu", GPT, compiled=True, rounds=2, least=0):
            found.append(row)
    assert "auto" in {row.backend for row in found} and not any(row.baselines for row in found)


def test_compiled_baselines_come_last_and_join_their_rows(small_plan, monkeypatch, tmp_path, capsys):
    """Compiling takes minutes: everything else is measured by then."""
    order = []

    def compile(function, **options):
        if isinstance(function, torch.nn.Module):
            function.register_forward_pre_hook(lambda *_: order.append("compiled"))
            return function
        return lambda *inputs: order.append("compiled") or function(*inputs)

    def say(line):
        order.append(line.split(" ")[0])

    def step(device, compiled=False):
        return small_step(compiled=compiled)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(bench_gpu, "say", say)
    monkeypatch.setattr(bench_gpu, "training_step", step)
    case = dataclasses.replace(LAYERNORM[0], compiled=True)
    monkeypatch.setattr(plan, "planned", lambda: (SMALL[:1], [(case, "float32"), GELU_MLP]))
    bench_gpu.run(bench_gpu.Files(json=tmp_path / "b.json"), device="cpu")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert order.index("gelu_mlp") < order.index("compiled")
    for row in rows:
        expected = {"layernorm_residual": True, "training_step": True}.get(row["operator"], False)
        assert ("compiled" in row["baselines"]) == expected and len(row["baselines"]) > expected
    keys = [(row["operator"], row["shape"], row["direction"], row["backend"]) for row in rows]
    assert len(keys) == len({*keys})


def test_calls_rotate_through_copies_of_their_operands():
    """Together more than the cache holds, with the layout that they had."""
    whole = torch.arange(60.0).view(4, 15)
    seen = []

    def ours(*inputs, backend=None):
        seen.append([x.data_ptr() for x in inputs])
        assert [x.stride() for x in inputs] == [(15, 1), (15, 1), (1, 3)]
        assert inputs[1].data_ptr() - inputs[0].data_ptr() == 5 * 4 and torch.equal(inputs[0], whole[:, :5])
        return inputs[0] * 2

    inputs = [whole[:, :5], whole[:, 5:10], torch.ones(2, 3).t()]
    problem = Problem("", ours, {}, inputs, [torch.ones(4, 5)])
    size = 60 * 4 + 6 * 4 + 20 * 4
    assert [len(timing.copies(problem, cache)) for cache in (0, size // 2, size, 10**9)] == [1, 1, 2, 64]
    call = timing.rotating(timing.copies(problem, size), ours, "forward")
    for _ in range(4):
        call()
    assert seen[0] == seen[2] and seen[1] == seen[3] and not {*seen[0]} & {*seen[1]}
