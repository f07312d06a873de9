import json
import re

import pytest

from fastlm.benchmarking import machine, report, whole
from fastlm.commands import bench, bench_gpu, choices
from tests.benchmarks.small import shrunk
from tests.commands.support import fastlm_command, run


@pytest.mark.parametrize("name, value", [("limit", "7"), ("table", "t.json")])
def test_gpu_options_without_gpu_are_errors(name, value):
    result = fastlm_command("bench", f"--{name}", value)
    assert result.exit_code == 1 and result.stderr.startswith(
        f"error: {name}: expected this option together with --gpu, got {value[0]}"
    )


def test_bench_gpu_options(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(bench_gpu, "run", lambda files, limit: taken.append((files, limit)))
    names = {
        "json": tmp_path / "b.json",
        "markdown": tmp_path / "b.md",
        "plot": tmp_path / "b.png",
        "table": tmp_path / "t.json",
    }
    run("bench", "--gpu", "--limit", 7, *[word for name, file in names.items() for word in (f"--{name}", file)])
    assert taken == [(bench_gpu.Files(**names), 7.0)]


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_lists_every_benchmark(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    output = " ".join(run("bench", "--help").replace("│", " ").split())
    assert all(re.search(rf"[ ,]{name}[,. ]", output) for name in choices.BENCHMARKS)
    assert f"Default: {', '.join(choices.DEFAULT_CASES)}." in output and "…" not in output


@pytest.fixture
def small_cases(monkeypatch):
    """The same cases at tiny sizes, and fixed values for the machine's peaks."""
    monkeypatch.setattr(choices, "CASES", {name: shrunk(case) for name, case in choices.CASES.items()})
    monkeypatch.setattr(machine, "reading", lambda: machine.Probe(lambda: None, 1e7))
    monkeypatch.setattr(machine, "arithmetic", lambda threads, dtype: machine.Probe(lambda: None, 1e9))
    for module in (machine, report):
        monkeypatch.setattr(module, "peak", lambda threads, dtype: 1e11)
        monkeypatch.setattr(module, "read_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(report, "product", lambda threads, dtype: (None, 9e10))


def test_bench(small_cases, tmp_path):
    files = {"json": tmp_path / "b.json", "markdown": tmp_path / "b.md", "plot": tmp_path / "b.png"}
    output = run(
        "bench",
        "--threads",
        "1",
        "--seconds",
        0.01,
        *[word for name, file in files.items() for word in (f"--{name}", file)],
    )
    rows = json.loads(files["json"].read_text())["rows"]
    expected = {
        (name, dtype, 1, direction)
        for name in choices.DEFAULT_CASES
        for dtype in ("float32", "bfloat16")
        for direction in choices.CASES[name].directions
    }
    assert {(row["operator"], row["dtype"], row["threads"], row["direction"]) for row in rows} == expected
    assert all(row["baselines"]["eager"]["ratio"]["low"] <= row["baselines"]["eager"]["ratio"]["high"] for row in rows)
    table = files["markdown"].read_text()
    assert table.count("\n| `") == len(choices.DEFAULT_CASES) * 2 and "10.0 GB/s" in table
    assert "allocator: " in output and all(name in output for name in choices.DEFAULT_CASES)
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_interrupted_bench_keeps_what_was_measured(small_cases, tmp_path, monkeypatch):
    files = {"json": tmp_path / "b.json", "markdown": tmp_path / "b.md", "plot": tmp_path / "b.png"}
    measure, calls = bench.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(bench, "measure", interrupted)
    options = "--operators linear --dtypes bf16,fp32 --threads 1 --seconds 0.01".split()
    outputs = [word for name, file in files.items() for word in (f"--{name}", file)]
    result = fastlm_command("bench", *options, *outputs)
    assert result.exit_code == 130 and result.stderr == "interrupted after 2 of 6 rows, which were kept\n"
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["dtype"], row["direction"]) for row in rows] == [("bfloat16", "forward"), ("bfloat16", "backward")]
    assert "linear" in result.stdout and "`linear`" in files["markdown"].read_text()
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
def test_bench_training_step_at_several_recompute_levels(small_cases, monkeypatch, tmp_path):
    monkeypatch.setitem(whole.MODELS, "tiny", whole.Subject("GPT-2", 1, 32, 2, 50, 2, 16))
    file = tmp_path / "b.json"
    options = (
        "--operators training_step --model tiny --dtypes float32 --threads 1 --seconds 0.01 --recompute 0,2 --json"
    )
    output = run("bench", *options.split(), file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["recompute"] for row in rows] == [0, 2] and all(row["bytes_held"] for row in rows)
    assert "level" in output and output.count("eager tuned") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recompute", "3"], "recompute: expected a comma-separated list of 0, 1, 2, got '3'"),
        (
            ["--operators", "softmax"],
            "operators: expected a comma-separated list of adamw, attention, .*, growth, accelerated, got 'softmax'",
        ),
        (
            ["--operators", "accelerated", "--case", "falcon"],
            "case: expected a comma-separated list of encoding, bert, gpt2, .*, contrastive_mini_batches, got 'falcon'",
        ),
        (["--operators", "accelerated"], r"checkpoint: expected the folder of a sentence encoder .*, got None"),
        (
            ["--dtypes", "int8"],
            "dtypes: expected a comma-separated list of float32, bfloat16 \\(also fp32, bf16\\), got 'int8'",
        ),
        (["--dtypes", "bf61"], "dtypes: expected a comma-separated list of .*, got 'bf61'; did you mean 'bf16'\\?"),
        (["--operators", "atention"], "operators: .*, got 'atention'; did you mean 'attention'\\?"),
        (["--plot", "b.foo"], r"plot: expected a file name that ends in one of .*\.png, .*\.svg.*, got 'b.foo'"),
        (["--threads", "1,x"], "threads: expected a comma-separated list of integers from 1 to 4096, got 'x'"),
        (["--directions", "up"], "directions: expected a comma-separated list of forward, backward, .*, got 'up'"),
        (["--seconds", "0"], r"seconds: expected a number in \(0, 3600\), got 0.0"),
        (["--gpu"], r"gpu: expected a GPU that PyTorch can use, got none \(.*\)"),
        (
            ["--operators", "rotary", "--model", "bert"],
            "model: expected this option together with --operators training_step, got --operators rotary",
        ),
        (
            ["--operators", "rotary,growth", "--recompute", "2"],
            "recompute: expected this option together with --operators training_step, got --operators rotary,growth",
        ),
        (
            ["--operators", "rotary", "--case", "bert"],
            "case: expected this option together with --operators accelerated, got --operators rotary",
        ),
        (
            ["--operators", "accelerated", "--case", "bert", "--checkpoint", "nodir"],
            "checkpoint: expected this option together with --operators accelerated --case encoding, got .*accelerated",
        ),
        (
            ["--operators", "growth", "--directions", "forward"],
            "directions: expected this option together with an operator among --operators, got --operators growth",
        ),
        (
            ["--operators", "generation", "--compile"],
            "compile: expected this option together with another benchmark than generation, got .* generation",
        ),
        (
            ["--from", "b.json", "--operators", "adamw", "--threads", "x"],
            "operators: expected no value with --from, which measures nothing, got 'adamw'",
        ),
        (
            ["--from", "b.json", "--checkpoint", "nodir"],
            "checkpoint: expected no value with --from, which measures nothing, got 'nodir'",
        ),
        (["--gpu", "--threads", "1"], "threads: expected no value with --gpu, got '1'"),
        (["--gpu", "--from", "b.json"], "from: expected no value with --gpu, got 'b.json'"),
        (
            ["--from", "nofile"],
            r"from: expected a file written by `fastlm bench --json`, got 'nofile' \(No such file or directory\)",
        ),
        (["--json", "/proc/b.json"], r"json: expected a file that can be written, got '/proc/b.json' \(.*\)"),
        (["--json", "/nowhere/b.json"], "json: expected a file name in an existing directory, got '/nowhere/b.json'"),
    ],
)
def test_bench_errors(arguments, message):
    result = fastlm_command("bench", *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
