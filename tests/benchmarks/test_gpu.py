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
from fastlm.backends import choice, table
from fastlm.benchmarking.gpu import cases, plan, report, rivals, timing
from fastlm.benchmarking.gpu.generation import generation
from fastlm.benchmarking.gpu.training import training_step
from fastlm.commands import bench_gpu
from tests.support import error

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 16}
QUICK = {"rounds": 3, "least": 0}
BF16 = torch.bfloat16


def small_step(device="cpu", **options):
    return training_step(device, 2, 16, SIZES, compiled=False, **{"rounds": 2, "least": 0, **options})


def small_generation(device="cpu", batch=2, **options):
    return generation(device, batch, 6, 5, SIZES, **{"rounds": 2, "least": 0, **options})


def outcome(function, case, forward_only=False):
    """Results, then gradients where there are any; None where PyTorch's kernels refuse."""
    leaves = [x.detach().requires_grad_(case.both is not None and not forward_only) for x in case.inputs]
    try:
        results = function(*leaves)
    except RuntimeError:  # and nothing else: a mistake of the case's own is none of their refusals
        return None
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, leaves, case.upstream) if leaves[0].requires_grad else ()
    return [*(r.detach() for r in results), *gradients]


@pytest.mark.parametrize("planned", plan.SMALL, ids=str)
def test_every_case_compares_what_is_the_same(planned):
    """Ours and the rivals' results and gradients agree: else there would be nothing to compare."""
    case = planned.build("cpu")
    expected = outcome(case.ours, case)
    refused = set()
    for name, function in case.rivals.items():
        found = outcome(function, case)
        if found is None:
            refused.add(name)
            continue
        for a, b in zip(found, expected, strict=True):
            assert error(a, b.double()) < 1e-4, name
    # On a CPU PyTorch takes nested tensors only where they are contiguous, and never with a causal mask: its test follows.
    assert refused == ({"sdpa nested"} if case.operator == "attention_varlen" else set())


def test_nested_tensors():
    case = cases.attention_varlen("cpu", torch.float32, False, tokens=64, heads=2, head_dim=16)
    case.inputs = [x.contiguous() for x in case.inputs]
    for a, b in zip(outcome(case.rivals["sdpa nested"], case), outcome(case.ours, case), strict=True):
        assert error(a, b.double()) < 1e-4


@pytest.mark.parametrize("planned", plan.SMALL, ids=str)
def test_every_case_tells_what_the_call_tells(planned):
    """A rule is about the features that the choice is asked with."""
    case = planned.build("cpu")
    choice.CHOICES.clear()
    case.ours(*case.inputs)
    ((operator, _, dtype, _, features),) = choice.CHOICES
    assert (operator, dtype, features) == (case.operator, case.dtype, tuple(case.features.values()))
    assert tuple(case.features) == table.FEATURES[operator]
    assert [type(value) for value in features] == [type(value) for value in case.features.values()]


@pytest.mark.parametrize("causal", [True, False])
def test_the_compiled_rivals_mask_what_ours_masks(causal):
    """Flex attention, not compiled: forward, as it has no gradient on a CPU."""
    case = cases.attention("cpu", torch.float32, False, batch=2, heads=2, tokens=32, head_dim=16, causal=causal)
    flex = rivals.flex(rivals.causal_mask if causal else None, 32, "cpu", False)
    assert error(outcome(flex, case, True)[0], outcome(case.ours, case, True)[0].double()) < 1e-4
    case = cases.attention_varlen("cpu", torch.float32, False, tokens=64, heads=2, head_dim=16, causal=causal)
    flex = rivals.flex_varlen([16, 2, 4, 6, 8, 8, 8, 12], "cpu", causal, False)
    assert error(outcome(flex, case, True)[0], outcome(case.ours, case, True)[0].double()) < 1e-4


class Flash(types.ModuleType):
    """flash-attn's functions by its documented arguments, of PyTorch's operators: (batch, tokens, heads, head_dim), packed (tokens, heads, head_dim)."""

    def __init__(self):
        super().__init__("flash_attn")
        self.called = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self.called.append("flash_attn_func")
        return rivals.sdpa(*rivals.tokens_first(q, k, v), causal=causal).transpose(1, 2)

    def flash_attn_with_kvcache(self, q, k_cache, v_cache, k=None, v=None, causal=False):
        self.called.append("flash_attn_with_kvcache")
        return rivals.sdpa(*rivals.tokens_first(q, k_cache, v_cache), causal=causal).transpose(1, 2)

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
        return rivals.by_sequence(q, k, v, lengths, causal)

    def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        out = self.flash_attn_varlen_func(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal={(-1, 0): True, (-1, -1): False}[window_size]
        )
        self.called[-1] = "varlen_attn"
        return out


