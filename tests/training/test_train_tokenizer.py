import json

import pytest
import tokenizers
import transformers

from fastlm.training.train_tokenizer import train_tokenizer, write_tokenizer

TEXT = "".join(f"def naïve_{i % 7}(x):\n    return x + {i}  # Größe\n" for i in range(300))
SAMPLES = ["def f(x):\n    return x", "Größe NAÏVE 日本語 😀", "", "  two  spaces ", "a\r\nb", "it's [MASK] 12345"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("kind, lowercase", [("bpe", False), ("wordpiece", False), ("wordpiece", True)])
def test_transformers_gives_the_same_ids(text, tmp_path, kind, lowercase):
    tokenizer, files = train_tokenizer([text], kind=kind, vocab_size=300, lowercase=lowercase)
    write_tokenizer(tmp_path / "out", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert files.found == [text] and len(theirs) == tokenizer.get_vocab_size() <= 300
    for sample in [*SAMPLES, TEXT[:500]]:
        ids = tokenizer.encode(sample).ids
        assert theirs(sample)["input_ids"] == ids == stored.encode(sample).ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    if kind == "bpe":
        assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == 0
        assert all(tokenizer.decode(tokenizer.encode(sample).ids) == sample for sample in SAMPLES)
    else:
        names = [theirs.pad_token, theirs.unk_token, theirs.cls_token, theirs.sep_token, theirs.mask_token]
        assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert theirs.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
        tokens = tokenizer.encode("naïve [MASK]", "x").tokens
        assert tokens[0] == "[CLS]" and "[MASK]" in tokens and tokens.count("[SEP]") == 2
        assert (tokenizer.encode("DEF").ids == tokenizer.encode("def").ids) == lowercase


def test_the_vocabulary_is_that_of_the_library(text):
    """Although it reads the text in parts."""
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([TEXT], vocab_size=320, min_frequency=0, special_tokens=["<|endoftext|>"])
    tokenizer, _ = train_tokenizer([text], vocab_size=320)
    assert tokenizer.get_vocab() == own.get_vocab()
    (records := text.with_name("a.jsonl")).write_text(json.dumps({"body": TEXT}))
    assert train_tokenizer([records], vocab_size=320, field="body")[0].get_vocab() == own.get_vocab()


def test_the_smallest_vocabulary(text):
    """The error of a smaller one names its size."""
    assert train_tokenizer([text], kind="wordpiece", vocab_size=56)[0].get_vocab_size() == 56


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "bep"}, "kind: expected one of bpe, wordpiece, got 'bep'; did you mean 'bpe'?"),
        ({"vocab_size": 256}, "vocab_size: expected an integer >= 257, got 256"),
        ({"kind": "wordpiece", "vocab_size": 5}, "vocab_size: expected an integer >= 6, got 5"),
        (
            {"kind": "wordpiece", "vocab_size": 55},
            "vocab_size: expected an integer >= 56 for this text (special tokens, and characters at the start of words "
            "and after it), got 55",
        ),
        ({"lowercase": True}, "lowercase: expected False unless kind is wordpiece, got True"),
        ({"paths": []}, "data: expected at least one file, directory or pattern, got none"),
        ({"paths": ["empty.txt"]}, "data: expected a text that is not empty, got 1 empty file, the first is empty.txt"),
        ({"paths": ["latin.txt"]}, "data: expected UTF-8 text for the tokenizer, got latin.txt, invalid at byte 1"),
    ],
)
def test_errors(text, monkeypatch, options, message):
    monkeypatch.chdir(text.parent)
    text.with_name("empty.txt").write_text("")
    text.with_name("latin.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError) as raised:
        train_tokenizer(**{"paths": [text]} | options)
    assert str(raised.value) == message
