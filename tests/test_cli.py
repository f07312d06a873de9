"""Tests of the commands: in this process, or in a new process where signals and exit codes matter."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm.backends import isa, selection, table
from fastlm.backends.rule import Rule
from fastlm.benchmarking import machine, report, whole
from fastlm.benchmarking import table as measured_table
from fastlm.benchmarking.gpu import plan
from fastlm.benchmarking.gpu.timing import Row
from fastlm.benchmarking.measure import Ratio
from fastlm.cli import app
from fastlm.commands import bench, bench_gpu, choices, demo
from fastlm.commands.display import BarReport
from fastlm.generation import load_tokenizer
from fastlm.models import BertForMaskedLM, GPT2LMHeadModel, load_model
from fastlm.training.baseline import PlainGPT2
from fastlm.training.curve import draw_losses
from tests.benchmarks.small import shrunk
from tests.benchmarks.test_report import DESCRIBED

TINY = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --steps 12 --eval-every 5 --warmup 2".split()
TEXT = "for line in lines:\n    print(line, 'naïve')\n" * 60


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    """Hides GPUs: output is compared with results computed on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def fastlm_command(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        torch.set_num_threads(threads)


def run(*arguments):
    result = fastlm_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gpt"
    return out, run("train", "--data", text_file, *TINY, "--out", out, "--threads", 1)


@pytest.fixture(scope="module")
def trained_bert(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bert"
    return out, run(
        "train", "--data", text_file, *TINY, "--out", out, "--objective", "masked-token", "--tokenizer", "char"
    )


# train


def test_train_prints_the_validation_loss_and_writes_a_summary(trained, text_file):
    out, output = trained
    summary = json.loads((out / "summary.json").read_text())
    assert output.splitlines()[-1] == f"val loss {summary['val_loss']:.4f}"
    assert re.search(r"^step 5: train loss \d\.\d{4}, val loss \d\.\d{4}$", output, re.MULTILINE)
    assert summary["settings"] == {
        "data": [str(text_file)],
        "tokenizer": "byte",
        "val_fraction": 0.1,
        "val_file": None,
        "objective": "next-token",
        "layers": 1,
        "heads": 2,
        "width": 32,
        "context": 16,
        "batch": 4,
        "steps": 12,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup": 2,
        "decay_steps": None,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "dropout": 0.0,
        "seed": 0,
        "dtype": "float32",
        "eval_every": 5,
        "recompute": 1,
        "device": "cpu",
        "threads": 1,
    }
    assert summary["steps"] == 12 and not summary["interrupted"] and summary["tokens_per_second"] > 0
    assert 0 < summary["train_loss"] < 6 and [e["step"] for e in summary["evaluations"]] == [5, 10, 12]
    assert summary["evaluations"][-1]["val_loss"] == summary["val_loss"]
    size = len(TEXT.encode())
    assert summary["tokens"] == {"training": round(0.9 * size), "validation": size - round(0.9 * size)}


def test_train_writes_a_model_that_can_be_loaded(trained):
    out, _ = trained
    model = load_model(out)
    assert isinstance(model, GPT2LMHeadModel)
    assert (
        model.config.n_layer,
        model.config.n_head,
        model.config.n_embd,
        model.config.n_positions,
        model.config.vocab_size,
    ) == (1, 2, 32, 16, 256)
    files = ["config.json", "model.safetensors", "summary.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(out)) == files


def test_train_options(text_file, tmp_path):
    (tmp_path / "val.txt").write_text("print(lines)\n" * 10)
    (tmp_path / "more.txt").write_text("more")
    given = {
        "tokenizer": "char",
        "layers": 2,
        "heads": 4,
        "width": 16,
        "context": 8,
        "batch": 3,
        "steps": 4,
        "lr": 0.002,
        "min_lr": 0.0003,
        "warmup": 1,
        "decay_steps": 3,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.2,
        "grad_clip": 0.5,
        "dropout": 0.1,
        "seed": 7,
        "dtype": "bf16",
        "objective": "next-token",
        "eval_every": 2,
        "recompute": 2,
        "val_file": str(tmp_path / "val.txt"),
        "device": "cpu",
        "threads": 2,
    }
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    run("train", "--data", text_file, tmp_path / "more.txt", *flags, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"] == given | {
        "dtype": "bfloat16",
        "data": [str(text_file), str(tmp_path / "more.txt")],
        "val_fraction": None,
    }
    assert load_model(tmp_path / "out").config.resid_pdrop == 0.1


def test_train_is_bit_reproducible(trained, text_file, tmp_path):
    run("train", "--data", text_file, *TINY, "--out", tmp_path, "--threads", 1)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_train_with_masked_tokens(trained_bert):
    out, output = trained_bert
    model = load_model(out)
    assert isinstance(model, BertForMaskedLM) and re.search(r"^val loss \d\.\d{4}$", output.splitlines()[-1])
    assert model.config.vocab_size == len(set(TEXT)) + 2 == load_tokenizer(out).vocab_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--data", "nowhere.txt"],
            "data: expected a file, a directory with text files or a pattern .*, got 'nowhere.txt'",
        ),
        (["--data", "empty.txt"], "data: expected a text that is not empty, got 1 empty file, the first is empty.txt"),
        (
            ["--data", "short.txt"],
            r"data: expected at least 65 tokens for training \(one context of 64 and the next token\), got 9",
        ),
        (
            ["--data", "text.txt", "--val-file", "short.txt"],
            r"val_fraction or val_file: expected at least 65 tokens for validation \(.*\), got 10",
        ),
        (["--data", "text.txt", "--layers", "0"], "layers: expected an integer >= 1, got 0"),
        (["--data", "text.txt", "--heads", "5"], "width: expected a multiple of heads = 5, got 128"),
        (["--data", "text.txt", "--dropout", "1"], r"dropout: expected a number in \[0, 1\), got 1.0"),
        (
            ["--data", "text.txt", "--objective", "guess"],
            "objective: expected one of next-token, masked-token, got 'guess'",
        ),
        (["--data", "text.txt", "--tokenizer", "bpe"], "tokenizer: expected one of byte, char, got 'bpe'"),
        (["--data", "text.txt", "--threads", "0"], "threads: expected an integer >= 1, got 0"),
        (
            ["--data", "text.txt", "--out", "text.txt"],
            "out: expected a directory or a path for a new one, got the file 'text.txt'",
        ),
        (["--data", "text.txt", "--layers", "many"], "Invalid value for '--layers': .*integer.*"),
        (["--data", "text.txt", "--colour", "red"], "No such option: --colour.*"),
        (["--data", "text.txt", "--stpes", "3"], r"No such option: --stpes .*--steps.*"),
        ([], "data: expected at least one file, directory or pattern, got none"),
        (["--data", "text.txt", "--seed", 2**63], r"seed: expected an integer < 2\^63, got 9223372036854775808"),
        (
            ["text.txt", "--objective", "next-tokens"],
            "objective: expected one of next-token, masked-token, got 'next-tokens'; did you mean 'next-token'\\?",
        ),
    ],
)
def test_train_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {"text.txt": TEXT, "empty.txt": "", "short.txt": "0123456789"}.items():
        (tmp_path / name).write_text(text)
    before = sorted(os.listdir(tmp_path))
    result = fastlm_command("train", *arguments)
    assert result.exit_code in (1, 2)
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_train_takes_files_without_an_option(trained, text_file, tmp_path):
    (tmp_path / "more.txt").write_text("more")
    run("train", text_file, tmp_path / "more.txt", *TINY, "--out", tmp_path / "out", "--threads", 1)
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert settings["data"] == [str(text_file), str(tmp_path / "more.txt")]
    usage = run("train", "--help")
    assert "[PATH]..." in usage and "--data" in usage