def test_what_only_a_gpu_has(monkeypatch):
    """flash-attn and PyTorch's own packed attention are called as they say."""
    flash = Flash()
    monkeypatch.setattr(rivals, "installed", lambda name: flash)
    monkeypatch.setattr(rivals, "fast", lambda device, dtype: True)
    called = set()
    for planned in plan.SMALL[:5]:
        case = planned.build("cpu")
        expected = outcome(case.ours, case)
        flash.called.clear()
        for name in {"flash-attn", "torch varlen"} & {*case.rivals}:
            for a, b in zip(outcome(case.rivals[name], case), expected, strict=True):
                assert error(a, b.double()) < 1e-4, name
        called |= {*flash.called}
        assert {"sdpa flash", "sdpa cudnn"} <= {*case.rivals} or case.operator == "attention_varlen"
    assert called == {"flash_attn_func", "flash_attn_with_kvcache", "flash_attn_varlen_func", "varlen_attn"}


def work(case):
    return case.forward.flops, case.forward.bytes, *((case.both.flops, case.both.bytes) if case.both else ())


def test_work_is_counted():
    """Two FLOPs per multiply-add of the products; bytes of what is read and written once."""
    make = lambda make, **sizes: work(make("cpu", BF16, False, **sizes))  # noqa: E731
    seen = 3 + 2 + 1  # of 3 × 3 scores
    assert make(cases.attention, batch=2, heads=4, tokens=3, head_dim=8) == (
        2 * 4 * seen * 8 * 4,
        4 * 192 * 2,
        2 * 4 * seen * 8 * 14,
        12 * 192 * 2,
    )
    assert make(cases.attention, batch=2, heads=4, tokens=3, head_dim=8, causal=False)[0] == 2 * 4 * 9 * 8 * 4
    assert make(cases.attention_decode, batch=2, heads=4, tokens=3, head_dim=8) == (
        2 * 4 * 3 * 8 * 4,
        2 * 4 * 8 * (3 + 3 + 1 + 1) * 2,
    )
    lengths = [16, 2, 4, 6, 8, 8, 8, 12] * 2
    forward, moved, both, more = make(cases.attention_varlen, tokens=64, heads=4, head_dim=8, times=2)
    assert (forward, both) == (4 * 8 * 4 * sum(n * n for n in lengths), 4 * 8 * 14 * sum(n * n for n in lengths))
    assert (moved, more) == (4 * 128 * 4 * 8 * 2, 12 * 128 * 4 * 8 * 2)
    assert make(cases.attention_varlen, tokens=64, heads=4, head_dim=8, causal=True)[0] == 4 * 8 * 4 * sum(
        n * (n + 1) // 2 for n in lengths[:8]
    )
    assert make(cases.layernorm_residual, rows=3, width=8)[1::2] == (4 * 24 * 2, 8 * 24 * 2)
    assert make(cases.gelu_mlp, rows=3, width=8) == (
        4 * 3 * 8 * 32,
        (48 + 512) * 2,
        12 * 3 * 8 * 32,
        3 * (48 + 512) * 2,
    )
    assert make(cases.linear_cross_entropy, rows=3, width=8, vocab=5) == (
        2 * 3 * 8 * 5,
        64 * 2,
        6 * 3 * 8 * 5,
        3 * 64 * 2,
    )


def test_the_plan():
    """What matters most comes first; every case is one of those that are tested here; each tells of another call."""
    everything = (*plan.FIRST, *plan.THEN)
    assert [one.make for one in plan.FIRST] == [cases.attention, cases.layernorm_residual] and {
        one.dtype for one in plan.FIRST
    } == {BF16}
    assert (
        plan.FIRST[0].sizes["tokens"] == 1024
        and plan.FIRST[0].sizes["head_dim"] == 64
        and plan.FIRST[1].sizes == {"rows": 4096, "width": 768}
    )
    assert {one.make for one in everything} == {one.make for one in plan.SMALL}
    assert len({str(one) for one in everything}) == len(everything)
    small = {
        one.sizes["rows"]
        for one in everything
        if one.make is cases.layernorm_residual and one.sizes["width"] == 768 and one.dtype == BF16
    }
    assert {8, 128, 1024} <= small
    assert (
        len({one.sizes["batch"] for one in everything if one.make is cases.attention_decode and one.dtype == BF16}) >= 3
    )
    for one in everything:  # the same names of sizes as the cases take
        assert one.make("meta", one.dtype, False, **one.sizes) if one.make is cases.layernorm_residual else True


