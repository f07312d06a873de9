"""The tokenizer in a model's directory, by the `tokenizers` library."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from fastlm.models.config import read_json
from fastlm.ops.boundary import mismatch

FILES = "tokenizer.json, or vocab.json and merges.txt, or vocab.txt"


class Tokenizer:
    """Text ↔ token ids.

    Attributes:
        mask_token: how a masked token is written in a text, or None where the vocabulary has none.
        mask_token_id: its id.
        vocab_size: of the tokenizer; a model's may be larger.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, mask_token: str = "[MASK]") -> None:
        self.tokenizer = tokenizer
        # A file may ask for padding to a fixed length or for cutting the text off; what is said here is all of the text and nothing else.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.mask_token_id: int | None = tokenizer.token_to_id(mask_token)
        self.mask_token = mask_token if self.mask_token_id is not None else None
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """With the special tokens around it that the model was trained with ([CLS] … [SEP])."""
        try:
            return list(self.tokenizer.encode(text).ids)
        except Exception as error:  # the library raises nothing narrower: a character that the vocabulary lacks
            raise mismatch("text", "characters of the tokenizer's vocabulary", f"{text[:40]!r} ({error})") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def token(self, token_id: int) -> str:
        """One token as a person reads it; a byte that is no character of its own as the vocabulary writes it."""
        text = self.decode([token_id])
        own = self.tokenizer.id_to_token(token_id)
        if own is None:
            return f"<{token_id}>"
        return own if not text or "\ufffd" in text or own.startswith("##") else text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a model's directory: tokenizer.json, or GPT-2's vocab.json and merges.txt, or BERT's vocab.txt.

    Raises:
        FileNotFoundError, ValueError: there is none, or its file is damaged; one line that names the file.
    """
    directory = Path(directory)
    settings = directory / "tokenizer_config.json"
    options = read_json(settings) if settings.is_file() else {}
    mask = options.get("mask_token") or "[MASK]"
    return Tokenizer(read(directory, options), mask["content"] if isinstance(mask, dict) else mask)


def read(directory: Path, options: dict) -> tokenizers.Tokenizer:
    whole, words, merges, pieces = (
        directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if words.is_file() and merges.is_file():
            byte_level = ByteLevelBPETokenizer(
                str(words), str(merges), add_prefix_space=bool(options.get("add_prefix_space", False))
            )
            byte_level.add_special_tokens([t for t in ("<|endoftext|>",) if byte_level.token_to_id(t) is not None])
            return byte_level._tokenizer
        if pieces.is_file():
            return BertWordPieceTokenizer(
                str(pieces),
                lowercase=options.get("do_lower_case", uncased(pieces)),
                strip_accents=options.get("strip_accents"),
                handle_chinese_chars=options.get("tokenize_chinese_chars", True),
            )._tokenizer
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{directory}: the tokenizer could not be read ({error})") from None
    raise FileNotFoundError(f"{directory}: expected a tokenizer there: {FILES}")


def uncased(vocabulary: Path) -> bool:
    """No piece has a capital letter, the special tokens ([CLS], …) aside: what a text must be lowered for where no settings say so."""
    pieces = vocabulary.read_text(encoding="utf-8").split("\n")
    return not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
