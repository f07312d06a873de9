"""Loads the tokenizer in a model's directory with the `tokenizers` library."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from fastlm.core.errors import mismatch
from fastlm.models.config import read_json, stored

FILES = "tokenizer.json, or vocab.json and merges.txt, or vocab.txt"


class Tokenizer:
    """Converts between text and token ids.

    Attributes:
        mask_token: the mask token as it is written in a text; None if the vocabulary has none.
        mask_token_id: its id, or None.
        vocab_size: of the tokenizer; that of the model may be larger.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, mask_token: str = "[MASK]") -> None:
        self.tokenizer = tokenizer
        # The file may enable padding or truncation; encode() always returns all tokens of the text and no others.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.mask_token_id: int | None = tokenizer.token_to_id(mask_token)
        self.mask_token = mask_token if self.mask_token_id is not None else None
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str, argument: str = "text") -> list[int]:
        """Token ids, including the special tokens that the model expects around a text ([CLS] … [SEP]).

        argument: the name of the text in the error about characters that the vocabulary does not have.
        """
        try:
            return list(self.tokenizer.encode(text).ids)
        except Exception:  # the library raises plain Exception for a character outside the vocabulary
            raise mismatch(argument, "characters of the tokenizer's vocabulary", repr(text[:40])) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def token(self, token_id: int) -> str:
        """One token in readable form; a byte that is not a character on its own as the vocabulary writes it."""
        text = self.decode([token_id])
        entry = self.tokenizer.id_to_token(token_id)
        if entry is None:
            return f"<{token_id}>"
        return entry if not text or "\ufffd" in text or entry.startswith("##") else text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads tokenizer.json, or GPT-2's vocab.json and merges.txt, or BERT's vocab.txt.

    Raises:
        FileNotFoundError: the directory has no tokenizer.
        ValueError: a file is damaged. Both messages are one line that names the file or directory.
    """
    directory = Path(directory)
    settings = stored(directory, "tokenizer_config.json")
    options = read_json(settings) if settings.is_file() else {}
    mask = options.get("mask_token") or "[MASK]"
    mask = mask.get("content") if isinstance(mask, dict) else mask
    if not isinstance(mask, str) or any("\ud800" <= c <= "\udfff" for c in mask):  # a surrogate is no character
        raise ValueError(f"{settings}: mask_token: expected a string, got {mask!r}")
    for name in ("add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(options.get(name), bool | None):
            raise ValueError(f"{settings}: {name}: expected true, false or null, got {options[name]!r}")
    return Tokenizer(read(directory, options), mask)


def load_tokenizer_file(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file of the format of tokenizer.json.

    Raises:
        ValueError: the file is damaged; the message is one line that names it.
    """
    with naming(path):
        found = tokenizers.Tokenizer.from_file(str(path))
    return Tokenizer(found).tokenizer


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around reading a tokenizer: the error of a damaged file is one line that names it."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, and for some files a panic of Rust's, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: the tokenizer could not be read ({error})") from None


def read(directory: Path, options: dict) -> tokenizers.Tokenizer:
    tokenizer_json, vocab_json, merges, word_pieces = (
        stored(directory, name) for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    with naming(directory):
        if tokenizer_json.is_file():
            return tokenizers.Tokenizer.from_file(str(tokenizer_json))
        if vocab_json.is_file() and merges.is_file():
            byte_level = ByteLevelBPETokenizer(
                str(vocab_json), str(merges), add_prefix_space=bool(options.get("add_prefix_space", False))
            )
            byte_level.add_special_tokens([t for t in ("<|endoftext|>",) if byte_level.token_to_id(t) is not None])
            return byte_level._tokenizer
        if word_pieces.is_file():
            return BertWordPieceTokenizer(
                str(word_pieces),
                lowercase=options.get("do_lower_case", is_uncased(word_pieces)) is True,
                strip_accents=options.get("strip_accents"),
                handle_chinese_chars=options.get("tokenize_chinese_chars", True) is not False,
            )._tokenizer
    raise FileNotFoundError(f"{directory}: expected a tokenizer ({FILES}), found none")


def is_uncased(vocabulary: Path) -> bool:
    """Whether no word piece other than special tokens ([CLS], …) has a capital letter.

    A text is lowercased for such a vocabulary when tokenizer_config.json does not say.
    """
    pieces = vocabulary.read_text(encoding="utf-8").split("\n")
    return not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