def measured():
    run = plan.Run()
    rows = list(run.measure("cpu", plan.SMALL, **QUICK))
    assert run.failed == run.left_out == []
    return rows


def test_rows_as_files(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*measured(), *small_step()]
    on_cpu = [row for row in rows if row.served_by == "cpu"]
    both = ["forward", "forward+backward"]
    assert [row.direction for row in on_cpu] == [*both * 2, "forward", *both * 6] and {
        row.served_by for row in rows
    } <= {"cpu", "cuda", "torch", "auto"}
    assert all("torch" in row.backends and "torch" not in row.rivals and row.rivals for row in on_cpu)
    described = report.describe("cpu", timing.peaks("cpu", (torch.float32,), 64, 1 << 16))
    step = next(row for row in rows if row.operator == "training_step")
    step.peak_bytes = {"auto": 1 << 30, "eager": 2 << 30}
    text = report.markdown(rows, described, ["attention: out of memory"], ["gelu_mlp"])
    assert "auto 1.00 GiB (100%), eager 2.00 GiB (50%)" in text and text.count("| `") == len(rows)
    assert text.endswith("\nFailed:\n\n- attention: out of memory\n\nLeft out, as time ran out:\n\n- gelu_mlp\n")
    assert all((report.share(row, described["peaks"]) or 0) > 0 for row in rows if row.operator != "training_step")
    assert report.share(step, described["peaks"]) is None
    report.draw(tmp_path / "bench.png", rows, described)
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert json.dumps([described, [dataclasses.asdict(row) for row in rows]])


def test_generation_compares_what_is_the_same(monkeypatch):
    """All give the same tokens, in as many steps."""
    outcomes = []
    own = timing.in_turn

    def in_turn(calls, device, **options):
        outcomes.extend((name, call()) for name, call in calls.items())
        return own(calls, device, **options)

    monkeypatch.setattr(timing, "in_turn", in_turn)
    row, *_ = small_generation()
    names = [name for name, _ in outcomes]
    assert (
        names[0] == "auto"
        and names[-2:] == ["step by step", "eager"]
        and {*row.rivals} == {"step by step", "eager"}
        and row.auto
    )
    assert all(torch.equal(tokens, outcomes[0][1]) and tokens.shape == (2, 11) for _, tokens in outcomes)
    parameters = sum(p.numel() for p in fastlm.models.GPT2LMHeadModel(fastlm.models.GPT2Config(**SIZES)).parameters())
    assert (row.flops, row.bytes) == (2 * parameters * 2 * 11, 2 * (5 * parameters + 2 * 16 * 2 * (6 + 7 + 8 + 9 + 10)))


def test_what_auto_takes_is_marked(monkeypatch):
    """It has a row of its own even where that is PyTorch's operator."""
    for first in ("torch", "cpu"):
        monkeypatch.setattr(
            table,
            "rules",
            lambda first=first: (
                table.Rule("layernorm_residual", "float32", {"rows": (32, 32), "width": (48, 48)}, first),
            ),
        )
        rows = list(plan.Run().measure("cpu", plan.SMALL[5:6], rivals=False, **QUICK))
        assert {row.served_by for row in rows if row.auto} == {first} and not any(row.rivals for row in rows)
        assert ("torch" in {row.served_by for row in rows}) == (first == "torch")
        assert {name for row in rows if row.served_by == "cpu" for name in row.backends} >= {"torch"}


def test_time_runs_out():
    run = plan.Run(limit=1000)
    rows = run.measure("cpu", plan.SMALL, **QUICK)
    first = next(rows)
    run.limit = 0
    rest = list(rows)
    assert {row.shape for row in (first, *rest)} == {first.shape}  # what has begun comes to its end
    assert run.left_out == [str(one) for one in plan.SMALL[1:]] and not run.failed


