import numpy as np
import pytest
import tokenizers
import torch

from fastlm.training import data
from fastlm.training.data import texts


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def text_of(ids):
    return bytes(ids.tolist()).decode()


def test_order_of_files_directories_and_patterns(tmp_path):
    write(tmp_path, b_txt="B", a_txt="A", sub__c_txt="C", sub__d_txt="D")
    names = lambda *paths: [p.name for p in data.find_files("data", paths).found]  # noqa: E731
    assert names(tmp_path) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert names(tmp_path / "b.txt", tmp_path / "a.txt") == ["b.txt", "a.txt"]
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert text_of(data.load([tmp_path / "sub", tmp_path / "a.txt"], val_fraction=0.01).train[:]) == "CDA"


def test_hidden_and_binary_files_are_skipped_unless_named(tmp_path):
    write(tmp_path, a_txt="A", **{".git__config": "G", ".hidden": "H"}, image=b"\x89PNG\0\0")
    found, skipped = data.find_files("data", [tmp_path])
    assert [p.name for p in found] == ["a.txt"]
    assert [p.name for p in skipped] == ["config", ".hidden", "image"]
    assert data.load([tmp_path]).skipped == tuple(skipped)
    named, skipped = data.find_files("data", [tmp_path / "image", tmp_path / ".hidden"])
    assert [p.name for p in named] == ["image", ".hidden"] and not skipped


def test_files_below_a_named_hidden_directory(tmp_path):
    write(tmp_path / ".cache", a_txt="A")
    assert len(data.find_files("data", [tmp_path / ".cache"]).found) == 1


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_ids_equal_those_of_the_tokenizer(tmp_path, tokenizer):
    text = "zwölf Boxkämpfer\r\n\tjagen € 😀 " * 5
    corpus = data.load([write(tmp_path, a_txt=text)], tokenizer=tokenizer, val_fraction=0.25)
    ids = torch.cat([corpus.train[:], corpus.validation[:]]).tolist()
    assert ids == corpus.tokenizer.encode(text).ids
    assert len(corpus.validation) == round(0.25 * len(ids))
    assert corpus.train.dtype == np.uint8


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_chunks_end_anywhere_in_a_character(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(texts, "CHUNK", chunk)
    text = "zwölf Boxkämpfer\r\n\tjagen € 😀"
    corpus = data.load([write(tmp_path, a_txt=text)], tokenizer="char", val_fraction=0.25)
    assert torch.cat([corpus.train[:], corpus.validation[:]]).tolist() == corpus.tokenizer.encode(text).ids
    for wrong, place in ((b"ab\xffcd", 2), ("abc€".encode()[:-1], 3), (b"\x80", 0)):
        with pytest.raises(ValueError, match=f"a.txt, invalid at byte {place}$"):
            data.load([write(tmp_path, a_txt=wrong)], tokenizer="char")


def test_vocabulary_of_more_than_256_characters(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(300))
    corpus = data.load([write(tmp_path, a_txt=text)], tokenizer="char")
    assert corpus.tokenizer.get_vocab_size() == 300
    assert corpus.train[:].tolist() == list(range(270))


def test_validation_file_shares_the_vocabulary(tmp_path):
    write(tmp_path, a_txt="abab", b_txt="cb")
    corpus = data.load([tmp_path / "a.txt"], tokenizer="char", val_file=tmp_path / "b.txt")
    assert corpus.train[:].tolist() == [0, 1, 0, 1]
    assert corpus.validation[:].tolist() == [2, 1]


def test_a_file_is_read_once_by_whichever_path_it_is_named(tmp_path):
    write(tmp_path, a_txt="ab", b_txt="cd")
    (tmp_path / "link.txt").symlink_to("b.txt")
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / "link.txt", tmp_path / "a.txt", tmp_path / "folder" / ".." / "a.txt", tmp_path]
    corpus = data.load(paths, val_fraction=0.5)
    assert bytes(corpus.train[:].tolist() + corpus.validation[:].tolist()) == b"cdab"
    assert corpus.files == (tmp_path / "link.txt", tmp_path / "a.txt")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: data.load([f / "none.txt"]), r"data: expected a file, a directory .*, got '.*none.txt'"),
        (
            lambda f: data.load([f / "*.nothing"]),
            r"data: expected .* a pattern that matches text files, got '.*\*\.nothing'",
        ),
        (lambda f: data.load([]), r"data: expected at least one file, directory or pattern, got none"),
        (
            lambda f: data.load([f / "empty.txt"]),
            r"data: expected a text that is not empty, got 1 empty file, the first is .*empty.txt",
        ),
        (lambda f: data.load([f / "a.txt"], val_file=f / "none.txt"), r"val_file: expected a file"),
        (lambda f: data.load([f / "a.txt"], tokenizer="bpe"), r"tokenizer: expected one of byte, char, got 'bpe'"),
        (lambda f: data.load([f / "a.txt"], val_fraction=0.0), r"val_fraction: expected a number in \(0, 1\), got 0.0"),
        (lambda f: data.load([f / "a.txt"], val_fraction=1.0), r"val_fraction: expected a number in \(0, 1\), got 1.0"),
        (
            lambda f: data.load([f / "latin.txt"], tokenizer="char"),
            r"data: expected UTF-8 text for the char tokenizer .*, got .*latin.txt, invalid at byte 1",
        ),
        (
            lambda f: data.check_length(data.load([f / "a.txt"]), 64),
            r"data: expected at least 65 tokens for training \(.*\), got 36",
        ),
        (
            lambda f: data.check_length(data.load([f / "a.txt"]), 8),
            r"val_fraction or val_file: expected at least 9 tokens for validation \(.*\), got 4",
        ),
        (
            lambda f: data.load([f / "a.txt"], documents="packed", context=8),
            r"expected at least 9 tokens for validation \(.*\), got 0 in 0 of 1 documents, which are chosen by their",
        ),
    ],
)
def test_errors(tmp_path, call, message):
    write(tmp_path, a_txt="a" * 40, empty_txt="", latin_txt=b"a\xff\xfe")
    with pytest.raises((ValueError, OSError), match=message):
        call(tmp_path)


