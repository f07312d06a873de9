"""Trains tokenizers with the `tokenizers` library: byte-level BPE as GPT-2's, WordPiece as BERT's."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastlm.core.errors import mismatch
from fastlm.training.checkpoint import TOKENIZER_SETTINGS, staged, write_json
from fastlm.training.data.records import is_records, records
from fastlm.training.data.sources import Files, text_files
from fastlm.training.data.texts import characters, paragraphs
from fastlm.training.settings import check_integer, check_one_of
from fastlm.training.tokenizers import tokenizer_config

KINDS = ("bpe", "wordpiece")
END_OF_TEXT = "<|endoftext|>"  # GPT-2's
PAD, UNKNOWN, CLS, SEP, MASK = BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
BYTES = 256
UNLIMITED = 10**30  # what transformers writes for a tokenizer without a maximal length


def train_tokenizer(
    paths: Sequence[str | Path],
    *,
    kind: str = "bpe",
    vocab_size: int = 8192,
    lowercase: bool = False,
    field: str = "text",
    show_progress: bool = False,
) -> tuple[Tokenizer, Files]:
    """Trains a tokenizer on files; memory grows with the number of different words, not with the text.

    Args:
        paths, field: as for fastlm.training.data.load.
        kind: "bpe" or "wordpiece".
        vocab_size: number of tokens; fewer if the text has no more pairs to merge. All characters must have a place.
        lowercase: of WordPiece: as bert-base-uncased, which also removes accents.

    Returns:
        The tokenizer, and the files that were read or skipped.

    Raises:
        ValueError, FileNotFoundError: an argument is invalid; the message names it.
    """
    check_one_of("kind", kind, KINDS)
    check_integer("vocab_size", vocab_size, BYTES + 1 if kind == "bpe" else len(BERT_TOKENS) + 1)
    if lowercase and kind != "wordpiece":
        raise mismatch("lowercase", "False unless kind is wordpiece", lowercase)
    files = text_files("data", paths)
    if kind == "bpe":
        tokenizer, trainer = byte_level_bpe(vocab_size, show_progress)
    else:
        tokenizer, trainer = word_piece(vocab_size, lowercase, show_progress)
    tokenizer.train_from_iterator(texts_of(files.found, field), trainer)
    if (smallest := tokenizer.get_vocab_size()) > vocab_size:  # the library's trainer keeps every character
        counted = "special tokens, and characters at the start of words and after it"
        expected = f"an integer >= {smallest} for this text ({counted})"
        raise mismatch("vocab_size", expected, vocab_size)
    if kind == "wordpiece":
        ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids
        )
    return tokenizer, files


def byte_level_bpe(vocab_size: int, show_progress: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, normalized=False, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )


def word_piece(vocab_size: int, lowercase: bool, show_progress: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in BERT_TOKENS],
        show_progress=show_progress,
    )


def texts_of(files: Iterable[Path], field: str) -> Iterator[str]:
    """The texts in parts that cut no word."""
    for file in files:
        if is_records(file):
            yield from (record.text for record in records(file, field))
        else:
            yield from paragraphs(characters(file, "UTF-8 text for the tokenizer"))


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer makes the same one."""
    with staged(out) as folder:
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        write_json(folder / TOKENIZER_SETTINGS, tokenizer_config(tokenizer, UNLIMITED))