def test_a_failure_keeps_nothing_from_being_measured(monkeypatch):
    """Of a backend that says it can serve: the others' rows are there, and what failed is named."""
    module = choice.load("cpu")

    def broken(*arguments):
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setattr(module, "layernorm_residual_forward", broken)
    run = plan.Run()
    rows = list(run.measure("cpu", plan.SMALL, **QUICK))
    assert len([row for row in rows if row.served_by == "cpu"]) == 15 and not any(
        row.served_by == "cpu" for row in rows if row.operator == "layernorm_residual"
    )
    assert run.failed[0].startswith(
        "layernorm_residual, float32, rows 32, width 48: forward by cpu: an illegal memory access was encountered; forward+backward"
    )


def test_a_rival_of_another_version_is_left_out():
    """Whatever it raises."""
    case = plan.SMALL[5].build("cpu")
    case.rivals["of old"] = lambda x: x
    rows = list(timing.compare(case, "cpu", **QUICK))
    assert rows and all({*row.rivals} == {"eager"} for row in rows)


def test_a_rival_that_is_hopeless_is_no_choice(monkeypatch):
    monkeypatch.setattr(timing, "hopeless", lambda call, ours, device: True)
    rows = list(plan.Run().measure("cpu", plan.SMALL[5:6], **QUICK))
    assert rows and not any("torch" in row.backends for row in rows)


def test_hopeless():
    calls = iter([0.01, 0.02, 3.0])
    monkey = lambda call, n: next(calls)  # noqa: E731
    original, timing.clock = timing.clock, lambda device: monkey
    try:
        assert timing.hopeless(None, [None], "cpu") is False  # 0.01 s is no minute, whoever is faster
        calls = iter([3.0, 0.1, 0.1])
        assert timing.hopeless(None, [None], "cpu") is True
        calls = iter([3.0])
        assert timing.hopeless(None, [], "cpu") is False  # with nothing else to take
    finally:
        timing.clock = original


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(plan, "FIRST", plan.SMALL[:1])
    monkeypatch.setattr(plan, "THEN", plan.SMALL[5:7])
    monkeypatch.setattr(bench_gpu, "training_step", small_step)
    monkeypatch.setattr(bench_gpu, "generation", small_generation)
    monkeypatch.setattr(bench_gpu, "peaks", lambda device, dtypes: timing.peaks(device, (torch.float32,), 64, 1 << 16))
    monkeypatch.setattr(timing, "in_turn", functools.partial(timing.in_turn, **QUICK))


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
    (found,) = json.loads(
        (tmp_path / "t.json").read_text()
    ).values()  # of the emulated CUDA kernels, where they are: no others have two to compare here
    entry = eval(f"{{{(tmp_path / 't.txt').read_text()}}}", {"Rule": table.Rule})
    assert entry == {"cpu": tuple(table.rule_of(row, "cuda") for row in found)}
    assert "`gelu_mlp`" in (tmp_path / "b.md").read_text()


def test_sigterm_keeps_what_was_measured(small_plan, monkeypatch, tmp_path, capsys):
    """As `timeout` sends it, here in the middle of a row."""
    pytest.importorskip("matplotlib")
    before = signal.getsignal(signal.SIGTERM)

    def step(device):
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


def test_what_fails_is_in_the_files_and_in_the_exit_status(small_plan, monkeypatch, tmp_path, capsys):
    def step(device):
        yield from small_step()
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bench_gpu, "training_step", step)
    with pytest.raises(bench_gpu.typer.Exit) as raised:
        bench_gpu.run(bench_gpu.Files(json=tmp_path / "b.json"), device="cpu")
    content = json.loads((tmp_path / "b.json").read_text())
    assert (
        raised.value.exit_code == 1
        and content["failed"] == ["training step: no compiler"]
        and content["rows"][-1]["operator"] == "gelu_mlp"
    )
    assert capsys.readouterr().err == "error: training step: no compiler\n"


def test_a_step_that_one_cannot_take(monkeypatch):
    """PyTorch's compiler without a C++ compiler, say."""
    monkeypatch.setattr(torch, "compile", lambda model: (_ for _ in ()).throw(RuntimeError("no compiler")))
    found = []
    with pytest.raises(RuntimeError, match="compiled: no compiler"):
        for row in training_step("cpu", 2, 16, SIZES, rounds=2, least=0):
            found.append(row)
    assert "auto" in {row.served_by for row in found} and all(set(row.rivals) == {"eager"} for row in found)
