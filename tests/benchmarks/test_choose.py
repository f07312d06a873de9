import functools
import json

import pytest
import torch

import fastlm
from fastlm.backends import choice, table
from fastlm.benchmarking import choose, rules
from fastlm.benchmarking.choose import Verdict
from fastlm.benchmarking.compare import served_by
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.operators import CASES

SLOWER, FASTER = Ratio(0.8, 0.7, 0.9), Ratio(1.2, 1.1, 1.3)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.forget()
    yield tmp_path / "fastlm" / "table.json"
    table.forget()
    choice.CHOICES.clear()


def test_pytorch_wins_only_where_it_is_clearly_faster():
    assert Verdict("linear", "float32", 32, SLOWER).torch_wins
    assert not Verdict("linear", "float32", 32, Ratio(0.9, 0.85, 0.98)).torch_wins
    assert not Verdict("linear", "float32", 32, FASTER).torch_wins


def test_rules_name_the_side_on_which_pytorch_wins():
    verdicts = [
        Verdict("linear", "float32", 32, SLOWER),
        Verdict("linear", "float32", 1024, FASTER),
        Verdict("linear", "bfloat16", 32, SLOWER),
        Verdict("linear", "bfloat16", 1024, SLOWER),
        Verdict("attention", "float32", 32, FASTER),
        Verdict("attention", "float32", 1024, SLOWER),
        Verdict("gelu_mlp", "float32", 32, FASTER),
        Verdict("gelu_mlp", "float32", 1024, FASTER),
    ]
    assert choose.rules(verdicts) == [
        table.Rule("linear", "float32", {"rows": (None, 181)}),
        table.Rule("linear", "bfloat16", {}),
        table.Rule("attention", "float32", {"query_len": (182, None)}),
    ]


def test_what_is_remembered_decides_from_now_on(own_cache):
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    call = lambda: fastlm.linear(x, weight)  # noqa: E731
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(json.dumps({"another": [{"operator": "linear", "dtype": "float32"}]}))
    rules.remember({table.cpu(): []})
    assert served_by(call) == "cpu"
    rules.remember({table.cpu(): [table.Rule("linear", "float32", {"rows": (None, 181)})]})
    assert served_by(call) == "torch"
    assert served_by(lambda: fastlm.linear(torch.randn(200, 8), weight)) == "cpu"
    assert set(json.loads(own_cache.read_text())) == {"another", table.cpu()}
    assert [file.name for file in own_cache.parent.iterdir()] == ["table.json"]


def test_every_operator_is_measured_on_both(own_cache):
    small = {name: functools.partial(case, width=32, heads=2, vocabulary=50) for name, case in CASES.items()}
    verdicts = list(choose.measure(small, {"small": 4, "large": 200}, budget=0.0))
    assert [(v.operator, v.dtype, v.rows) for v in verdicts] == [
        (name, dtype, rows) for name in CASES for dtype in ("float32", "bfloat16", "float16") for rows in (4, 200)
    ]
    assert all(0 < v.ratio.low <= v.ratio.high for v in verdicts)
    assert fastlm.backends.choice.requested(None) is None  # nothing stays forced


def test_what_pytorch_takes_minutes_for_is_not_measured(monkeypatch):
    """A rival that needs a second and a hundred times as long is called once, and with more rows not at all."""
    calls = []

    def slow(self, function, direction):
        name = "cpu" if not calls or calls[-1] == "torch" else "torch"
        calls.append(name)
        return lambda: {"cpu": 0.02, "torch": 2.0}[name]

    monkeypatch.setattr(choose.Case, "timer", slow)
    (case,) = (
        functools.partial(make, width=32, heads=2, vocabulary=50) for name, make in CASES.items() if name == "linear"
    )
    assert [
        (v.dtype, v.rows, v.ratio.median, v.torch_wins)
        for v in choose.measure({"linear": case}, {"small": 4, "large": 200})
    ] == [(dtype, 4, 100.0, False) for dtype in ("float32", "bfloat16", "float16")]
    assert calls == ["cpu", "torch"] * 3
