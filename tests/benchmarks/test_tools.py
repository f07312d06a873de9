"""The maintainers' tools: the recorder of results and the comparison of two checkouts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare_builds, record

ROOT = Path(__file__).parents[2]


def test_a_record_has_the_digest_dtype_shape_and_strides():
    x = torch.arange(6.0).reshape(2, 3)
    digest, rest = record.described(x.t()).split(" ", 1)
    assert len(digest) == 64 and rest == "float32 [3, 2] strides [1, 3]"
    assert record.described(x.t().contiguous()).split()[0] == digest  # of the values in their order
    assert record.described(x.t() + 0.0).split()[0] == digest != record.described(-x.t()).split()[0]
    assert record.described(x[:1]).endswith("float32 [1, 3] strides [-, 1]") and record.described(None) == "None"


def test_negative_zero_is_another_result():
    assert record.described(torch.tensor([0.0])) != record.described(torch.tensor([-0.0]))


def test_every_case_has_a_name_of_its_own():
    keys = [case.key for cases in record.CASES.values() for case in cases()]
    assert len(keys) == len(set(keys))


def test_inputs_depend_on_the_name_of_their_case_alone():
    draw = record.Draw("a case", torch.float32)
    first, second = draw(2, 4, 3, 8, layout="heads last"), draw.normal(5)
    again = record.Draw("a case", torch.float32)
    assert torch.equal(again(2, 4, 3, 8, layout="heads last"), first) and torch.equal(again.normal(5), second)
    assert first.stride(2) == 4 * 8 and not torch.equal(record.Draw("another", torch.float32).normal(5), second)


@pytest.mark.parametrize("way", record.ways_of(next(record.CASES["linear"]()), "float32", "cpu"))
def test_the_record_is_repeatable(way):
    case = next(record.CASES["linear"]())
    found = record.run_case(case, torch.float32, "cpu", way)
    assert found == record.run_case(case, torch.float32, "cpu", way) and "result 0" in found
    assert ("FLOPs" in found) == (way == "torch.library operator")
    assert any(name.startswith("gradient") for name in found) == (way != "inference")


def test_a_call_that_is_refused_is_recorded():
    key = "attention, usual, dropout"
    (case,) = (case for case in record.CASES["attention"]() if case.key == key)
    assert record.guarded(key, record.run_case, case, torch.float32, "torch", "training") == {key: "Unsupported"}


def test_differences():
    found = record.differences({"same": "1", "changed": "2", "old": "3"}, {"same": "1", "changed": "4", "new": "5"})
    assert found == ["changed\n    before 2\n    after  4", "old: before only", "new: after only"]


def test_a_record_is_compared_with_an_older_one(tmp_path, monkeypatch, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"

    def run(*arguments):
        monkeypatch.setattr(
            "sys.argv", ["record.py", "--operators", "adamw", "--backends", "cpu", *map(str, arguments)]
        )
        record.main()

    run("--out", before)
    with pytest.raises(SystemExit) as ended:
        run("--out", after, "--compare", before)
    assert ended.value.code == 0 and before.read_text() == after.read_text()
    content = json.loads(before.read_text())
    key = next(iter(content["results"]))
    content["results"][key] = "another"
    before.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        run("--results", after, "--compare", before)
    assert ended.value.code == 1 and f"1 differ\n{key}\n    before another\n" in capsys.readouterr().out


def test_cases_of_a_comparison():
    cases = list(compare_builds.keys(["small"], ["float32"], [1, 2], "linear*,adamw"))
    assert {case["name"] for case in cases} == {
        "adamw",
        "linear",
        "linear_bert",
        "linear_decode",
        "linear_cross_entropy",
    }
    assert {case["direction"] for case in cases if case["name"] == "adamw"} == {"step"}
    assert len(cases) == 2 * (4 * 2 + 1)
    for case in compare_builds.keys(["small"], ["float32"], [1], "[!a]*"):
        compare_builds.make_call(**case)()


class Worker:
    def __init__(self, seconds):
        self.seconds = seconds

    def ask(self, **request):
        return {"seconds": self.seconds} if isinstance(self.seconds, float) else self.seconds


@pytest.mark.parametrize(
    "before, after, expected",
    [(1.0, 1.1, "slower"), (1.0, 0.9, "faster"), (1.0, 1.005, "")],
)
def test_a_difference_beyond_the_spread_is_marked(before, after, expected):
    workers = {"before": Worker(before), "after": Worker(after)}
    row = compare_builds.compare(workers, {"name": "linear"}, rounds=5, turn=0.01, tolerance=0.01)
    assert row["verdict"] == expected and row["ratio"] == pytest.approx(after / before)


def test_a_case_that_fails_is_reported():
    workers = {"before": Worker({"error": "AttributeError: no such operator"}), "after": Worker(1.0)}
    row = compare_builds.compare(workers, {"name": "linear"}, rounds=5, turn=0.01, tolerance=0.01)
    assert row == {"name": "linear", "error": "before: AttributeError: no such operator"}


@pytest.mark.slow
def test_two_checkouts_are_compared():
    """Here the same one; a spread of microseconds may be on either side."""
    command = [sys.executable, ROOT / "benchmarks" / "compare_builds.py", "--before", ROOT, "--after", ROOT]
    options = ["--quick", "--only", "linear", "--rounds", "5", "--turn", "0.001"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.count(f"{ROOT}/fastlm/__init__.py") == 2
    assert len(re.findall(r"^linear +small (forward|both) +float32 +1 ", done.stdout, re.MULTILINE)) >= 2
    assert "2 rows, " in done.stdout and " 0 failed" in done.stdout


@pytest.mark.slow
def test_host_time_without_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, ROOT / "benchmarks" / "host_time.py", "--rounds", "1", "--calls", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"attention", "decode", "rotary", "linear_log_prob"} < {line.split()[0] for line in lines}
    assert all(re.search(r"forward +[0-9.]+ µs", line) for line in lines)
