"""Two tokenizers that need no training: one token per byte, and one token per character.

Both are `tokenizers` objects, so that every reader of Hugging Face directories can load the tokenizer.json of a
checkpoint. For a corpus, data.py computes the same ids with PyTorch, which is about a hundred times faster.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, MASK = "[PAD]", "[MASK]"


def byte_tokenizer(*, masked: bool) -> Tokenizer:
    """256 tokens whose ids are the byte values; with `masked` also [PAD] (256) and [MASK] (257)."""
    # GPT-2's byte alphabet: 188 printable bytes are their own character, the others map to code points from 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(c): c for c in alphabet if ord(c) < 256}
    others = iter([c for c in alphabet if ord(c) >= 256])
    vocabulary = {printable.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
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


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The contents of a tokenizer_config.json.

    Without it transformers would use the tokenizer class of the model's type, which splits the text differently.
    """
    special = {"pad_token": PAD, "mask_token": MASK}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # true would remove spaces before punctuation
        "model_max_length": context,
        **{name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None},
    }
