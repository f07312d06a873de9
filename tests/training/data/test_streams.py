import itertools
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fastlm.training.data import streams
from fastlm.training.data.streams import Piece, token_ids
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer

WORDS = "for in while naïve straße 日本語 x1 isn't we've ... !!! 1234567 {'a': [0]} http://a.b/c \u0301e".split()
GAPS = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\n\n\n    ", "\t", " \n "]


def text_of(seed, count=1500):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(count))


def trained(model, trainer, pre=None, normalizer=None):
    found = tokenizers.Tokenizer(model)
    if pre is not None:
        found.pre_tokenizer = pre
    if normalizer is not None:
        found.normalizer = normalizer
    found.train_from_iterator([text_of(9)], trainer)
    return found


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found = trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    )
    found.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    found.decoder = decoders.ByteLevel()
    return found


TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(masked=False),
    "characters": lambda: char_tokenizer(sorted(set(text_of(0))), masked=False),
    "byte-level BPE": byte_level,
    "WordPiece": lambda: trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(lowercase=True),
    ),
    "BPE of spaces": lambda: trained(  # over the whole text, as SentencePiece
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False),
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "Unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
    ),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def small(monkeypatch):
    """Pieces of 600 characters."""
    for name, value in {"PIECE": 600, "OVERLAP": 200, "END": 60, "RUN": 10}.items():
        monkeypatch.setattr(streams, name, value)


def encoding(tokenizer, sizes):
    def encode(text):
        sizes.append(len(text))
        found = tokenizer.encode(text, add_special_tokens=False)
        return Piece(found.ids, found.offsets)

    return encode


def parts_of(text, size):
    return (text[i : i + size] for i in range(0, len(text), size))


def joined(pieces):
    return list(itertools.chain.from_iterable(pieces))


@pytest.mark.parametrize("size", [7, 1000])
def test_the_ids_are_those_of_the_whole_text(tokenizer, small, size):
    for seed in range(3):
        text, sizes = text_of(seed), []
        pieces = list(token_ids(encoding(tokenizer, sizes), parts_of(text, size)))
        assert joined(pieces) == tokenizer.encode(text, add_special_tokens=False).ids
        assert max(sizes) <= 600 and len(pieces) > 10


@pytest.mark.parametrize("text", ["", "x", "for " * 150, "for " * 151, "for " * 350])
def test_short_texts(small, text):
    tokenizer = byte_tokenizer(masked=False)
    assert joined(token_ids(encoding(tokenizer, []), [text])) == list(text.encode())


def test_a_text_that_cannot_be_cut_is_encoded_in_larger_pieces(small):
    """One word, of which a token is the beginning."""
    tokenizer, sizes = TOKENIZERS["WordPiece"](), []
    text = text_of(0, 200) + "x" * 3000 + text_of(1, 200)
    ids = joined(token_ids(encoding(tokenizer, sizes), parts_of(text, 100)))
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert 3000 < max(sizes) < 5000


def test_no_more_than_a_piece_is_read_ahead(small):
    read = []

    def parts():
        for part in parts_of(text_of(0), 50):
            read.append(part)
            yield part

    tokenizer, tokens = byte_tokenizer(masked=False), 0
    for ids in token_ids(encoding(tokenizer, []), parts()):
        tokens += len(ids)
        assert len("".join(read).encode()) - tokens < 4 * 600
