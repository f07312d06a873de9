"""The rivals compute the same as ours, and the counted FLOPs are those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlm.benchmarking import accuracy, compare, machine, operators
from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.operators import CASES, DIRECTIONS, OTHERS, directions

SMALL = {"rows": 48, "width": 64, "heads": 4, "vocabulary": 90}
ALL = CASES | OTHERS


@pytest.mark.parametrize(
    "operator", sorted({*ALL} - {"attention_dropout", "layernorm_residual_16384_rows"})
)  # which is random, and whose sums are longer
def test_the_rival_computes_the_same(operator):
    case = ALL[operator](torch.float32, **SMALL)
    for ours, theirs in zip(case.results(case.ours), case.results(case.eager), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-4
        )  # float32, the same sums of up to 256 terms of size 1 in another order


def test_the_rival_drops_as_often():
    case = ALL["attention_dropout"](torch.float32, **SMALL)
    whole = ALL["attention_512_tokens"](torch.float32, **SMALL)
    ours, theirs = ((function(*case.inputs) - whole.ours(*case.inputs)).std() for function in (case.ours, case.eager))
    assert ours > 0.05 and 0.9 < ours / theirs < 1.1


@pytest.mark.parametrize("operator", ["gelu_mlp", "linear", "linear_4_rows", "linear_cross_entropy"])
def test_flops_of_the_products_are_those_that_pytorch_counts(operator):
    case = ALL[operator](torch.float32, **SMALL)
    with FlopCounterMode(display=False) as both:
        case.results(case.eager)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        case.eager(*case.inputs)
    assert case.least("forward").flops == forward.get_total_flops()
    assert case.least("backward").flops == both.get_total_flops() - forward.get_total_flops()
    assert case.least("forward+backward").flops == both.get_total_flops()


def test_flops_of_attention_are_half_of_the_square_and_its_diagonal():
    work = CASES["attention"](torch.float32, **SMALL)
    products = 2 * 2 * 64 * 48 * 48  # both, of all pairs
    assert work.least("forward").flops == products * (48 + 1) / (2 * 48)
    assert work.least("backward").flops == 2.5 * work.least("forward").flops


def test_flops_of_packed_attention_are_those_of_each_sequence():
    """Two products, and a padded batch would be twice as large."""
    assert operators.uneven(1024) == [256, 32, 64, 96, 128, 128, 128, 192] and sum(operators.uneven(48)) == 48
    case = CASES["attention_varlen"](torch.float32, **SMALL)
    with FlopCounterMode(display=False) as both:
        case.results(case.ours)
    assert case.least("forward+backward").flops == both.get_total_flops()


def test_bytes_follow_the_dtype():
    wide, narrow = (
        CASES["layernorm_residual"](dtype, **SMALL).least("forward").bytes for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide == 2 * narrow == 4 * 48 * 64 * 4


def test_backward_alone_is_not_asked_of_the_fused_loss():
    assert directions("attention") == DIRECTIONS
    assert directions("linear_cross_entropy") == ("forward", "forward+backward")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_the_table(dtype, monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(machine, "peak", lambda threads, dtype: 1e18)
    monkeypatch.setattr(machine, "reading", lambda: Probe(lambda: None, 1e7))
    monkeypatch.setattr(compare, "timed", lambda call: lambda: 0.01)  # the probe's
    threads = torch.get_num_threads()
    row = compare.compare(CASES["linear"](compare.DTYPES[dtype], **SMALL), 2, "forward+backward", rounds=5)
    assert torch.get_num_threads() == threads
    assert (row.operator, row.dtype, row.threads, row.direction, row.best_rival, row.bound) == (
        "linear",
        dtype,
        2,
        "forward+backward",
        "eager",
        "memory",
    )
    assert row.backend in ("cpu", "torch")
    assert row.share == pytest.approx(row.work.bytes / 1e9 / row.seconds)
    size = 48 * 192 * compare.DTYPES[dtype].itemsize  # the result, at least, was held
    assert size <= row.bytes_held and size <= row.rivals["eager"].bytes
    assert 0 < row.error <= 2


def test_what_is_timed_must_be_right():
    case = CASES["linear"](torch.float32, **SMALL)
    case.ours = lambda x, weight, bias: 1.0001 * case.eager(x, weight, bias)
    with pytest.raises(
        ArithmeticError,
        match=r"linear of 48 × 64 → 192 in float32: \d+\.\d\d times PyTorch's own error, more than twice",
    ):
        compare.compare(case, 1, "forward+backward", rounds=1)


def test_bytes_held_counts_what_is_held_at_once():
    def call():
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second.sum()

    assert 8 << 20 <= compare.bytes_held(call) < 9 << 20


def test_served_by_names_the_backend_that_ran():
    from fastlm import linear, use_backend

    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with use_backend("reference"):
        assert compare.served_by(lambda: linear(x, weight)) == "reference"
    assert compare.served_by(lambda: linear(x, weight, backend="torch")) == "torch"


def test_a_single_number_is_not_compared_with_luck():
    true = [torch.tensor(1.0, dtype=torch.float64)]
    near, exact, far = [torch.tensor(1 + 2**-23)], [torch.tensor(1.0)], [torch.tensor(1 + 2**-20)]
    assert [accuracy.error_over_theirs(true, exact, found) for found in (exact, near, far)] == pytest.approx([1, 2, 16])
