"""Made-up measurements, and the rows of a table that follow from them."""

import dataclasses
import json

import pytest

from fastlm.backends import table
from fastlm.backends.table import Rule
from fastlm.benchmarking import rules
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.rules import Point

SLOWER, FASTER, EQUAL = Ratio(0.8, 0.7, 0.9), Ratio(1.2, 1.1, 1.3), Ratio(0.99, 0.9, 1.05)
ORDER = ("triton", "cuda", "torch")


@dataclasses.dataclass
class Row:
    operator: str
    features: dict
    served_by: str
    backends: dict
    direction: str = "forward+backward"
    dtype: str = "bfloat16"


def against(**ratios):
    return {name: dataclasses.asdict(ratio) for name, ratio in ratios.items()}


def inverse(ratio):
    return Ratio(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def layernorm(rows, width, cuda, torch, cuda_to_torch=EQUAL, **more):
    """Triton's ratio to each of the other two, and that of CUDA C++ to PyTorch."""
    features = {"rows": rows, "width": width, "dropout": False}
    return [
        Row("layernorm_residual", features, "triton", against(cuda=cuda, torch=torch), **more),
        Row("layernorm_residual", features, "cuda", against(triton=inverse(cuda), torch=cuda_to_torch), **more),
    ]


@pytest.mark.parametrize(
    "cuda, torch, cuda_to_torch, first",
    [
        (FASTER, FASTER, EQUAL, None),
        (SLOWER, FASTER, FASTER, "cuda"),
        (FASTER, SLOWER, SLOWER, "torch"),
        (EQUAL, EQUAL, EQUAL, None),  # within the spread
        (Ratio(0.9, 0.85, 0.98), FASTER, FASTER, None),  # the median says so, its quartile does not
        (Ratio(0.95, 0.94, 0.96), FASTER, FASTER, "cuda"),
        (SLOWER, SLOWER, EQUAL, "cuda"),  # of two that are faster, PyTorch's must be faster than the other too
        (SLOWER, SLOWER, SLOWER, "torch"),
        (SLOWER, SLOWER, FASTER, "cuda"),
    ],
)
def test_only_a_clear_win_moves_a_backend_up(cuda, torch, cuda_to_torch, first):
    contest = {"triton": {"cuda": cuda, "torch": torch}, "cuda": {"triton": inverse(cuda), "torch": cuda_to_torch}}
    assert rules.winner([contest], ORDER) == first


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


def test_who_did_not_take_part_is_not_chosen():
    assert rules.winner([{"triton": {"torch": SLOWER}}], ("triton", "torch")) == "torch"
    assert (
        rules.winner([{"cuda": {"torch": FASTER}}], ("cuda", "torch")) is None
    )  # without Triton the CUDA kernels are the usual first
    assert rules.winner([], ("triton",)) is None


def firsts(by_rows, axes=("rows",)):
    points = [Point("linear", "float32", {"rows": rows}, first) for rows, first in by_rows.items()]
    return rules.rules(points, {"linear": (({}, axes),)})


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
        ({64: "cuda"}, [rule("cuda", rows=(8, 512))]),  # of other sizes nothing is known
        ({5: "cuda"}, [rule("cuda", rows=(None, 40))]),
        ({64: None}, []),
    ],
)
def test_a_rule_holds_where_the_nearer_measurement_was_won(by_rows, found):
    assert firsts(by_rows) == found


def test_every_size_has_the_winner_of_the_nearest_measurement():
    by_rows = {8: "torch", 128: None, 1024: "cuda", 4096: "cuda", 16384: None}
    found = firsts(by_rows)
    for rows in (1, 8, 31, 32, 33, 100, 128, 362, 363, 1024, 4096, 8191, 8192, 8193, 16384, 10**6):
        taken = [rule.first for rule in found if rule.holds("linear", "float32", {"rows": rows})]
        nearest = min(by_rows, key=lambda measured: (max(measured / rows, rows / measured), measured))
        assert taken == [by_rows[nearest]] * (by_rows[nearest] is not None), rows


def test_two_features():
    """Of few rows, whatever the width; of many, by it."""
    measured = {(8, 768): "torch", (1024, 256): "cuda", (1024, 768): None, (1024, 1600): "cuda"}
    points = [
        Point("layernorm_residual", "float16", {"rows": rows, "width": width, "dropout": False}, first)
        for (rows, width), first in measured.items()
    ]
    many = {"rows": (91, None)}
    assert rules.rules(points, rules.GPU_AXES) == [
        Rule("layernorm_residual", "float16", {"rows": (None, 90), "width": (96, 6144)}),
        Rule("layernorm_residual", "float16", many | {"width": (None, 443)}, "cuda"),
        Rule("layernorm_residual", "float16", many | {"width": (1109, None)}, "cuda"),
    ]


