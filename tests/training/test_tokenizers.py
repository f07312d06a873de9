import pytest
from tokenizers import Tokenizer

from fastlm.training.tokenizers import MASK, PAD, byte_tokenizer, char_tokenizer

TEXT = "def naïve(x):\r\n\treturn '€ 日本 \U0001f600'  # \x00 [CLS]\n"


@pytest.mark.parametrize("masked", [False, True])
def test_byte_tokenizer(masked):
    tokenizer = byte_tokenizer(masked=masked)
    ids = tokenizer.encode(TEXT).ids
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.get_vocab_size() == 256 + 2 * masked


def test_byte_tokenizer_covers_all_bytes():
    tokenizer = byte_tokenizer(masked=False)
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    assert tokenizer.decode([0xC3, 0xA9, 0xFF, 0x41]) == "é\ufffdA"


def test_char_tokenizer():
    characters = sorted(set(TEXT))
    tokenizer = char_tokenizer(characters, masked=False)
    assert tokenizer.encode(TEXT).ids == [characters.index(c) for c in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert tokenizer.get_vocab_size() == len(characters)


def test_unknown_character_is_an_error():
    with pytest.raises(Exception, match="vocabulary"):
        char_tokenizer("abc", masked=False).encode("abd")


@pytest.mark.parametrize(
    "make", [lambda: byte_tokenizer(masked=True), lambda: char_tokenizer("abc", masked=True)], ids=["byte", "char"]
)
def test_special_tokens_have_the_last_ids(make):
    tokenizer = make()
    size = tokenizer.get_vocab_size()
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(MASK)) == (size - 2, size - 1)
    assert tokenizer.encode("a[MASK]b").ids[1] == size - 1
    assert tokenizer.decode(tokenizer.encode("a[MASK]b").ids) == "ab"


@pytest.mark.parametrize(
    "make",
    [lambda: byte_tokenizer(masked=True), lambda: char_tokenizer(sorted(set(TEXT)), masked=True)],
    ids=["byte", "char"],
)
def test_file_round_trip(make, tmp_path):
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == tokenizer.encode(TEXT).ids
