"""Two tokenizers that need no training: one token per byte, and one token per character.

Both are `tokenizers` objects, so that every reader of Hugging Face directories can load the tokenizer.json of a
checkpoint. For a corpus, data/encode.py computes the same ids with NumPy, which is about a hundred times faster.
Of any tokenizer, this module knows the special tokens and where words begin.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PAD, MASK = "[PAD]", "[MASK]"
# The names that the families give these tokens.
PADS, MASKS = (PAD, "<pad>"), (MASK, "<mask>")
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


def byte_tokenizer(*, masked: bool) -> Tokenizer:
    """256 tokens whose ids are the byte values; with `masked` also [PAD] (256) and [MASK] (257)."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special_tokens(tokenizer) if masked else tokenizer


def char_tokenizer(characters: Sequence[str], *, masked: bool) -> Tokenizer:
    """One token per character, with ids in the given order; with `masked`, [PAD] and [MASK] follow.

    Encoding any other character raises an error.
    """
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return with_special_tokens(tokenizer) if masked else tokenizer


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, MASK)])
    return tokenizer


def id_of(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """The id of the first of the tokens that the vocabulary has."""
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id + 1. It is more than the number of tokens if some ids have none."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def special_ids(tokenizer: Tokenizer) -> list[int]:
    return [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def end_of_text_id(tokenizer: Tokenizer, settings: str | None) -> int | None:
    """The id of the token that ends a text, if there is one.

    Args:
        settings: the contents of tokenizer_config.json; its eos_token, or else its sep_token, is the token.
    """
    options = json.loads(settings) if settings else {}
    for name in ("eos_token", "sep_token"):
        token = options.get(name) if isinstance(options, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (found := tokenizer.token_to_id(token)) is not None:
            return found
    return id_of(tokenizer, ENDS_OF_TEXT)


def word_table(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Whether each token may begin inside a word, and end inside one: two bool tensors, (vocabulary,).

    A word is a run of letters and digits. Bytes that are no character on their own count as letters.
    """
    content = json.loads(tokenizer.to_str())
    word_pieces = content["model"]["type"] == "WordPiece"
    prefix = content["model"].get("continuing_subword_prefix", "")
    is_byte_level = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    byte_of = byte_alphabet()
    begins = torch.zeros(vocabulary_size(tokenizer), dtype=torch.bool)
    ends = torch.zeros_like(begins)
    special = set(special_ids(tokenizer))
    for token, i in tokenizer.get_vocab().items():
        if i in special or not token:
            continue
        if word_pieces:
            goes_on = bool(prefix) and token.startswith(prefix)
            begins[i], ends[i] = goes_on, True
        elif is_byte_level and all(c in byte_of for c in token):
            first, last = byte_of[token[0]], byte_of[token[-1]]
            begins[i], ends[i] = (byte >= 128 or chr(byte).isalnum() for byte in (first, last))
        else:
            begins[i], ends[i] = token[0].isalnum(), token[-1].isalnum()
    return begins, ends


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: 188 printable bytes are their own, the others map to code points from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(c): c for c in alphabet if ord(c) < 256}
    others = iter([c for c in alphabet if ord(c) >= 256])
    return {printable.get(byte) or next(others): byte for byte in range(256)}


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The contents of a tokenizer_config.json.

    Without it transformers would use the tokenizer class of the model's type, which splits the text differently.
    """
    special = {
        "pad_token": PADS,
        "mask_token": MASKS,
        "eos_token": ENDS_OF_TEXT[:-1],
        "sep_token": ("[SEP]",),
        "cls_token": ("[CLS]",),
        "unk_token": ("[UNK]", "<unk>"),
    }
    found = {name: id_of(tokenizer, names) for name, names in special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # true would remove spaces before punctuation
        "model_max_length": context,
        **{name: tokenizer.id_to_token(i) for name, i in found.items() if i is not None},
    }
