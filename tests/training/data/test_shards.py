"""The cache of token ids: what is used again, what is written again, and what a killed process leaves."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers

from fastlm.training import data
from fastlm.training.data import corpus as corpus_module
from fastlm.training.data import shards

TEXT = "for line in lines:\n    print(line, 'naïve')\n" * 60


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def written(monkeypatch):
    """The directories that are written."""
    folders, write = [], corpus_module.write_parts
    monkeypatch.setattr(
        corpus_module, "write_parts", lambda folder, *rest: folders.append(folder) or write(folder, *rest)
    )
    return folders


def bpe(size=300):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=size)
    return tokenizer._tokenizer


def ids(corpus):
    return corpus.train[:].tolist(), corpus.validation[:].tolist()


def whole(corpus):
    return [*corpus.train[:].tolist(), *corpus.validation[:].tolist()]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_ids_are_computed_once(text, cache, written, tokenizer):
    options = {"tokenizer": bpe() if tokenizer == "bpe" else tokenizer, "cache": cache}
    first = data.load([text], **options)
    again = data.load([text], **options)
    assert len(written) == 1 and ids(again) == ids(first) == ids(data.load([text], **options | {"cache": None}))
    assert again.tokenizer.to_str() == first.tokenizer.to_str() and again.sums == first.sums
    assert again.tokenizer.encode(TEXT).ids == whole(again)
    moved = text.rename(text.with_name("other.txt"))
    assert ids(data.load([moved], **options)) == ids(first)
    os.utime(moved, (0, 0))
    data.load([moved], **options, val_fraction=0.3)  # the end of the same text
    assert len(written) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "char"},
        {"masked": True},
        {"val_file": "val.txt"},
        {"paths": ["text.txt", "val.txt"]},
        {"documents": "packed", "val_fraction": 0.5, "paths": ["text.txt", "val.txt"]},
    ],
    ids=str,
)
def test_a_change_is_tokenized_again(text, cache, written, change, monkeypatch):
    monkeypatch.chdir(text.parent)
    text.with_name("val.txt").write_text("val" * 10)
    data.load(["text.txt"], cache=cache)
    options = {"paths": ["text.txt"], "cache": cache} | change
    changed = data.load(options.pop("paths"), **options)
    assert len(written) == 2 and ids(changed) == ids(data.load(change.get("paths", ["text.txt"]), **options))
    assert len(written) == 2
    data.load(["text.txt"], cache=cache)
    assert len(written) == 2  # the first one is still there


def test_a_changed_source_or_tokenizer_is_tokenized_again(text, cache, written):
    data.load([text], cache=cache, tokenizer=bpe(260))
    data.load([text], cache=cache, tokenizer=bpe(264))
    data.load([text], cache=cache, tokenizer=bpe(264), end_of_text=0)
    assert len(written) == 3
    text.write_text(TEXT.replace("for", "far", 1))
    changed = data.load([text], cache=cache, tokenizer=bpe(264))
    assert len(written) == 4 and "far" in changed.tokenizer.decode(changed.train[:40].tolist())


@pytest.mark.parametrize("file", ["training-00000.bin", "training.ends.bin", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_a_damaged_cache_is_written_again_and_named(text, cache, written, file, damage):
    first = data.load([text], cache=cache)
    expected, path = ids(first), first.folder / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "changed" else content[:-1])
    again = data.load([text], cache=cache)
    if file == "manifest.json" and damage != "missing":
        assert len(written) + len(again.damages) in (2, 3)  # a changed letter of a comment is no damage
        return
    assert len(written) == 2 and len(again.damages) == 1 and str(first.folder) in again.damages[0]
    assert ids(again) == expected and not data.load([text], cache=cache).damages
    assert os.listdir(cache) == [first.folder.name]


def test_the_manifest(text, cache):
    corpus = data.load([text], cache=cache, tokenizer="char")
    content = json.loads((corpus.folder / "manifest.json").read_text())
    assert content["sources"] == [{"file": str(text), "sha256": shards.sha256(text)}]
    part = content["parts"]["training"]
    assert part["tokens"] == len(TEXT) and part["documents"] == 1 and part["dtype"] == "|u1"
    stored = np.fromfile(corpus.folder / "training-00000.bin", dtype=np.uint8)
    assert stored.tolist() == whole(corpus)


def test_several_shards(text, cache, monkeypatch):
    expected = ids(data.load([text], val_file=text))
    monkeypatch.setattr(shards, "SHARD", 100)
    corpus = data.load([text], val_file=text, cache=cache)
    size = len(TEXT.encode())
    assert len(list(corpus.folder.glob("training-*.bin"))) == -(-size // 100) == len(corpus.train.shards)
    assert ids(corpus) == expected


def test_large_vocabularies(tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 300))))
    assert data.load([tmp_path / "a.txt"], tokenizer="char").train.dtype == np.uint16
    vocabulary = tokenizers.models.WordLevel({"a": 0, "b": 70_000, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("a b c b " * 5)
    corpus = data.load([tmp_path / "a.txt"], tokenizer=tokenizer, val_fraction=0.5)
    assert corpus.train.dtype == np.uint32 and corpus.train[:].tolist() == [0, 70_000, 1, 70_000] * 2 + [0, 70_000]


def test_a_failure_leaves_nothing(text, cache, monkeypatch):
    before = sorted(text.parent.iterdir())
    with pytest.raises(ValueError, match="data: expected at least 10001 tokens for training"):
        data.load([text], cache=cache, context=10_000)
    assert sorted(text.parent.iterdir()) == before

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.PartWriter, "append", fail)
    with pytest.raises(OSError, match=r"cache: could not write to '.*tokens': No space left on device"):
        data.load([text], cache=cache)
    assert sorted(text.parent.iterdir()) == before


def test_a_file_that_changes_meanwhile(text, cache, monkeypatch):
    write = corpus_module.write_parts

    def change(folder, *rest):
        text.write_text("another text")
        return write(folder, *rest)

    monkeypatch.setattr(corpus_module, "write_parts", change)
    with pytest.raises(ValueError, match=rf"data: expected files that do not change while they are read, got {text}"):
        data.load([text], cache=cache)


def test_threads_wait_for_the_first_one(text, cache, written):
    found = []
    threads = [threading.Thread(target=lambda: found.append(ids(data.load([text], cache=cache)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and found == [found[0]] * 4


def test_what_a_killed_process_left_is_deleted(text, cache, written):
    folder = data.load([text], cache=cache).folder
    folder.rename(cache / f".partial-{folder.name}-abc")
    corpus = data.load([text], cache=cache)
    assert len(written) == 2 and os.listdir(cache) == [corpus.folder.name]


KILLED = """
import sys, time
from fastlm.training import data
from fastlm.training.data import shards
append = shards.PartWriter.append
def slow(self, ids):
    append(self, ids)
    print("writing", flush=True)
    time.sleep(60)
shards.PartWriter.append = slow
data.load([sys.argv[1]], cache=__import__("pathlib").Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_complete(text, cache, written):
    with subprocess.Popen([sys.executable, "-c", KILLED, text, cache], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "writing\n"
        running.send_signal(signal.SIGKILL)
    assert [name[:9] for name in os.listdir(cache)] == [".partial-"]
    corpus = data.load([text], cache=cache)
    assert len(written) == 1 and os.listdir(cache) == [corpus.folder.name] and not corpus.damages
    assert bytes(whole(corpus)).decode() == TEXT


def test_other_texts_are_deleted_from_the_cache_of_a_run(text, cache):
    first = data.load([text], cache=cache)
    second = data.load([text], cache=cache, tokenizer="char")
    (cache / "mine").mkdir()
    shards.keep_only(cache, second.folder)
    assert sorted(os.listdir(cache)) == sorted([second.folder.name, "mine"]) and first.folder != second.folder