def test_train_names_the_files_that_it_skips(text_file, tmp_path):
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    assert "skipped" not in run("train", folder / "a.txt", *TINY, "--out", tmp_path / "out")
    (folder / "picture").write_bytes(b"\x89PNG\0")
    for i in range(6):
        (folder / ".git" / f"{i}").write_text("x")
    output = run("train", folder, *TINY, "--out", tmp_path / "out", "--overwrite")
    names = ", ".join(str(folder / ".git" / f"{i}") for i in range(5))
    assert f"skipped 7 files, hidden or binary: {names} and 2 more\n" in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"][-1] == str(folder / "picture")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_an_earlier_model_is_not_overwritten(command, trained, text_file, tmp_path, small_demo):
    arguments = {"train": ["train", text_file, *TINY], "demo": ["demo", "--seconds", 0.1]}[command]
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = fastlm_command(*arguments, "--out", out)
    assert result.exit_code == 1 and result.stderr == (
        f"error: out: expected a directory without a model, got {str(out)!r}, which has config.json; "
        "--overwrite replaces it\n"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(*arguments, "--out", out, "--overwrite")
    assert (out / "summary.json").read_bytes() != before["summary.json"]


@pytest.mark.parametrize("command", ["train", "demo"])
def test_several_processes_are_refused(command, text_file, tmp_path, monkeypatch):
    """As torchrun starts them: each would train the same model and write it into the same directory."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {"train": ["train", text_file, *TINY], "demo": ["demo"]}[command]
    result = fastlm_command(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr == (
        "error: WORLD_SIZE: expected 1, as training on several processes is not supported, got '2'\n"
    )
    assert not os.listdir(tmp_path)


def test_train_on_a_full_disk(text_file, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # write() fails, as on a full disk
    try:
        result = fastlm_command("train", "--data", text_file, *TINY, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: out: could not save to '.*out'; no file was written: .*\n", result.stderr), (
        result.stderr
    )
    assert os.listdir(tmp_path) == []


def test_out_of_memory_is_a_one_line_error(text_file, tmp_path):
    result = fastlm_command("train", "--data", text_file, *TINY, "--batch", 2**50, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "error: out of memory: reduce --batch, --context, --width or --layers\n"


def process(*arguments, cwd):
    """Runs the command in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )


def test_interrupted_training_is_saved(text_file, tmp_path):
    endless = [*TINY, "--steps", 10**6, "--eval-every", 5]
    with process("train", "--data", text_file, *endless, "--out", "out", cwd=tmp_path) as running:
        assert any(line.startswith("step 10:") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] and 10 <= summary["steps"] < 10**6
    ended, last = output.splitlines()[-2:]
    assert (
        ended.startswith(f"interrupted after {summary['steps']} steps")
        and last == f"val loss {summary['val_loss']:.4f}"
    )
    assert load_model(tmp_path / "out").config.n_layer == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("library", ["libc10", "libtorch_python", "_cpu_features"])
def test_interrupted_while_modules_are_imported(text_file, tmp_path, library):
    """When a library of PyTorch, or this package's first one, has been loaded."""
    with process("train", text_file, *TINY, "--steps", 10**6, "--out", "out", cwd=tmp_path) as running:
        deadline = time.monotonic() + 120
        while library not in Path(f"/proc/{running.pid}/maps").read_text() and time.monotonic() < deadline:
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, output, errors) == (130, "", "interrupted\n")


# generate and predict


def test_generate_prints_the_generated_text(trained):
    out, _ = trained
    ids = load_tokenizer(out).encode("for ")
    expected = load_model(out).generate(torch.tensor([ids]), max_new_tokens=10, temperature=0.8, seed=3)[0].tolist()
    output = run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 3)
    assert output == load_tokenizer(out).decode(expected) + "\n"
    assert output == run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 3)
    assert output != run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 4)


def test_generate_defaults_and_greedy_decoding(trained):
    out, _ = trained
    output = run("generate", "--model", out, "--prompt", "for ", "--temperature", 0)
    expected = load_model(out).generate(torch.tensor([load_tokenizer(out).encode("for ")]), max_new_tokens=200)
    assert expected.shape == (1, 204)  # beyond the context of 16
    assert output == load_tokenizer(out).decode(expected[0].tolist()) + "\n"


def test_generate_at_a_temperature_of_almost_0_is_greedy(trained):
    outputs = [
        run("generate", "--model", trained[0], "--prompt", "for ", "--max-new-tokens", 20, "--temperature", t)
        for t in (0, 1e-40, 5e-324)
    ]
    assert len(set(outputs)) == 1


