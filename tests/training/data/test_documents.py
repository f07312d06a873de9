"""Documents: which side of the split they fall on, what separates them, and training on packed ones."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import pytest
import tokenizers
import torch

from fastlm.models import CausalLM, LlamaConfig
from fastlm.training import data
from fastlm.training.batches import evaluation_batches, training_batch
from fastlm.training.data import pipeline, workers
from fastlm.training.loop import train
from fastlm.training.models import build, objective_of
from fastlm.training.objectives import IGNORED, NextToken
from fastlm.training.settings import Settings

WORDS = [f"document {i}: {'x' * (i % 7)}" for i in range(200)]


def json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(tokens):
    """The texts of the documents of a part, of bytes."""
    ends = [0, *tokens.ends.tolist()]
    return [bytes(tokens[begin:end].tolist()).decode() for begin, end in itertools.pairwise(ends)]


def sides(paths, **options):
    corpus = data.load(paths, **options)
    return {text.removesuffix("\n") for text in documents(corpus.train)}, {
        text.removesuffix("\n") for text in documents(corpus.validation)
    }


def test_a_document_falls_on_the_same_side_whatever_the_others(tmp_path):
    every = json_lines(tmp_path / "a.jsonl", WORDS)
    train, validation = sides([every], val_fraction=0.3)
    assert train | validation == set(WORDS) and not train & validation
    assert 60 - 4 * 6.5 < len(validation) < 60 + 4 * 6.5  # binomial: standard deviation 6.5
    shuffled = random.Random(0).sample(WORDS, 120)
    one, two = json_lines(tmp_path / "b.jsonl", shuffled[:50]), json_lines(tmp_path / "c.jsonl", shuffled[50:])
    fewer_train, fewer_validation = sides([two, one], val_fraction=0.3)
    assert fewer_train == train & set(shuffled) and fewer_validation == validation & set(shuffled)
    _, more = sides([every], val_fraction=0.5)
    assert validation < more
    for i, text in enumerate(WORDS):  # as files, packed
        (tmp_path / f"{i}.txt").write_text(text)
    as_files = sides([tmp_path / "*.txt"], val_fraction=0.3, documents="packed")
    assert as_files == (train, validation)


def test_text_files_in_one_stream_are_cut_at_the_end(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    corpus = data.load([tmp_path], val_fraction=0.5)
    assert bytes(corpus.train[:].tolist()) == b"a" * 10 + b"b" * 5
    assert documents(corpus.train)[0] == "a" * 10


def bpe(*special):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(WORDS, vocab_size=300, special_tokens=list(special))
    return tokenizer._tokenizer


def test_what_follows_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("more")
    (tmp_path / "empty.txt").write_text("")
    json_lines(tmp_path / "c.jsonl", ["one", "two", ""])
    paths = [tmp_path / name for name in ("a.txt", "empty.txt", "b.txt", "c.jsonl")]
    read = lambda **options: data.load(paths, val_file=paths[0], **options).train  # noqa: E731
    assert documents(read()) == ["text", "more", "one\n", "two\n", "\n"]
    tokenizer = bpe("<|endoftext|>")
    for end, ending in ((None, "\n"), (0, "<|endoftext|>")):
        tokens = read(tokenizer=tokenizer, end_of_text=end)
        text = tokenizer.decode(tokens[:].tolist(), skip_special_tokens=False)
        assert text == "".join(
            part + ending * (end == 0 or place > 1) for place, part in enumerate(["text", "more", "one", "two", ""])
        )
        assert len(tokens.ends) == 5 and tokens.ends[-1] == len(tokens)


def test_chars_of_records_include_the_line_break(tmp_path):
    corpus = data.load([json_lines(tmp_path / "a.jsonl", WORDS)], tokenizer="char")
    assert corpus.tokenizer.token_to_id("\n") == 0
    assert (corpus.train[:] == 0).sum() == len(corpus.train.ends)


def test_batches_of_packed_documents(tmp_path):
    """Positions begin again, and the last token of a document predicts nothing."""
    corpus = data.load([json_lines(tmp_path / "a.jsonl", WORDS)], documents="packed")
    settings = Settings(layers=1, heads=2, width=16, context=40, batch=4, documents="packed")
    inputs, targets = training_batch(corpus.train, settings, NextToken(), 3)
    assert inputs.shape == (4, 2, 40) and targets.shape == (4, 40)
    for (ids, positions), row in zip(inputs, targets, strict=True):
        text = bytes(ids.tolist())
        ends = [i for i, byte in enumerate(text) if byte == 10]
        assert len(ends) >= 1
        assert [i for i in range(1, 40) if positions[i] == 0] == [end + 1 for end in ends if end < 39]
        assert [i for i in range(40) if row[i] == IGNORED] == ends
        assert all(row[i] == ids[i + 1] for i in range(39) if i not in ends)
    same, _ = training_batch(corpus.train, dataclasses.replace(settings, documents="stream"), NextToken(), 3)
    assert torch.equal(same, inputs[:, 0])


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_loss_of_packed_documents_is_that_of_each_alone(tmp_path, kind):
    masked = kind == "bert"
    objective = "masked-token" if masked else "next-token"
    corpus = data.load([json_lines(tmp_path / "a.jsonl", WORDS)], documents="packed", masked=masked)
    settings = Settings(
        layers=2, heads=2, width=32, context=64, batch=3, documents="packed", objective=objective, whole_words=masked
    )
    model = build(settings, corpus.tokenizer)
    if kind == "llama":
        sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        model = CausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model = model.double().eval()
    task = objective_of(settings, corpus.tokenizer)
    for inputs, targets in list(evaluation_batches(corpus.validation, settings, task))[:2]:
        total, count = 0.0, 0
        for (ids, positions), row in zip(inputs, targets, strict=True):
            begins = [i for i in range(64) if positions[i] == 0]
            for begin, end in zip(begins, [*begins[1:], 64], strict=True):
                if predicted := int((row[begin:end] != IGNORED).sum()):
                    loss = task.loss(model, ids[None, begin:end], row[None, begin:end])
                    total, count = total + loss * predicted, count + predicted
        torch.testing.assert_close(task.loss(model, inputs, targets), total / count)


def test_training_on_packed_documents(tmp_path):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["alpha", "bravo", "gamma", "delta"], k=6)) for _ in range(1500)]
    corpus = data.load([json_lines(tmp_path / "a.jsonl", texts)], tokenizer="char", documents="packed")
    settings = Settings(
        layers=1, heads=2, width=32, context=48, batch=8, steps=40, lr=1e-2, min_lr=1e-3, warmup=5, documents="packed"
    )
    result = train(settings, corpus)
    assert result.val_loss < 1.5 < 2.4 < result.losses[0]  # 2.46 is the entropy of a character
    again = train(dataclasses.replace(settings, decay_steps=40, steps=5), corpus)
    assert again.losses == result.losses[:5]


def test_other_processes_give_the_same_ids(tmp_path, monkeypatch):
    rng = random.Random(0)
    file = json_lines(tmp_path / "a.jsonl", [" ".join(rng.choices(WORDS, k=9)) for _ in range(200)])
    (tmp_path / "b.txt").write_text("\n".join(rng.choices(WORDS, k=2000)))
    paths, options = [file, tmp_path / "b.txt"], {"tokenizer": bpe("<|endoftext|>"), "end_of_text": 0}
    expected, seen = data.load(paths, **options), []
    monkeypatch.setattr(pipeline, "ALONE", 0)
    monkeypatch.setattr(pipeline, "BATCH", 3000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    corpus = data.load(paths, **options, progress=lambda *progress: seen.append(progress))
    for part, other in ((corpus.train, expected.train), (corpus.validation, expected.validation)):
        assert torch.equal(part[:], other[:]) and part.ends.tolist() == other.ends.tolist()
    total = sum(path.stat().st_size for path in paths)
    assert len(seen) > 5 and seen == sorted(seen) and ("reading", total, total) in seen
    assert seen[-1] == ("tokenizing", total, total)


def test_a_character_outside_the_vocabulary(tmp_path):
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(ValueError, match="data: expected characters of the tokenizer's vocabulary, got others"):
        data.load([tmp_path / "a.txt"], tokenizer=vocabulary)


def test_errors_of_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(ValueError, match=r"data: expected characters of the tokenizer's vocabulary, got others \(.*\)"):
        data.load([tmp_path / "a.txt"], tokenizer=vocabulary)
    started, start = [], workers.start
    monkeypatch.setattr(workers, "start", lambda: started.append(start()) or started[-1])
    encode = workers.Workers.encode

    def encode_in_a_killed_process(self, contents):
        started[0].kill()
        started[0].wait()
        return encode(self, contents)

    monkeypatch.setattr(workers.Workers, "encode", encode_in_a_killed_process)
    message = "threads: expected as many processes as there is memory for, got 2, of which one was killed"
    with pytest.raises(ValueError, match=message):
        data.load([tmp_path / "a.txt"], tokenizer=bpe())
    assert all(process.poll() is not None for process in started)


MEMORY = """
import pathlib, resource, sys
from fastlm.models import CausalLM, LlamaConfig
from fastlm.training import data
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
data.load([sys.argv[1] + "/small.txt"], tokenizer=sys.argv[2])
before = peak()
corpus = data.load([sys.argv[1] + "/large.txt"], tokenizer=sys.argv[2], cache=pathlib.Path(sys.argv[1]) / "cache")
print(peak() - before, len(corpus.train))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer):
    line = "a line of a text that is otherwise ASCII 😀\n"
    for name, size in (("small", 10_000_000), ("large", 200_000_000)):
        (tmp_path / f"{name}.txt").write_text(line * (size // len(line)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, tokenizer], capture_output=True, text=True, check=True
    )
    megabytes, tokens = map(float, done.stdout.split())
    assert tokens > 150_000_000 and megabytes < 20