def test_ids_of_a_tokenizer_are_those_of_the_whole_text(monkeypatch, tmp_path):
    """Although long texts are encoded in parts."""
    text = "".join(f"def f{i}(x):\n    # naïve\n\n    return x\n\nx = {i}\ny = 2\n\n\n" for i in range(40))
    (tmp_path / "text.txt").write_text(text)
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([text], vocab_size=400)
    monkeypatch.setattr(texts, "CHUNK", 40)  # "\n\n" is a token, which the text has before indented lines only
    corpus = data.load([tmp_path / "text.txt"], tokenizer=own._tokenizer, val_fraction=0.1)
    assert len(list(texts.paragraphs([text]))) > 10 and "".join(texts.paragraphs([text])) == text
    assert [*corpus.train[:].tolist(), *corpus.validation[:].tolist()] == own.encode(text).ids
    (tmp_path / "binary.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"data: expected UTF-8 text for the tokenizer, got .*, invalid at byte 1"):
        data.load([tmp_path / "binary.txt"], tokenizer=own._tokenizer)


def test_texts_without_paragraphs_are_cut_between_words(monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 10)
    words = "word " * 100
    parts = list(texts.paragraphs([words[i : i + 7] for i in range(0, 500, 7)]))
    assert "".join(parts) == words and max(map(len, parts)) <= 16 * 10 + 7
    assert all(part.startswith(" word") and part.endswith("word") for part in parts[1:-1])
    without_spaces = "文字文字文字。\n\n" * 60  # an empty line before each line
    parts = list(texts.paragraphs([without_spaces[i : i + 7] for i in range(0, 600, 7)]))
    assert "".join(parts) == without_spaces[:602] and all(part.startswith("文") for part in parts[1:-1])
    lines = list(texts.paragraphs(["x" * 1000]))
    assert "".join(lines) == "x" * 1000 and max(map(len, lines)) <= 16 * 10
