import pytest
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    Tokenizer,
    models,
    pre_tokenizers,
    trainers,
)

from fastlm.training.tokenizers import (
    MASK,
    PAD,
    byte_alphabet,
    byte_tokenizer,
    char_tokenizer,
    end_of_text_id,
    vocabulary_size,
    word_table,
)

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


def trained(kind):
    sample = "the unbelievable naïve readers' re-reading, in 2024; THE_END of Größenordnung\n" * 30
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator([sample], trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"]))
        return tokenizer
    if kind in ("byte", "char"):
        return byte_tokenizer(masked=True) if kind == "byte" else char_tokenizer(sorted(set(sample)), masked=True)
    own = ByteLevelBPETokenizer() if kind == "bpe" else BertWordPieceTokenizer(lowercase=False)
    own.train_from_iterator([sample], vocab_size=300 if kind == "bpe" else 60)
    return own._tokenizer


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "wordpiece", "sentencepiece"])
def test_where_words_begin(kind):
    """Compared with the words of the text."""
    text = "the naïve readers' re-reading, in THE_END of 2024;\nGrößen"
    tokenizer = trained(kind)
    begins, ends = word_table(tokenizer)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    places = offsets(tokenizer, encoding, kind)
    assert len(encoding.ids) > 18
    for i in range(1, len(encoding.ids)):
        goes_on = bool(begins[encoding.ids[i]] and ends[encoding.ids[i - 1]])
        inside = text[places[i] - 1 : places[i] + 1].isalnum() if places[i] > places[i - 1] else kind in ("byte", "bpe")
        assert goes_on == inside, (encoding.tokens[i - 1], encoding.tokens[i])


def offsets(tokenizer, encoding, kind):
    """Where in the text each token begins, spaces before a word included."""
    if kind not in ("byte", "bpe"):
        return [begin for begin, _ in encoding.offsets]
    alphabet, read, found = byte_alphabet(), b"", []
    for token in encoding.tokens:
        found.append(len(read.decode("utf-8", "ignore")))
        read += bytes(alphabet[c] for c in token)
    return found


@pytest.mark.parametrize(
    "vocabulary, settings, expected",
    [
        (["a", "</s>", "<|endoftext|>"], None, 2),
        (["a", "</s>", "<|endoftext|>"], '{"eos_token": "</s>"}', 1),
        (["a", "</s>", "<|endoftext|>"], '{"eos_token": {"content": "</s>"}}', 1),
        (["a", "</s>", "<|endoftext|>"], '{"eos_token": "<none>"}', 2),
        (["a", "[SEP]", "</s>"], '{"sep_token": "[SEP]"}', 1),
        (["a", "[SEP]"], "{}", 1),
        (["a"], '{"eos_token": null}', None),
    ],
)
def test_end_of_text(vocabulary, settings, expected):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="a"))
    assert end_of_text_id(tokenizer, settings) == expected


def test_vocabularies_with_gaps():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 8 and tokenizer.get_vocab_size() == 2
