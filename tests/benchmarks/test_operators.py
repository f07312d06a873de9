"""The cases of the operators: the baselines compute the same, FLOPs and bytes are counted once, backends are found."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.benchmarking import accuracy, compare, machine, memory
from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.operators import backends_of, benchmarks, cases, parts, results, selection_inputs, work_of
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.ops.adamw import bench as adamw
from fastlm.ops.attention.bench import uneven
from fastlm.ops.benchmark import DIRECTIONS
from tests.benchmarks.small import small

CASES = cases()


def test_every_operator_has_cases_with_distinct_names():
    names = [case.name for benchmark in benchmarks().values() for case in benchmark.cases]
    assert len(names) == len(set(names)) == len(CASES)
    assert {"adamw", "attention", "gelu_mlp", "glu_mlp", "layernorm_residual", "linear"} <= {*CASES}
    assert {"linear_cross_entropy", "rms_norm_residual", "rms_norm_heads", "rotary"} <= {*CASES}
    assert all(benchmark.axes for benchmark in benchmarks().values() if benchmark.table_cases)
    assert all(benchmark.gpu_axes for benchmark in benchmarks().values() if benchmark.gpu_cases)


OTHERS = {"adamw", "attention_dropout", "layernorm_residual_16384_rows", "rms_norm_residual_16384_rows"}


# adamw has a test of its own; the others are random, or sums of more terms
@pytest.mark.parametrize("name", sorted({*CASES} - OTHERS))
def test_the_baselines_compute_the_same(name):
    problem = small(CASES[name])
    for baseline in problem.baselines.values():
        for ours, other in zip(results(problem, problem.ours), results(problem, baseline), strict=True):
            # float32: the same sums of up to 256 terms of size 1 in another order
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_the_baseline_drops_as_often():
    problem, whole = small(CASES["attention_dropout"]), small(CASES["attention_512_tokens"])
    expected = whole.ours(*problem.inputs)
    ours, eager = (
        (function(*problem.inputs) - expected).std() for function in (problem.ours, problem.baselines["eager"])
    )
    assert ours > 0.05 and 0.9 < ours / eager < 1.1


@pytest.mark.parametrize("name", ["gelu_mlp", "glu_mlp", "linear", "linear_4_rows", "linear_cross_entropy"])
def test_flops_are_those_that_pytorch_counts_of_the_baseline(name):
    case = CASES[name]
    problem = small(case)
    eager = problem.baselines["eager"]
    with FlopCounterMode(display=False) as both:
        results(problem, eager)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        eager(*problem.inputs)
    assert work_of(problem, "forward").flops == forward.get_total_flops()
    assert work_of(problem, "forward+backward").flops == both.get_total_flops()
    if "backward" in case.directions:
        assert work_of(problem, "backward").flops == both.get_total_flops() - forward.get_total_flops()


def test_flops_of_causal_attention_are_those_of_the_unmasked_scores():
    problem = small(CASES["attention"])
    products = 2 * 2 * 64 * 48 * 48  # both, of all pairs
    assert work_of(problem, "forward").flops == products * (48 + 1) / (2 * 48)
    assert work_of(problem, "backward").flops == 2.5 * work_of(problem, "forward").flops


def test_flops_of_windowed_attention_are_those_of_the_band():
    problem = small(CASES["attention_window"])
    pairs = sum(min(query + 1, 10) for query in range(48))
    assert work_of(problem, "forward").flops == pytest.approx(2 * 2 * 64 * pairs)


def test_flops_of_packed_attention_are_those_of_each_sequence():
    assert uneven(1024) == [256, 32, 64, 96, 128, 128, 128, 192] and sum(uneven(48)) == 48
    pairs = sum(length**2 for length in uneven(48))
    assert work_of(small(CASES["attention_varlen"]), "forward").flops == 2 * 2 * 64 * pairs


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_the_work_does_not_depend_on_the_backend(backend):
    problem = small(CASES["linear"])
    expected = work_of(problem, "forward+backward")
    with fastlm.use_backend(backend):
        assert work_of(problem, "forward+backward") == expected


def test_bytes_follow_the_dtype():
    float32, bfloat16 = (
        work_of(small(CASES["layernorm_residual"], dtype), "forward").bytes for dtype in (torch.float32, torch.bfloat16)
    )
    assert float32 == 2 * bfloat16 == 4 * 48 * 64 * 4


def test_the_sizes_are_those_of_backend_selection():
    operator, dtype, sizes = selection_inputs(small(CASES["linear"], torch.bfloat16))
    assert operator.name == "linear" and dtype == torch.bfloat16
    assert sizes._asdict() == {"rows": 48, "in_width": 64, "out_width": 192, "conv1d": True}


def test_recording_leaves_no_trace():
    problem = small(CASES["linear"])
    with fastlm.use_backend("reference"):
        work_of(problem, "forward")
    assert backends_of(lambda: problem.ours(*problem.inputs)) == "cpu"


def test_backward_alone_is_not_timed_of_the_fused_loss():
    assert CASES["attention"].directions == DIRECTIONS
    assert CASES["linear_cross_entropy"].directions == ("forward", "forward+backward")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row(dtype, monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(machine, "peak", lambda threads, dtype: 1e18)
    monkeypatch.setattr(machine, "reading", lambda: Probe(lambda: None, 1e7))
    monkeypatch.setattr(compare, "timed", lambda call: lambda n=1: 0.01)  # the probe's
    threads, problem = torch.get_num_threads(), small(CASES["linear"], compare.DTYPES[dtype])
    row = compare.compare(CASES["linear"], dtype, 2, "forward+backward", problem=problem, rounds=5)
    assert torch.get_num_threads() == threads
    assert (row.operator, row.dtype, row.threads, row.direction) == ("linear", dtype, 2, "forward+backward")
    assert row.best_baseline == "eager" and row.bound == "memory"
    assert row.backend in ("cpu", "torch")
    assert row.share == pytest.approx(row.work.bytes / 1e9 / row.seconds)
    size = 48 * 192 * compare.DTYPES[dtype].itemsize  # of the result
    assert size <= row.bytes_held and size <= row.baselines["eager"].bytes
    assert 0 < row.error <= 2


def test_a_wrong_result_is_an_error():
    problem = small(CASES["linear"])
    wrong = dataclasses.replace(problem, ours=lambda *inputs: 1.0001 * problem.ours(*inputs))
    with pytest.raises(
        ArithmeticError,
        match=r"linear of 48 × 64 → 192 in float32: \d+\.\d\d times PyTorch's own error, more than twice",
    ):
        compare.compare(CASES["linear"], "float32", 1, "forward+backward", problem=wrong, rounds=1)


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second.sum()

    assert 8 << 20 <= memory.peak_of_call(call) < 9 << 20


def test_the_backends_of_a_call():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with fastlm.use_backend("reference"):
        assert backends_of(lambda: fastlm.linear(x, weight)) == "reference"
    assert backends_of(lambda: fastlm.linear(x, weight, backend="torch")) == "torch"


def test_errors_below_half_a_unit_in_the_last_place_are_equal():
    true = [torch.tensor(1.0, dtype=torch.float64)]
    near, exact, far = [torch.tensor(1 + 2**-23)], [torch.tensor(1.0)], [torch.tensor(1 + 2**-20)]
    ratios = [accuracy.relative_to_baseline(true, exact, found) for found in (exact, near, far)]
    assert ratios == pytest.approx([1, 2, 16])


# AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_takes_the_same_steps_as_the_baseline_and_the_optimizer(dtype):
    """Clipping and, in 16 bits, master weights included."""
    starts, gradients = ([torch.randn(shape).to(dtype) for shape in ((30, 20), (7,))] for _ in range(2))

    def ends(make):
        parameters = [p.clone().requires_grad_() for p in starts]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.clone()
        step = make(parameters)
        for _ in range(2):
            step()
            if dtype == torch.float32:  # PyTorch's clipping overwrites the gradients
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad.copy_(gradient)
        return [p.detach() for p in parameters]

    def optimizer(parameters):
        return fastlm.optim.AdamW(parameters, max_grad_norm=adamw.MAX_NORM, master_weights=True).step

    ours = ends(adamw.update)
    for a, b, c, start in zip(ours, ends(adamw.eager), ends(optimizer), starts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
        assert torch.equal(a, c) and not torch.equal(a, start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_adamw(dtype):
    """16-bit parameters have float32 moments and master weights. The norm reads the gradients once more."""
    problem = small(CASES["adamw"], compare.DTYPES[dtype])
    assert work_of(problem, "step").bytes == 32 * 607
    row = compare.compare(CASES["adamw"], dtype, 1, "step", problem=problem, rounds=5)
    assert row.direction == "step" and row.bound == "memory" and row.backend in ("cpu", "torch")


def test_adamw_updates_the_parameters_of_gpt2():
    sizes = [shape if isinstance(shape, tuple) else (shape,) for shape in adamw.GPT2]
    with torch.device("meta"):
        expected = [tuple(p.shape) for p in GPT2LMHeadModel(GPT2Config.preset("gpt2")).parameters()]
    assert sorted(sizes) == sorted(expected)


def test_parts_of_a_step_need_no_inputs():
    prepare, run = parts(small(CASES["adamw"]), lambda: None, "step")
    assert prepare() is None and run(None) is None
