"""Encoders: from chunks of text to token ids. They give the ids of the tokenizer, without the special tokens that it
adds around a text.

For bytes and characters they compute with NumPy, which is about a hundred times faster than the tokenizer.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from fastlm.training.data.encode_worker import encode_texts
from fastlm.training.data.texts import byte_chunks, characters, paragraphs
from fastlm.training.data.workers import Encoded, outside_vocabulary
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer, vocabulary_size

CODE_POINTS = 0x110000  # of Unicode


class Encoder(Protocol):
    tokenizer: Tokenizer
    dtype: np.dtype
    parallel: bool  # whether it is so slow that other processes should encode

    def chunks(self, file: Path) -> Iterator:
        """The chunks of a text file."""

    def parts(self, text: str) -> Iterator:
        """The chunks of a text in memory."""

    def encode(self, chunks: Sequence) -> Encoded: ...


def dtype_for(vocabulary: int) -> np.dtype:
    """The smallest that holds the ids of so many tokens."""
    return np.dtype(np.uint8 if vocabulary <= 2**8 else np.uint16 if vocabulary <= 2**16 else np.uint32)


class ByteEncoder:
    dtype, parallel = np.dtype(np.uint8), False

    def __init__(self, *, masked: bool):
        self.tokenizer = byte_tokenizer(masked=masked)

    def chunks(self, file: Path) -> Iterator[bytes]:
        return byte_chunks(file)

    def parts(self, text: str) -> Iterator[bytes]:
        yield text.encode()

    def encode(self, chunks: Sequence[bytes]) -> Encoded:
        return np.frombuffer(b"".join(chunks), dtype=np.uint8), [len(chunk) for chunk in chunks]


class CharEncoder:
    """Args: alphabet: the code points, ascending."""

    parallel = False
    expected = "UTF-8 text for the char tokenizer (the byte tokenizer accepts any file)"

    def __init__(self, alphabet: np.ndarray, *, masked: bool):
        self.tokenizer = char_tokenizer([chr(c) for c in alphabet.tolist()], masked=masked)
        self.dtype = dtype_for(len(alphabet))
        self.id_of = np.zeros(CODE_POINTS, dtype=self.dtype)
        self.id_of[alphabet] = np.arange(len(alphabet))

    def chunks(self, file: Path) -> Iterator[str]:
        return characters(file, self.expected)

    def parts(self, text: str) -> Iterator[str]:
        yield text

    def encode(self, chunks: Sequence[str]) -> Encoded:
        return self.id_of[code_points("".join(chunks))], [len(chunk) for chunk in chunks]


def alphabet_of(texts: Iterable[str]) -> np.ndarray:
    """The code points of all characters of the texts, ascending."""
    occurs = np.zeros(CODE_POINTS, dtype=bool)
    for text in texts:
        occurs[code_points(text)] = True
    return np.flatnonzero(occurs)


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


class TokenizerEncoder:
    parallel = True
    expected = "UTF-8 text for the tokenizer"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = dtype_for(vocabulary_size(tokenizer))

    def chunks(self, file: Path) -> Iterator[str]:
        return paragraphs(characters(file, self.expected))

    def parts(self, text: str) -> Iterator[str]:
        return paragraphs([text])

    def encode(self, chunks: Sequence[str]) -> Encoded:
        try:
            return encode_texts(self.tokenizer, chunks, self.dtype)
        except Exception as error:  # the library raises plain Exception for a character outside the vocabulary
            raise outside_vocabulary(error) from None
