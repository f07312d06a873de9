"""Rows of the selection table from measurements of the CPU kernels and PyTorch's operators."""

import dataclasses
import json

import pytest
import torch

import fastlm
from fastlm.backends import selection, table_files
from fastlm.backends import table as selection_table
from fastlm.backends.rule import DTYPES, Rule
from fastlm.benchmarking import rules, table
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.operators import axes, backends_of, benchmarks
from tests.benchmarks.small import shrunk

SLOWER, FASTER = Ratio(0.8, 0.7, 0.9), Ratio(1.2, 1.1, 1.3)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selection_table.forget()
    yield tmp_path / "fastlm" / "table.json"
    selection_table.forget()
    selection.forget()


def measured(operator, dtype, rows, ratio):
    sizes = {"rows": rows} if operator != "attention" else {"query_len": rows, "packed": False}
    others = {"torch": Baseline(1.0, ratio)}
    return Row(operator, "", dtype, 2, "forward+backward", "cpu", 1.0, {}, backends=others, sizes=sizes)


def test_torch_is_faster_only_beyond_the_spread():
    assert table.torch_is_faster(measured("linear", "float32", 32, SLOWER))
    assert not table.torch_is_faster(measured("linear", "float32", 32, Ratio(0.9, 0.85, 0.98)))
    assert not table.torch_is_faster(measured("linear", "float32", 32, FASTER))


def test_rules_cover_the_side_on_which_torch_is_faster():
    rows = [
        measured("linear", "float32", 32, SLOWER),
        measured("linear", "float32", 1024, FASTER),
        measured("linear", "bfloat16", 32, SLOWER),
        measured("linear", "bfloat16", 1024, SLOWER),
        measured("attention", "float32", 32, FASTER),
        measured("attention", "float32", 1024, SLOWER),
        measured("gelu_mlp", "float32", 32, FASTER),
        measured("gelu_mlp", "float32", 1024, FASTER),
    ]
    assert rules.rules_of(rows, axes("cpu"), "cpu") == [
        Rule("linear", "float32", {"rows": (None, 181)}),
        Rule("linear", "bfloat16", {}),
        Rule("attention", "float32", {"packed": (0, 0), "query_len": (182, None)}),
    ]


def test_saved_rules_take_effect_at_once(own_cache):
    x, weight = torch.randn(4, 512), torch.randn(512, 512)
    call = lambda: fastlm.linear(x, weight)  # noqa: E731
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(json.dumps({"another": [{"operator": "linear", "dtype": "float32"}]}))
    key = selection_table.cpu_key()
    table_files.save({key: []})
    assert backends_of(call) == "cpu"
    table_files.save({key: [Rule("linear", "float32", {"rows": (None, 181)})]})
    assert backends_of(call) == "torch"
    assert backends_of(lambda: fastlm.linear(torch.randn(200, 512), weight)) == "cpu"
    assert set(json.loads(own_cache.read_text())) == {"another", key}
    assert [file.name for file in own_cache.parent.iterdir()] == ["table.json"]


@pytest.fixture
def small_cases(monkeypatch):
    own = {
        name: dataclasses.replace(benchmark, table_cases=tuple(map(shrunk, benchmark.table_cases)))
        for name, benchmark in benchmarks().items()
    }
    monkeypatch.setattr(table, "benchmarks", lambda: own)
    return own


def test_every_operator_is_measured_on_both_backends(own_cache, small_cases, monkeypatch):
    monkeypatch.setattr(table, "TOO_SLOW", float("inf"))
    with threads(1):
        rows = list(table.measure(budget=0.0))
    expected = [
        (name, dtype) for name, benchmark in small_cases.items() for _ in benchmark.table_cases for dtype in DTYPES
    ]
    assert [(row.operator, row.dtype) for row in rows] == expected
    assert {row.operator for row in rows} == {*small_cases} - {"adamw"}
    assert all(0 < ratio.low <= ratio.high for ratio in (row.backends["torch"].ratio for row in rows))
    assert selection.requested(None) is None  # nothing stays forced
    rules.rules_of(rows, axes("cpu"), "cpu")  # every axis is among the sizes


def test_the_sizes_of_table_cases_ascend():
    for benchmark in benchmarks().values():
        sizes = {}
        for case in benchmark.table_cases:
            sizes.setdefault(case.make, []).append(case.sizes.get("rows", case.sizes.get("tokens", 1024)))
        assert all(each == sorted(each) and len(each) > 1 for each in sizes.values())


def test_what_takes_pytorch_minutes_is_not_measured(small_cases, monkeypatch):
    """A baseline that needs a second, and a hundred times our time, runs once; larger sizes are not measured."""
    calls = []

    def slow(problem, function, direction):
        name = function.keywords["backend"]
        calls.append(name)
        return lambda n=1: {"cpu": 0.02, "torch": 2.0}[name]

    monkeypatch.setattr(table, "timer", slow)
    monkeypatch.setattr(table, "benchmarks", lambda: {"linear": small_cases["linear"]})
    found = [(row.dtype, row.backends["torch"].ratio.median, table.torch_is_faster(row)) for row in table.measure()]
    assert found == [(dtype, 100.0, False) for dtype in DTYPES]
    assert calls == ["cpu", "torch"] * 3
