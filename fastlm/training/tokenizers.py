"""The two tokenizers that need no training of their own: one token per byte, one token per character.

Both are `tokenizers` objects, so that the tokenizer.json beside a checkpoint is one that any reader of Hugging Face directories understands. For a whole corpus
the ids come from PyTorch instead (data.py), which is a hundred times faster and, as the tests check, the same.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, MASK = "[PAD]", "[MASK]"


def byte_tokenizer(*, masked: bool) -> Tokenizer:
    """256 tokens, the id of each its byte; with `masked` also [PAD] (256) and [MASK] (257)."""
    # GPT-2's alphabet gives every byte a visible character: 188 bytes stand for themselves, the others take code points from 256 on, in order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(c): c for c in alphabet if ord(c) < 256}
    moved = iter([c for c in alphabet if ord(c) >= 256])
    vocabulary = {own.get(byte) or next(moved): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special_tokens(tokenizer) if masked else tokenizer


def char_tokenizer(characters: Sequence[str], *, masked: bool) -> Tokenizer:
    """One token per character, ids in the order given; with `masked` also [PAD] and [MASK] after them. Any other character is an error when encoding."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return with_special_tokens(tokenizer) if masked else tokenizer


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, MASK)])
    return tokenizer