def test_a_prompt_beyond_the_context_is_read_from_its_end(trained):
    prompt = "for line in lines: print("
    result = fastlm_command("generate", "--model", trained[0], "--prompt", prompt, "--temperature", 0)
    assert result.exit_code == 0 and result.stdout.startswith(prompt)
    assert result.stderr == "the prompt has 25 tokens; the model reads the last 16, its context\n"
    short = run("generate", "--model", trained[0], "--prompt", prompt[-16:], "--temperature", 0)
    assert result.stdout == prompt[:-16] + short


def test_streamer_holds_back_incomplete_characters(capsys):
    from fastlm.commands.streaming import TextStreamer
    from fastlm.generation import Tokenizer
    from fastlm.training.tokenizers import byte_tokenizer

    streamer, seen = TextStreamer(Tokenizer(byte_tokenizer(masked=False))), []
    for byte in "a€b".encode() + b"\xff":
        streamer.put(torch.tensor([byte]))
        seen.append(capsys.readouterr().out)
    streamer.end()
    assert seen == ["a", "", "", "€", "b", ""] and capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "prompt: expected at least one token, got ''"),
        (["--prompt", "for", "--max-new-tokens", 0], "max_new_tokens: expected an integer >= 1, got 0"),
        (["--prompt", "for", "--temperature", -1], "temperature: expected a finite number >= 0, got -1.0"),
        (["--prompt", "for", "--top-k", 0], "top_k: expected an integer >= 1, got 0"),
        (["--prompt", "for", "--top-p", 1.5], r"top_p: expected a probability in \(0, 1\], got 1.5"),
        (["--prompt", "for", "--seed", -1], "seed: expected an integer >= 0, got -1"),
        (["--prompt", "for", "--seed", 2**63], r"seed: expected an integer < 2\^63, got 9223372036854775808"),
    ],
)
def test_generate_errors(trained, arguments, message):
    result = fastlm_command("generate", "--model", trained[0], *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_missing_model_and_wrong_kind_of_model(trained_bert, tmp_path):
    result = fastlm_command("generate", "--model", tmp_path / "none", "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(r"error: .*none/config.json: no such file.*\n", result.stderr)
    (tmp_path / "model.txt").write_text("")
    result = fastlm_command("generate", "--model", tmp_path / "model.txt", "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: .*/model.txt/config.json: no such file; expected a local directory .*\n", result.stderr
    )
    result = fastlm_command("generate", "--model", trained_bert[0], "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: model: expected a causal language model .*, got the BertForMaskedLM in .*\n", result.stderr
    )


def test_predict_next_tokens(trained):
    out, _ = trained
    output = run("predict", "--model", out, "for ", "--top", 3, "--temperature", 2)
    logits = load_model(out)(input_ids=torch.tensor([load_tokenizer(out).encode("for ")])).logits[0, -1]
    scores, tokens = logits.topk(3)
    rows = re.findall(r"│ '(.+?)' +│ +(-?\d+\.\d+) │ +(\d+\.\d+) % │", output)
    assert [float(score) for _, score, _ in rows] == pytest.approx(scores.tolist(), abs=6e-4)
    assert [float(p) for _, _, p in rows] == pytest.approx(
        [100 * p for p in (logits / 2).softmax(-1)[tokens].tolist()], abs=6e-3
    )
    assert "temperature 2" in output


def test_predict_threads(trained):
    rows = [run("predict", "--model", trained[0], "for ", "--threads", n) for n in (1, 2)]
    assert rows[0] == rows[1]
    result = fastlm_command("predict", "--model", trained[0], "for ", "--threads", 0)
    assert result.exit_code == 1 and result.stderr == "error: threads: expected an integer >= 1, got 0\n"


def test_predict_masks(trained_bert):
    output = run("predict", "--model", trained_bert[0], "f[MASK]r l[MASK]ne", "--top", 2)
    assert re.findall(r"│ +(\d) │", output) == ["1", "1", "2", "2"]


# info, bench, demo


def test_info():
    assert run("info") == f"{fastlm.info()}\n"


def test_info_measure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(report, "machine", lambda threads, dtypes: DESCRIBED)
    verdicts = [
        measured_table.Verdict("linear", "float32", "32 × 8 → 8", {"rows": 32}, Ratio(0.8, 0.7, 0.9)),
        measured_table.Verdict("linear", "float32", "1024 × 8 → 8", {"rows": 1024}, Ratio(1.2, 1.1, 1.3)),
    ]
    monkeypatch.setattr(measured_table, "measure", lambda: iter(verdicts))
    table.forget()
    try:
        output = run("info", "--measure")
        assert "2 threads: reads 20.0 GB/s; multiply-adds 200 GFLOP/s in float32" in output
        assert "linear 32 × 8 → 8, float32: speedup over PyTorch 0.80 [0.70–0.90]; backend: torch\n" in output
        assert output.endswith(f"{fastlm.info()}\n")
        assert table.cpu_rules() == (Rule("linear", "float32", {"rows": (None, 181)}),)
    finally:
        table.forget()
        selection.forget()


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Simulates two GPUs of one model and one of another; nothing is launched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Card", "Card", "Other"][index])
    measured = []

    @contextlib.contextmanager
    def device(index):
        measured.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    table.forget()
    yield measured
    table.forget()
    selection.forget()


def test_info_measures_each_gpu_model(two_gpus, monkeypatch):
    """Without a compiled module for the CPU, only the GPUs are measured."""

    first, then = plan.planned()

    def measure(run, device, pairs, baselines):
        assert device == "cuda" and pairs == [*first, *then] and not baselines
        run.failed.append("gelu_mlp: out of memory")
        run.left_out.append("attention")
        slower = {} if two_gpus[-1] == 2 else {"cuda": {"seconds": 1e-6, "median": 0.8, "low": 0.7, "high": 0.9}}
        sizes = {"rows": 64, "width": 64, "dropout": False}
        yield Row("layernorm_residual", "64 × 64", "bfloat16", "forward", "triton", True, 2e-6, {}, slower, sizes)

    monkeypatch.setattr(plan.Run, "measure", measure)
    monkeypatch.setattr(isa, "kernels", None)
    output = run("info", "--measure")
    assert two_gpus == [0, 2]
    assert "layernorm_residual 64 × 64, bfloat16, forward, triton: 2.0 µs; cuda 0.80 [0.70–0.90]\n" in output
    assert "failed: gelu_mlp: out of memory\nskipped, out of time: attention\n" in output and "Other\n" in output
    assert list(json.loads(table.user_table().read_text())) == ["Card"]
    rule = "layernorm_residual in bfloat16 (8 ≤ rows ≤ 512, 8 ≤ width ≤ 512)"
    assert f"GPU: Card: cuda for {rule}; otherwise triton, cuda, torch, reference\n" in output
    assert "nothing to compare" in output and "GPU: Other: not measured, backend order" in output


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


def test_version_and_help():
    assert run("--version") == f"{fastlm.__version__}\n"
    assert all(command in run() for command in ("demo", "info", "train", "generate", "predict", "bench"))
    for command in ("demo", "info", "train", "generate", "predict", "bench"):
        assert "--help" in run(command, "--help")
    result = fastlm_command("dance")
    assert result.exit_code == 2 and result.stderr == "error: No such command 'dance'.\n"
    assert "Did you mean 'train'?" in fastlm_command("trian").stderr


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
        (o, d, n, w)
        for o in choices.DEFAULT_CASES
        for d in ("float32", "bfloat16")
        for n in (1,)
        for w in ("forward", "backward", "forward+backward")
    }
    expected -= {(o, d, n, w) for o, d, n, w in expected if (o, w) == ("linear_cross_entropy", "backward")}
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


@pytest.mark.slow
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
            ["--operators", "accelerated", "--case", "llama"],
            "case: expected a comma-separated list of encoding, bert, gpt2, got 'llama'",
        ),
        (["--operators", "accelerated"], r"checkpoint: expected the folder of a sentence encoder .*, got None"),
        (["--dtypes", "int8"], "dtypes: expected a comma-separated list of float32, bfloat16, got 'int8'"),
        (["--operators", "atention"], "operators: .*, got 'atention'; did you mean 'attention'\\?"),
        (["--plot", "b.foo"], r"plot: expected a file name that ends in one of .*\.png, .*\.svg.*, got 'b.foo'"),
        (["--threads", "1,x"], "threads: expected a comma-separated list of integers from 1 to 4096, got 'x'"),
        (["--directions", "up"], "directions: expected a comma-separated list of forward, backward, .*, got 'up'"),
        (["--seconds", "0"], r"seconds: expected a number in \(0, 3600\), got 0.0"),
        (["--gpu"], r"gpu: expected a GPU that PyTorch can use, got none \(.*\)"),
        (["--json", "/nowhere/b.json"], "json: expected a file name in an existing directory, got '/nowhere/b.json'"),
    ],
)
def test_bench_errors(arguments, message):
    result = fastlm_command("bench", *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(
        demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, layers=1, heads=2, width=32, context=64, batch=4)
    )
    monkeypatch.setattr(demo, "CORPUS_BYTES", 100_000)
    monkeypatch.setattr(demo, "PAIRS", 6)


