import pytest
from tokenizers import Tokenizer

from fastlm.training.tokenizers import MASK, PAD, byte_tokenizer, char_tokenizer

TEXT = "def naïve(x):\r\n\treturn '€ 日本 \U0001f600'  # \x00 [CLS]\n"


@pytest.mark.parametrize("masked", [False, True])
def test_a_byte_is_its_own_token(masked):
    tokenizer = byte_tokenizer(masked=masked)
    ids = tokenizer.encode(TEXT).ids
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.get_vocab_size() == 256 + 2 * masked


def test_every_byte_has_a_token():
    tokenizer = byte_tokenizer(masked=False)
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    assert tokenizer.decode([0xC3, 0xA9, 0xFF, 0x41]) == "é\ufffdA"


def test_a_character_is_its_own_token():
    characters = sorted(set(TEXT))
    tokenizer = char_tokenizer(characters, masked=False)
    assert tokenizer.encode(TEXT).ids == [characters.index(c) for c in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert tokenizer.get_vocab_size() == len(characters)


def test_an_unknown_character_is_refused_rather_than_dropped():
    with pytest.raises(Exception, match="vocabulary"):
        char_tokenizer("abc", masked=False).encode("abd")


@pytest.mark.parametrize(
    "make", [lambda: byte_tokenizer(masked=True), lambda: char_tokenizer("abc", masked=True)], ids=["byte", "char"]
)
def test_masks_come_after_the_ordinary_tokens(make):
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
def test_the_file_holds_all_of_it(make, tmp_path):
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == tokenizer.encode(TEXT).ids
