"""Rows of the selection table from made-up measurements."""

import dataclasses
import json

import pytest
import torch

from fastlm.backends import registry, table, table_files
from fastlm.backends.rule import Rule
from fastlm.benchmarking import rules
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.operators import axes, benchmarks
from fastlm.benchmarking.rules import Point

SLOWER, FASTER, EQUAL = Ratio(0.8, 0.7, 0.9), Ratio(1.2, 1.1, 1.3), Ratio(0.99, 0.9, 1.05)
ORDER = ("triton", "cuda", "torch")
GPU_AXES = axes("cuda")


def row(operator, sizes, backend, backends, direction="forward+backward", dtype="bfloat16"):
    return Row(operator, "", dtype, 1, direction, backend, 1e-3, {}, backends=backends, sizes=sizes)


DENSE = {"packed": (0, 0)}


def against(**ratios):
    return {name: Baseline(1e-3, ratio) for name, ratio in ratios.items()}


def inverse(ratio):
    return Ratio(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def layernorm(rows, width, cuda, torch, cuda_to_torch=EQUAL, **more):
    """Triton's ratio to each of the other two, and that of CUDA C++ to PyTorch."""
    sizes = {"rows": rows, "width": width, "dropout": False}
    return [
        row("layernorm_residual", sizes, "triton", against(cuda=cuda, torch=torch), **more),
        row("layernorm_residual", sizes, "cuda", against(triton=inverse(cuda), torch=cuda_to_torch), **more),
    ]


@pytest.mark.parametrize(
    "cuda, torch, cuda_to_torch, first",
    [
        (FASTER, FASTER, EQUAL, None),
        (SLOWER, FASTER, FASTER, "cuda"),
        (FASTER, SLOWER, SLOWER, "torch"),
        (EQUAL, EQUAL, EQUAL, None),  # within the spread
        (Ratio(0.9, 0.85, 0.98), FASTER, FASTER, None),  # the median, but not the quartile
        (Ratio(0.95, 0.94, 0.96), FASTER, FASTER, "cuda"),
        (SLOWER, SLOWER, EQUAL, "cuda"),  # two are faster; PyTorch's is not faster than the other
        (SLOWER, SLOWER, SLOWER, "torch"),
        (SLOWER, SLOWER, FASTER, "cuda"),
    ],
)
def test_only_a_clear_win_changes_the_order(cuda, torch, cuda_to_torch, first):
    ratios = {"triton": {"cuda": cuda, "torch": torch}, "cuda": {"triton": inverse(cuda), "torch": cuda_to_torch}}
    assert rules.winner([ratios], ORDER) == first


@pytest.mark.parametrize(
    "forward, both, first",
    [
        (SLOWER, EQUAL, "cuda"),
        (EQUAL, SLOWER, "cuda"),
        (SLOWER, SLOWER, "cuda"),
        (SLOWER, FASTER, None),
        (FASTER, SLOWER, None),
        (EQUAL, EQUAL, None),
    ],
)
def test_no_direction_may_be_clearly_slower(forward, both, first):
    assert rules.winner([{"triton": {"cuda": ratio}} for ratio in (forward, both)], ("triton", "cuda")) == first


def test_only_measured_backends_are_preferred():
    assert rules.winner([{"triton": {"torch": SLOWER}}], ("triton", "torch")) == "torch"
    # Without Triton the CUDA kernels are the usual first.
    assert rules.winner([{"cuda": {"torch": FASTER}}], ("cuda", "torch")) is None
    assert rules.winner([], ("triton",)) is None


def firsts(by_rows, axes=("rows",)):
    points = [Point("linear", "float32", {"rows": rows}, first) for rows, first in by_rows.items()]
    return rules.derive(points, {"linear": (({}, axes),)})


def rule(first, **where):
    return Rule("linear", "float32", where, first)


@pytest.mark.parametrize(
    "by_rows, found",
    [
        ({32: None, 1024: None}, []),
        ({32: "torch", 1024: "torch"}, [rule("torch")]),
        ({32: "torch", 1024: None}, [rule("torch", rows=(None, 181))]),
        ({1024: "torch", 32: None}, [rule("torch", rows=(182, None))]),
        ({32: "torch", 1024: "cuda"}, [rule("torch", rows=(None, 181)), rule("cuda", rows=(182, None))]),
        ({8: None, 128: "cuda", 1024: "cuda", 4096: None}, [rule("cuda", rows=(33, 2048))]),
        ({8: "cuda", 128: None, 1024: "cuda"}, [rule("cuda", rows=(None, 32)), rule("cuda", rows=(363, None))]),
        ({64: "cuda"}, [rule("cuda", rows=(8, 512))]),  # nothing is known of other sizes
        ({5: "cuda"}, [rule("cuda", rows=(None, 40))]),
        ({64: None}, []),
    ],
)
def test_the_nearest_measurement_decides(by_rows, found):
    assert firsts(by_rows) == found


def test_every_size_has_the_winner_of_its_nearest_measurement():
    by_rows = {8: "torch", 128: None, 1024: "cuda", 4096: "cuda", 16384: None}
    found, operator = firsts(by_rows), registry.operators()["linear"]
    for rows in (1, 8, 31, 32, 33, 100, 128, 362, 363, 1024, 4096, 8191, 8192, 8193, 16384, 10**6):
        sizes = operator.sizes(rows, 1, 1, False)
        taken = [rule.first for rule in found if rule.matches(operator, torch.float32, sizes)]
        nearest = min(by_rows, key=lambda measured: (max(measured / rows, rows / measured), measured))
        assert taken == [by_rows[nearest]] * (by_rows[nearest] is not None), rows


def test_two_axes():
    """With few rows the width does not matter."""
    measured = {(8, 768): "torch", (1024, 256): "cuda", (1024, 768): None, (1024, 1600): "cuda"}
    points = [
        Point("layernorm_residual", "float16", {"rows": rows, "width": width, "dropout": False}, first)
        for (rows, width), first in measured.items()
    ]
    many = {"rows": (91, None)}
    assert rules.derive(points, GPU_AXES) == [
        Rule("layernorm_residual", "float16", {"rows": (None, 90), "width": (96, 6144)}),
        Rule("layernorm_residual", "float16", many | {"width": (None, 443)}, "cuda"),
        Rule("layernorm_residual", "float16", many | {"width": (1109, None)}, "cuda"),
    ]


def attention(query_len, key_len, first, batch=8, head_dim=64, masked=True):
    sizes = {"query_len": query_len, "key_len": key_len, "batch": batch, "head_dim": head_dim, "masked": masked}
    return Point("attention", "bfloat16", sizes | {"packed": False}, first)


def test_decoding_has_rules_of_its_own():
    points = [
        attention(1024, 1024, None),
        attention(4096, 4096, "cuda"),
        attention(1, 1024, "cuda", batch=1, masked=False),
    ]
    assert rules.derive([*points, attention(1, 1024, "cuda", batch=64, masked=False)], GPU_AXES) == [
        Rule("attention", "bfloat16", DENSE | {"query_len": (None, 32), "key_len": (128, 8192)}, "cuda"),
        Rule(
            "attention", "bfloat16", DENSE | {"query_len": (2049, None), "masked": (1, 1), "head_dim": (8, 512)}, "cuda"
        ),
    ]


def test_flags():
    masked, free = attention(1024, 1024, "cuda"), attention(1024, 1024, "cuda", masked=False)
    ends = DENSE | {"query_len": (128, 8192), "head_dim": (8, 512)}
    assert rules.derive([masked, free], GPU_AXES) == [Rule("attention", "bfloat16", ends, "cuda")]
    assert rules.derive([masked], GPU_AXES) == [Rule("attention", "bfloat16", ends | {"masked": (1, 1)}, "cuda")]
    other = dataclasses.replace(free, first="torch")
    assert rules.derive([masked, other], GPU_AXES) == [
        Rule("attention", "bfloat16", ends | {"masked": (0, 0)}),
        Rule("attention", "bfloat16", ends | {"masked": (1, 1)}, "cuda"),
    ]


def test_points_that_the_axes_do_not_distinguish_must_agree():
    points = [
        Point("linear_cross_entropy", "float32", {"rows": 64, "vocab": vocab}, first)
        for vocab, first in ((100, "cuda"), (50257, None))
    ]
    assert rules.derive(points, GPU_AXES) == []
    assert rules.derive(points[:1], GPU_AXES) == [Rule("linear_cross_entropy", "float32", {"rows": (8, 512)}, "cuda")]


def test_rows_of_measurements_become_rules():
    rows = [
        *layernorm(8, 768, FASTER, SLOWER, SLOWER),
        *layernorm(8, 768, FASTER, EQUAL, EQUAL, direction="forward"),
        *layernorm(4096, 768, SLOWER, FASTER, FASTER),
        *layernorm(4096, 768, FASTER, FASTER, direction="forward"),  # the two directions disagree
        *layernorm(16384, 768, SLOWER, FASTER, FASTER, dtype="float32"),
        row("training_step", {}, "auto", {}),
    ]
    assert rules.rules_of(rows, GPU_AXES, "cuda") == [
        Rule("layernorm_residual", "bfloat16", {"rows": (None, 181), "width": (96, 6144)}),
        Rule("layernorm_residual", "float32", {"rows": (2048, 131072), "width": (96, 6144)}, "cuda"),
    ]


def test_every_rule_can_be_read_back(monkeypatch, tmp_path):
    """From the user's table, and from the source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = rules.derive([attention(1, 1024, "cuda"), attention(1024, 1024, "torch", masked=False)], GPU_AXES) + [
        Rule("linear", "float16")
    ]
    table_files.save({"Some card": found, "another": []})
    try:
        assert (
            table.gpu_rules("Some card") == tuple(found)
            and table.gpu_rules("another") == ()
            and table.gpu_rules("a third") is None
        )
        table_files.save({"a third": found[:1]})
        assert list(json.loads(table.user_table().read_text())) == ["Some card", "another", "a third"]
        assert [file.name for file in table.user_table().parent.iterdir()] == ["table.json"]
    finally:
        table.forget()
    source = table_files.as_python("Some card", found, "PyTorch 2.13") + table_files.as_python("another", [], "none")
    assert eval(f"{{{source}}}", {"Rule": Rule}) == {"Some card": tuple(found), "another": ()}
    assert "    # PyTorch 2.13\n" in source and all(len(line) <= 120 for line in source.splitlines())


def test_the_axes_are_sizes():
    for name, benchmark in benchmarks().items():
        for box, names in (*benchmark.axes, *benchmark.gpu_axes):
            assert {*box, *names} <= {*registry.operators()[name].size_names}