def test_demo(small_demo, tmp_path):
    output = run("demo", "--out", tmp_path / "out", "--seconds", 1)
    assert re.search(
        r"fastlm +[\d,]+ tokens/s\n +PyTorch +[\d,]+ tokens/s\n +speedup .*: \d+\.\d\d × \(median of 5 pairs",
        output,
    )
    assert "losses agree" in output and "\ndef " in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert output.splitlines()[-1] == f"val loss {summary['val_loss']:.4f}"
    assert summary["val_loss"] < 5 and summary["steps"] > 6 and len(summary["comparison"]["losses"]) == 6
    assert load_model(tmp_path / "out").config.n_positions == 64
    assert ("loss.png" in os.listdir(tmp_path / "out")) == draw_losses(tmp_path / "probe.png", [1.0])
    assert load_tokenizer(tmp_path / "out").encode("def") == list(b"def")


@pytest.mark.parametrize("pair_seconds", [1e-9, 1e9], ids=["ends by time", "ends by number"])
def test_bars_of_the_demo_end_full(small_demo, tmp_path, monkeypatch, pair_seconds):
    shown, show = [], BarReport.show

    def record(bar, completed, *words):
        shown.append(completed / bar.progress.tasks[0].total)
        show(bar, completed, *words)

    monkeypatch.setattr(BarReport, "show", record)
    monkeypatch.setattr(demo, "PAIR_SECONDS", pair_seconds)
    run("demo", "--out", tmp_path / "out", "--seconds", 0.2)
    comparison = shown[: shown.index(1) + 1]
    assert len(comparison) >= 5 and comparison == sorted(comparison) and shown[-1] == 1
    assert all(0 < share <= 1 for share in shown)


def test_demo_fails_if_the_losses_disagree(small_demo, tmp_path, monkeypatch):
    original = PlainGPT2.loss
    monkeypatch.setattr(PlainGPT2, "loss", staticmethod(lambda *batch: original(*batch) * 1.001))
    result = fastlm_command("demo", "--out", tmp_path, "--seconds", 0.1)
    assert result.exit_code == 1 and "losses DISAGREE" in result.stdout
    assert re.fullmatch(
        r"error: losses: expected a relative difference of at most 1e-05 between fastlm and PyTorch, got \d\.\de-0\d\n",
        result.stderr,
    )


def test_demo_without_the_standard_library(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    result = fastlm_command("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: corpus: expected the standard library's source, got no .py file in '.*'\n", result.stderr
    )


def test_interrupted_demo(tmp_path):
    with process("demo", "--threads", 1, cwd=tmp_path) as running:
        assert any(line.startswith("1. ") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in errors + output
    if errors != "interrupted\n":  # before the first step
        assert "interrupted after" in output and (tmp_path / "runs" / "demo" / "model.safetensors").exists()
