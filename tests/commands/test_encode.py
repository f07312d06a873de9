"""The commands for encoders: encode and rerank."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastlm
from fastlm.benchmarking.machine import threads
from fastlm.commands import encode, partial
from fastlm.integrations import encoding
from fastlm.integrations.encoding.forward import Runner
from tests.commands.support import fastlm_command, process, run
from tests.encoding.support import WORDS, save, texts, write

TEXTS = texts(40, longest=12)
POOLING = {"pooling_mode_mean_tokens": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), pooling=POOLING, after=["Normalize"])


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return save(tmp_path_factory.mktemp("reranker"), head="ForSequenceClassification", num_labels=1)


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "texts.txt", "\n".join(TEXTS) + "\n")


def written(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def embeddings(path):
    return load_file(path)["embeddings"]


def failed(*arguments):
    result = fastlm_command(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, (
        result.output
    )
    return result.stderr.removeprefix("error: ").rstrip("\n")


# encode


def test_it_writes_the_embeddings_of_the_lines(model, file, tmp_path):
    out = tmp_path / "embeddings.safetensors"
    output = run("encode", "--model", model, file, "--out", out)
    assert output.startswith("40 texts, ") and output.endswith(f"40 × 36 embeddings saved to {out}\n")
    assert torch.equal(embeddings(out), fastlm.encode(model, TEXTS))
    assert sorted(os.listdir(tmp_path)) == ["embeddings.safetensors", "texts.txt"]
    with safe_open(out, "pt") as opened:
        described = json.loads(opened.metadata()["fastlm"])
    assert described["pooling"] == "mean" and str(model) in described["model"]


@pytest.mark.parametrize(
    "arguments, options",
    [
        (["--pooling", "cls"], {"pooling": "cls"}),
        (["--no-normalize"], {"normalize": False}),
        (["--prompt", "ab ac "], {"prompt": "ab ac "}),
        (["--max-length", 5], {"max_length": 5}),
        (["--max-tokens-per-batch", 50, "--threads", 1], {"max_tokens_per_batch": 50}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tokens; the first 5 were read")
def test_options(model, file, tmp_path, arguments, options):
    out = tmp_path / "embeddings.safetensors"
    result = fastlm_command("encode", "--model", model, file, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(embeddings(out), fastlm.encode(model, TEXTS, **options), rtol=0, atol=0)
    truncated = re.fullmatch(r"\d+ of 40 texts have more than 5 tokens; the first 5 were read\n", result.stderr)
    assert truncated if "max_length" in options else not result.stderr


def test_16_bits(model, file, tmp_path):
    out = tmp_path / "embeddings.safetensors"
    run("encode", "--model", model, file, "--out", out, "--dtype", "bf16")
    found = embeddings(out)
    assert found.dtype == torch.float32
    error = (found - fastlm.encode(model, TEXTS)).abs().max()
    assert 1e-5 < error < 0.05


def test_every_line_is_a_text_and_every_format_a_file(model, tmp_path):
    lines = ["ab ac", "", "ad\u2028ae", "  af ", "ba\x0cbb"]
    plain = written(tmp_path / "a.txt", "\ufeff" + "\r\n".join(lines))
    objects = [json.dumps({"id": i, "body": line}) for i, line in enumerate(lines)]
    rows = written(tmp_path / "b.JSONL", "\n".join(objects) + "\n")
    out = tmp_path / "out.safetensors"
    run("encode", "--model", model, plain, rows, "--field", "body", "--out", out)
    assert torch.equal(embeddings(out), fastlm.encode(model, lines * 2))


def test_parquet(model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastlm[parquet]'")
    from pyarrow import parquet

    table, out = tmp_path / "a.parquet", tmp_path / "out.safetensors"
    parquet.write_table(pyarrow.table({"text": TEXTS, "number": range(40)}), table)
    run("encode", "--model", model, table, "--out", out)
    assert torch.equal(embeddings(out), fastlm.encode(model, TEXTS))
    command = ("encode", "--model", model, table, "--out", out, "--overwrite")
    got = "got text, number; did you mean 'text'?"
    assert failed(*command, "--field", "txt") == f"{table}: expected the field 'txt' (--field names another), {got}"
    assert failed(*command, "--field", "number") == f"{table}:1: expected a string in the column 'number', got 0"
    table.write_bytes(table.read_bytes()[:100])
    assert failed(*command).startswith(f"{table}: damaged or not a Parquet file (")


def test_parquet_without_pyarrow(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    table = written(tmp_path / "a.parquet", "")
    wanted = "expected an installation with pyarrow (pip install 'fastlm[parquet]'), got one without"
    assert failed("encode", "--model", model, table, "--out", tmp_path / "out") == f"{table}: {wanted}"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "files: expected at least one text, got none in FILE"),
        ("a.txt", b"ab\n\xff", "FILE:2: expected text in UTF-8, got the byte 0xff"),
        (
            "a.jsonl",
            b'{"text": "ab"}\n{"txt": "ac"}',
            "FILE:2: expected the field 'text' .*, got txt; did you mean 'txt'?",
        ),
        ("a.jsonl", b'{"text": 3}', "FILE:1: expected a string in the field 'text', got 3"),
        ("a.jsonl", b'["text"]', "FILE:1: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "ab"}\n{"te', "FILE:2: expected a JSON object, got invalid JSON .*"),
        ("a.txt", None, "files: expected a file, got 'FILE', which does not exist"),
    ],
)
def test_files_that_cannot_be_read(model, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    found = failed("encode", "--model", model, path, "--out", tmp_path / "out").replace(str(path), "FILE")
    assert re.fullmatch(message.replace("?", r"\?"), found), found
    assert not (tmp_path / "out").exists() and not partial.folder_of(tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_dtype_has_two_names(names):
    assert [encode.dtype_of(name) for name in names] == [getattr(torch, names[1])] * 2
    assert encode.dtype_of("auto") is None


def test_wrong_options(model, file, tmp_path):
    command = ("encode", "--model", model, file, "--out", tmp_path / "out")
    for wrong, words in ((tmp_path / "nofile", "which does not exist"), (tmp_path, "a directory")):
        message = f"files: expected a file, got '{wrong}', {words}"
        assert failed("encode", "--model", model, file, wrong, "--out", tmp_path / "out") == message
        assert failed("rerank", "--model", model, file, wrong, "--query", "ab") == message
    message = "dtype: expected one of auto, float32, bfloat16, float16 (also fp32, bf16, fp16), got 'int8'"
    assert failed(*command, "--dtype", "int8") == message
    assert failed(*command, "--pooling", "maen").endswith("got 'maen'; did you mean 'mean'?")
    assert failed(*command, "--prompt-name", "q") == "prompt_name: expected None, as the model has none, got 'q'"
    assert failed(*command, "--max-tokens-per-batch", 0).startswith("max_tokens_per_batch: expected an integer of 1")
    missing = tmp_path / "no" / "out"
    wanted = f"out: expected a file in a writable directory, got '{missing}'"
    assert failed("encode", "--model", model, file, "--out", missing) == wanted
    assert failed("encode", "--model", tmp_path, file, "--out", tmp_path / "out").startswith(
        f"model: {tmp_path}/config.json: no"
    )
    assert failed("encode", "--model", model, file, "--out", tmp_path).startswith("out: expected a file, got the dir")
    assert sorted(os.listdir(tmp_path)) == ["texts.txt"]


def test_an_installation_without_transformers(model, file, tmp_path, monkeypatch):
    for name in ("embed", "pairs"):
        monkeypatch.delattr(encoding, name, raising=False)
        monkeypatch.setitem(sys.modules, f"fastlm.integrations.encoding.{name}", None)
    message = "model: expected an installation with transformers (pip install transformers), got one without"
    assert failed("encode", "--model", model, file, "--out", tmp_path / "out") == message
    assert failed("rerank", "--model", model, file, "--query", "ab") == message


def test_a_text_without_tokens_is_named_by_its_line(tmp_path):
    directory = save(tmp_path / "model", special=False)
    file = written(tmp_path / "a.txt", "ab\nac\n\nad\n")
    message = failed("encode", "--model", directory, file, "--out", tmp_path / "out")
    assert message == f"{file}:3: expected a text of at least one token, got ''"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "model"]


def test_an_output_is_replaced_only_if_asked(model, file, tmp_path):
    out = written(tmp_path / "out", "old")
    command = ("encode", "--model", model, file, "--out", out)
    assert failed(*command) == f"out: expected a new file, got '{out}', which exists; --overwrite replaces it"
    assert out.read_text() == "old"
    run(*command, "--overwrite")
    assert embeddings(out).shape == (40, 36)


# Interrupted runs


def stop_after(monkeypatch, batches, error):
    """Raise an error in the call of the model after so many batches."""
    calls, call = [], Runner.hidden_states

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) > batches:
            raise error
        return call(self, *arguments)

    monkeypatch.setattr(Runner, "hidden_states", stopping)
    return calls


def interrupted(model, file, out, batches=5, *more):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, batches, KeyboardInterrupt())
        result = fastlm_command("encode", "--model", model, file, "--out", out, "--max-tokens-per-batch", 30, *more)
    assert result.exit_code == 130
    return result.stderr


def test_only_what_is_missing_is_computed(model, file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    message = interrupted(model, file, out)
    found = re.fullmatch(
        r"interrupted after (\d+) of 40 texts, which were saved; the same command continues\n", message
    )
    assert found and not out.exists()
    calls = stop_after(monkeypatch, 1000, None)
    command = ("encode", "--model", model, file, "--out", out, "--max-tokens-per-batch")
    output = run(*command, 30)
    assert f"continues after {found[1]} texts of an interrupted run" in output
    continued, number = embeddings(out), len(calls)
    run("encode", "--model", model, file, "--out", tmp_path / "whole", "--max-tokens-per-batch", 30)
    assert len(calls) - number == number + 5
    assert torch.equal(continued, embeddings(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.txt", "whole"]


def test_nothing_is_left_of_a_run_that_computed_nothing(model, file, tmp_path):
    assert interrupted(model, file, tmp_path / "out", 0) == "interrupted\n"
    assert os.listdir(tmp_path) == ["texts.txt"]


def test_results_of_another_model_are_named(model, file, tmp_path):
    out = tmp_path / "out"
    interrupted(model, file, out)
    other = save(tmp_path / "other", pooling=POOLING, after=["Normalize"], num_hidden_layers=1)
    command = ("encode", file, "--out", out, "--max-tokens-per-batch", 30, "--model")
    message = failed(*command, other)
    wanted = rf"expected partial results of model {other} \(SHA-256 \w+\), got those of {model} \(SHA-256 \w+\)"
    assert re.fullmatch(rf"out: {out}.partial: {wanted}; --overwrite starts again", message), message
    assert "expected partial results of pooling cls, got those of mean" in failed(*command, model, "--pooling", "cls")
    with open(file, "a") as opened:
        opened.write("ab\n")
    assert "expected partial results of texts " in failed(*command, model)
    run(*command, other, "--overwrite")
    expected = fastlm.encode(other, [*TEXTS, "ab"], max_tokens_per_batch=30)
    assert torch.equal(embeddings(out), expected) and not partial.folder_of(out).exists()


def test_overwrite_continues_its_own_results(model, file, tmp_path):
    out = written(tmp_path / "out", "old")
    interrupted(model, file, out, 5, "--overwrite")
    assert out.read_text() == "old"
    output = run("encode", "--model", model, file, "--out", out, "--max-tokens-per-batch", 30, "--overwrite")
    assert "continues after" in output and embeddings(out).shape == (40, 36)


def test_damaged_partial_results_and_two_processes(model, file, tmp_path):
    out = tmp_path / "out"
    interrupted(model, file, out)
    command = ("encode", "--model", model, file, "--out", out, "--max-tokens-per-batch", 30)
    with partial.opened(out, {}, (1, 1), overwrite=False):
        assert failed(*command) == f"out: expected no other process that writes '{out}', got one"
    state = partial.folder_of(out) / partial.STATE
    content = state.read_text()
    state.write_text(content[:40])
    assert failed(*command) == f"{state}: damaged; --overwrite starts again"
    state.write_text(content)
    assert "continues after" in run(*command)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_can_be_continued(model, tmp_path, number):
    found = texts(10_000, longest=12)  # for more than a second, after which results are saved
    written(tmp_path / "a.txt", "\n".join(found))
    command = ("encode", "--model", model, "a.txt", "--out", "out", "--max-tokens-per-batch", 1, "--threads", 1)
    with process(*command, cwd=tmp_path) as first:
        while not (tmp_path / "out.partial" / partial.STATE).exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(number)
        _, errors = first.communicate(timeout=120)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert first.returncode == 130 and "which were saved; the same command continues\n" in errors
    with process(*command, cwd=tmp_path) as second:
        output, errors = second.communicate(timeout=500)
    assert second.returncode == 0 and "continues after " in output, errors
    with threads(1):  # PyTorch's products, which small calls take, depend on their number
        expected = fastlm.encode(model, found, max_tokens_per_batch=1)
    assert torch.equal(embeddings(tmp_path / "out"), expected)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


# rerank


def test_rerank_prints_scores_and_texts_in_descending_order(reranker, file):
    scores = fastlm.rerank(reranker, "ab ac", TEXTS)
    order = scores.argsort(descending=True, stable=True).tolist()
    output = run("rerank", "--model", reranker, "--query", "ab ac", file)
    assert output.splitlines() == [f"{scores[i].item():.6g}\t{TEXTS[i]}" for i in order]
    rows = run("rerank", "--model", reranker, "--query", "ab ac", file, "--top", 3, "--json").splitlines()
    expected = [{"score": scores[i].item(), "place": f"{file}:{i + 1}", "text": TEXTS[i]} for i in order[:3]]
    assert [json.loads(row) for row in rows] == expected


def test_rerank_counts_truncated_pairs(reranker, tmp_path):
    file = written(tmp_path / "a.jsonl", json.dumps({"body": " ".join(WORDS[:60])}))
    result = fastlm_command("rerank", "--model", reranker, "--query", "ab", file, "--field", "body")
    assert result.exit_code == 0 and result.stderr == "1 of 1 pair has more than 48 tokens; the first 48 were read\n"


def test_rerank_errors(reranker, model, file):
    command = ("rerank", "--query", "ab", file, "--model")
    assert failed(*command, reranker, "--top", 0) == "top: expected an integer >= 1, got 0"
    expected = f"{model}: expected all weights of a BertForSequenceClassification, got none for classifier.bias"
    assert failed(*command, model) == expected
    settings = json.loads((reranker / "config.json").read_text())
    try:
        write(reranker / "config.json", settings | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}})
        assert failed(*command, reranker).startswith(f"{reranker}: the model could not be read (")
    finally:
        write(reranker / "config.json", settings)