def attention(query_len, key_len, first, batch=8, head_dim=64, masked=True):
    features = {"query_len": query_len, "key_len": key_len, "batch": batch, "head_dim": head_dim, "masked": masked}
    return Point("attention", "bfloat16", features, first)


def test_decoding_is_measured_apart():
    points = [
        attention(1024, 1024, None),
        attention(4096, 4096, "cuda"),
        attention(1, 1024, "cuda", batch=1, masked=False),
    ]
    assert rules.rules([*points, attention(1, 1024, "cuda", batch=64, masked=False)], rules.GPU_AXES) == [
        Rule("attention", "bfloat16", {"query_len": (None, 32), "key_len": (128, 8192)}, "cuda"),
        Rule("attention", "bfloat16", {"query_len": (2049, None), "masked": (1, 1), "head_dim": (8, 512)}, "cuda"),
    ]


def test_what_is_true_or_false():
    masked, free = attention(1024, 1024, "cuda"), attention(1024, 1024, "cuda", masked=False)
    ends = {"query_len": (128, 8192), "head_dim": (8, 512)}
    assert rules.rules([masked, free], rules.GPU_AXES) == [Rule("attention", "bfloat16", ends, "cuda")]
    assert rules.rules([masked], rules.GPU_AXES) == [Rule("attention", "bfloat16", ends | {"masked": (1, 1)}, "cuda")]
    other = dataclasses.replace(free, first="torch")
    assert rules.rules([masked, other], rules.GPU_AXES) == [
        Rule("attention", "bfloat16", ends | {"masked": (0, 0)}),
        Rule("attention", "bfloat16", ends | {"masked": (1, 1)}, "cuda"),
    ]


def test_what_the_features_do_not_tell_apart_must_agree():
    points = [
        Point("linear_cross_entropy", "float32", {"rows": 64, "vocab": vocab}, first)
        for vocab, first in ((100, "cuda"), (50257, None))
    ]
    assert rules.rules(points, rules.GPU_AXES) == []
    assert rules.rules(points[:1], rules.GPU_AXES) == [
        Rule("linear_cross_entropy", "float32", {"rows": (8, 512)}, "cuda")
    ]


def test_rows_of_measurements_become_rules():
    rows = [
        *layernorm(8, 768, FASTER, SLOWER, SLOWER),
        *layernorm(8, 768, FASTER, EQUAL, EQUAL, direction="forward"),
        *layernorm(4096, 768, SLOWER, FASTER, FASTER),
        *layernorm(4096, 768, FASTER, FASTER, direction="forward"),  # the two directions disagree
        *layernorm(16384, 768, SLOWER, FASTER, FASTER, dtype="float32"),
        Row("training_step", {}, "auto", {}),
    ]
    assert rules.of_rows(rows) == [
        Rule("layernorm_residual", "bfloat16", {"rows": (None, 181), "width": (96, 6144)}),
        Rule("layernorm_residual", "float32", {"rows": (2048, 131072), "width": (96, 6144)}, "cuda"),
    ]


def test_every_rule_can_be_read_back(monkeypatch, tmp_path):
    """From the file of the cache, and from the entry of the source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = rules.rules([attention(1, 1024, "cuda"), attention(1024, 1024, "torch", masked=False)], rules.GPU_AXES) + [
        Rule("linear", "float16")
    ]
    rules.remember({"Some card": found, "another": []})
    try:
        assert (
            table.gpu_rules("Some card") == tuple(found)
            and table.gpu_rules("another") == ()
            and table.gpu_rules("a third") is None
        )
        rules.remember({"a third": found[:1]})
        assert list(json.loads(table.user_table().read_text())) == ["Some card", "another", "a third"]
        assert [file.name for file in table.user_table().parent.iterdir()] == ["table.json"]
    finally:
        table.forget()
    source = rules.as_python("Some card", found, "PyTorch 2.13") + rules.as_python("another", [], "none")
    assert eval(f"{{{source}}}", {"Rule": Rule}) == {"Some card": tuple(found), "another": ()}
    assert "    # PyTorch 2.13\n" in source and all(len(line) <= 160 for line in source.splitlines())


def test_the_axes_are_features():
    for operator, regimes in rules.GPU_AXES.items():
        for box, axes in regimes:
            assert {*box, *axes} <= {*table.FEATURES[operator]}
