"""`fastlm train` on formats other than text files, with other tokenizers, and its cache; `fastlm tokenizer train`."""

import json
import os
import re
import shutil

import pytest
import transformers

from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from fastlm.training.data import corpus
from tests.commands.support import TEXT, TINY, assert_same_run, fastlm_command, run
from tests.commands.test_resume import interrupt

SETTINGS = [*TINY, "--checkpoint-every", 4, "--threads", 1]
RECORDS = [f"for line in lines[{i}]:\n    print(line, 'naïve')" for i in range(60)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "text.jsonl"
    file.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(RECORDS)))
    return file


@pytest.fixture(scope="module")
def bpe(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers") / "bpe"
    assert f"264 tokens from 1 file; saved to {out}\n" in run(
        "tokenizer", "train", text_file, "--vocab-size", 264, "--out", out
    )
    return out


@pytest.fixture(scope="module")
def word_pieces(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers") / "wordpiece"
    run("tokenizer", "train", text_file, "--kind", "wordpiece", "--lowercase", "--vocab-size", 60, "--out", out)
    return out


@pytest.fixture
def written(monkeypatch):
    """The directories into which token ids are written."""
    folders, write = [], corpus.write_parts
    monkeypatch.setattr(corpus, "write_parts", lambda folder, *rest: folders.append(folder) or write(folder, *rest))
    return folders


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_packed_records_with_a_trained_tokenizer(records, bpe, tmp_path, monkeypatch):
    given = [records, "--field", "body", "--documents", "packed", "--tokenizer", bpe, *SETTINGS]
    run("train", *given, "--out", tmp_path / "whole")
    settings = summary_of(tmp_path / "whole")["settings"]
    assert (settings["documents"], settings["field"], settings["tokenizer"]) == ("packed", "body", str(bpe))
    config = load_model(tmp_path / "whole").config
    assert (config.vocab_size, config.eos_token_id) == (264, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert theirs(TEXT)["input_ids"] == load_tokenizer(bpe).encode(TEXT) and theirs.eos_token == "<|endoftext|>"
    copied = shutil.copytree(bpe, tmp_path / "bpe")
    given[given.index(bpe)] = copied
    interrupt(monkeypatch, *given, "--out", tmp_path / "out", at=8)
    shutil.rmtree(copied)  # once there is a checkpoint, it has the tokenizer
    run("train", "--resume", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("at", [4, 8])
def test_resume_with_a_tokenizer_file(text_file, word_pieces, tmp_path, monkeypatch, at):
    file = tmp_path / "pieces.json"
    shutil.copy(word_pieces / "tokenizer.json", file)
    given = [text_file, "--tokenizer", file, "--objective", "masked-token", "--whole-words", *SETTINGS]
    run("train", *given, "--out", tmp_path / "whole")
    interrupt(monkeypatch, *given, "--out", tmp_path / "out", at=at)
    monkeypatch.chdir("/")
    if at == 4:
        file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))
        result = fastlm_command("train", "--resume", tmp_path / "out")
        expected = "tokenizer: expected the one that the run was started with, got a changed one"
        assert result.exit_code == 1 and result.stderr == f"error: {expected}\n"
        shutil.copy(word_pieces / "tokenizer.json", file)
    run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.mask_token == "[MASK]" and theirs(TEXT)["input_ids"] == load_tokenizer(word_pieces).encode(TEXT)
    assert load_model(tmp_path / "out").config.pad_token_id == 0


def test_token_ids_of_a_run_are_used_again(text_file, tmp_path, monkeypatch, written):
    out = tmp_path / "out"
    interrupt(monkeypatch, text_file, *SETTINGS, "--out", out, at=8)
    run("train", "--resume", out)
    run("train", text_file, *SETTINGS, "--seed", 1, "--out", out, "--overwrite")
    assert len(written) == 1
    (folder,) = (out / "tokens").iterdir()
    (shard,) = folder.glob("training-*.bin")
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert f"tokenized again: {shard}, which has changed\n" in run("train", "--resume", out)
    assert len(written) == 2
    run("train", text_file, *SETTINGS, "--tokenizer", "char", "--out", out, "--overwrite")
    assert len(written) == 3 and len(os.listdir(out / "tokens")) == 1  # those of the earlier run are deleted


def test_several_runs_with_one_cache(text_file, tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run("train", text_file, *SETTINGS, "--cache", "cache", "--out", name)
    assert len(written) == 1 and not (tmp_path / "one" / "tokens").exists()
    monkeypatch.chdir("/")
    run("train", "--resume", tmp_path / "two")
    assert len(written) == 1
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--field", "bdy"], r".*/text.jsonl:1: expected the field 'bdy' \(--field names another\), got id, body; .*"),
        (["--field", "id"], ".*/text.jsonl:1: expected a string in the field 'id', got 0"),
        (["--documents", "pack"], "documents: expected one of stream, packed, got 'pack'; did you mean 'packed'\\?"),
        (["--whole-words"], "whole_words: expected False unless objective is masked-token, got True"),
        (["--tokenizer", "chr"], "tokenizer: expected byte, char, .*, got 'chr'; did you mean 'char'\\?"),
        (["--tokenizer", "."], r"\.: expected a tokenizer \(tokenizer.json, .*\), found none"),
        (["--tokenizer", "a.json"], r"a.json: the tokenizer could not be read \(.*\)"),
        (
            ["--tokenizer", "bpe", "--objective", "masked-token"],
            r"tokenizer: expected a tokenizer with \[MASK\] or <mask> for masked-token training, got one without",
        ),
    ],
)
def test_errors_write_nothing(records, bpe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{")
    shutil.copytree(bpe, tmp_path / "bpe")
    before = sorted(os.listdir(tmp_path))
    result = fastlm_command("train", records, *(["--field", "body"] if "--field" not in arguments else []), *arguments)
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.txt"], "data: expected a file, a directory with text files or a pattern .*, got 'nowhere.txt'"),
        (["a.txt", "--kind", "bep"], "kind: expected one of bpe, wordpiece, got 'bep'; did you mean 'bpe'\\?"),
        (["a.txt", "--vocab-size", 3], "vocab_size: expected an integer >= 257, got 3"),
        (["a.txt", "--out", "a.txt"], "out: expected a directory or a path for a new one, got the file 'a.txt'"),
        (
            ["a.txt", "--out", "bpe"],
            "out: expected a directory without a tokenizer, got 'bpe', which has tokenizer.json; "
            "--overwrite replaces it",
        ),
        ([], "Missing argument 'PATH.*'."),
    ],
)
def test_errors_of_training_a_tokenizer(bpe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    shutil.copytree(bpe, tmp_path / "bpe")
    before = sorted(os.listdir(tmp_path))
    result = fastlm_command("tokenizer", "train", *(arguments if "--out" in arguments else [*arguments, "--out", "x"]))
    assert result.exit_code in (1, 2) and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == before
    assert "train" in run("tokenizer")


def test_a_tokenizer_is_overwritten_on_request(text_file, word_pieces, tmp_path):
    out = shutil.copytree(word_pieces, tmp_path / "out")
    (tmp_path / "data").mkdir()
    shutil.copy(text_file, tmp_path / "data" / "a.txt")
    (tmp_path / "data" / ".hidden").write_text("x")
    output = run("tokenizer", "train", tmp_path / "data", "--vocab-size", 260, "--out", out, "--overwrite")
    assert f"skipped 1 file, hidden or binary: {tmp_path / 'data' / '.hidden'}\n" in output
    assert load_tokenizer(out).vocab_size == 260
