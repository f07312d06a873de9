"""Tokenization of texts, or of pairs of a query and a text, by a tokenizer of transformers."""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastlm.core.errors import check_integer, mismatch, shown, wrong_type
from fastlm.core.modules import submodules
from fastlm.integrations.encoding.schedule import Item
from fastlm.models.encoder import Encoder

# What transformers calls between a tokenizer's __call__ and its result, in versions 4 and 5.
CALLED = (
    "__call__",
    "_call_one",
    "batch_encode_plus",
    "_batch_encode_plus",
    "_encode_plus",
    "_switch_to_input_mode",
    "set_truncation_and_padding",
    "_convert_encoding",
)
# What is read for each token: a name in transformers, and its name in the backend.
FEATURES = {"input_ids": "ids", "token_type_ids": "type_ids"}
LARGEST_LENGTH = 2**31 - 1  # tokenizers without a limit have 10^30


class Tokenizing:
    """Tokenizes texts of one run, and counts those that are truncated.

    Args:
        query: the first of every pair; None: single texts.
        prompt: is put before every text.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        max_length: int,
        *,
        query: str | None = None,
        prompt: str = "",
        lower_case: bool = False,
    ) -> None:
        self.tokenizer, self.texts, self.max_length = tokenizer, texts, max_length
        self.query, self.prompt, self.lower_case = query, prompt, lower_case
        self.backend = backend_of(tokenizer)
        self.truncated = 0
        blank = [i for i, text in enumerate(texts) if not text.strip()]
        if blank and not len(self.encode([""])[0]["input_ids"][0]):
            # Without special tokens a text may have no token. Such texts are found before all others are run.
            self(blank)
            self.truncated = 0

    def sizes(self) -> list[int]:
        """Numbers of characters."""
        extra = len(self.prompt if self.query is None else self.query)
        return [extra + len(text) for text in self.texts]

    def __call__(self, indices: Sequence[int]) -> list[Item]:
        if not indices:
            return []
        try:
            encoded = self.encode([self.texts[i] for i in indices])
        except Exception as error:  # the library raises many types of error
            raise self.failed(indices, error) from None
        features, encodings = encoded
        self.truncated += self.count_truncated(features, encodings, indices)
        items = [Item(i, {name: ids[k] for name, ids in features.items()}) for k, i in enumerate(indices)]
        for item in items:
            if not item.tokens:
                raise mismatch(f"texts[{item.number}]", "a text of at least one token", shown(self.texts[item.number]))
        return items

    def encode(self, texts: list[str]) -> tuple[dict[str, list[list[int]]], Sequence[Any] | None]:
        """("input_ids" and what else the tokenizer gives for each token, encodings of the backend if it has one)."""
        texts = [self.prompt + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        if self.backend is not None:
            given: Any = texts if self.query is None else [(self.query, text) for text in texts]
            return self.encode_by(self.backend, given)
        given = (texts,) if self.query is None else ([self.query] * len(texts), texts)
        encoded = self.tokenizer(*given, truncation=True, max_length=self.max_length, return_attention_mask=False)
        return {name: encoded[name] for name in encoded.data if name in FEATURES}, encoded.encodings

    def encode_by(self, backend: Any, given: list[Any]) -> tuple[dict[str, list[list[int]]], Sequence[Any]]:
        """What a call of the tokenizer returns, without the objects that it makes for every text."""
        side, truncation = self.tokenizer.truncation_side, backend.truncation
        wanted = {"max_length": self.max_length, "stride": 0, "strategy": "longest_first", "direction": side}
        if truncation is None or any(truncation.get(name) != value for name, value in wanted.items()):
            backend.enable_truncation(**wanted)
        if backend.padding is not None:
            backend.no_padding()
        encodings = backend.encode_batch(given)
        names = {"input_ids", *self.tokenizer.model_input_names}
        return {
            name: [getattr(each, own) for each in encodings] for name, own in FEATURES.items() if name in names
        }, encodings

    def count_truncated(
        self, features: dict[str, list[list[int]]], encodings: Sequence[Any] | None, indices: Sequence[int]
    ) -> int:
        if encodings is not None:
            return sum(bool(encoding.overflowing) for encoding in encodings)
        # A tokenizer in Python does not say, so the texts that fill the length are tokenized again.
        full = [i for i, ids in zip(indices, features["input_ids"], strict=True) if len(ids) == self.max_length]
        given = () if self.query is None else (self.query,)
        return sum(
            len(self.tokenizer(*given, self.prompt + self.texts[i])["input_ids"]) > self.max_length for i in full
        )

    def failed(self, indices: Sequence[int], error: Exception) -> ValueError:
        """The error that names the first text that cannot be tokenized."""
        for i in indices:
            try:
                self.encode([self.texts[i]])
            except Exception as reason:
                expected = "a text that the tokenizer can encode"
                return mismatch(f"texts[{i}]", expected, f"{self.texts[i][:60]!a} ({one_line(reason)})")
        return ValueError(f"tokenizer: {one_line(error)}")

    def prompt_tokens(self) -> int:
        """The number of tokens of the prompt, with special tokens before it and not after it."""
        ids = self.encode([""])[0]["input_ids"][0] if self.prompt else []
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.all_special_ids)

    def warn(self, noun: str) -> None:
        if self.truncated:
            warnings.warn(self.truncated_in_words(noun), stacklevel=4)

    def truncated_in_words(self, noun: str) -> str:
        """noun: "text" or "pair"."""
        count, total = f"{self.truncated:,}", f"{len(self.texts):,} {noun}{'s' * (len(self.texts) != 1)}"
        verb = "has" if self.truncated == 1 else "have"
        return (
            f"{count} of {total} {verb} more than {self.max_length:,} tokens; the first {self.max_length:,} were read"
        )

    def pad(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The features of a batch, padded at the end, with the mask."""
        lengths = [item.tokens for item in items]
        longest = max(lengths)
        rows = {name: [item.features[name] for item in items] for name in items[0].features}
        if min(lengths) < longest:
            padding = {
                "input_ids": self.tokenizer.pad_token_id or 0,
                "token_type_ids": self.tokenizer.pad_token_type_id,
            }
            for name, values in rows.items():
                rows[name] = [ids + [padding[name]] * (longest - len(ids)) for ids in values]
        rows["attention_mask"] = [[1] * length + [0] * (longest - length) for length in lengths]
        # Faster than torch.tensor of lists.
        return {name: torch.from_numpy(numpy.array(values, numpy.int64)) for name, values in rows.items()}


def backend_of(tokenizer: Any) -> Any:
    """The tokenizer in Rust that all texts go to unchanged; None if the tokenizer has none, or does more in Python."""
    kind: Any = type(tokenizer)
    if not calls_backend(kind) or not vars(tokenizer).keys().isdisjoint(CALLED):
        return None
    backend = tokenizer.backend_tokenizer
    return backend if backend.encode_special_tokens == tokenizer.split_special_tokens else None


@functools.cache
def calls_backend(kind: Any) -> bool:
    """Whether the tokenizers of a class call their backend as the class of transformers for such tokenizers does."""
    from transformers import PreTrainedTokenizerFast as Usual

    return issubclass(kind, Usual) and all(getattr(kind, name, None) is getattr(Usual, name, None) for name in CALLED)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_texts(texts: Any) -> list[str]:
    try:
        found = list(texts) if not isinstance(texts, str | bytes) else None
    except TypeError:  # it is no iterable
        found = None
    if found is None:
        raise wrong_type("texts", "an iterable of strings", texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise wrong_type(f"texts[{i}]", "a string", text)
    return found


def find_tokenizer(tokenizer: Any, model: nn.Module) -> Any:
    """The tokenizer that was given, or that in the directory from which the model was loaded."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is None:
        directory = getattr(model, "name_or_path", "")
        if not directory or not Path(directory).is_dir():
            raise mismatch("tokenizer", "a tokenizer, as the model was not loaded from a directory", "None")
        return load_tokenizer(directory)
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise wrong_type("tokenizer", "a tokenizer of transformers or a directory", tokenizer)
    return tokenizer


def load_tokenizer(directory: str | os.PathLike) -> Any:
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; expected one with a tokenizer (nothing is downloaded)"
        )
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # damaged files raise many types of error
        raise ValueError(f"{directory}: the tokenizer could not be read ({one_line(error)})") from None


def length_limit(model: nn.Module) -> int:
    """The number of tokens that a model can take."""
    if isinstance(model, Encoder):
        return model.config.context
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else LARGEST_LENGTH
    for module in submodules(model, of_each_list=0):  # layers have none
        table = module._modules.get("position_embeddings")
        # RoBERTa and its relatives count positions from the id of padding on.
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def check_max_length(max_length: int | None, own: int | None, model: nn.Module, tokenizer: Any) -> int:
    """The maximal length: as given, as the model's settings say, or what model and tokenizer can take."""
    limit = length_limit(model)
    if max_length is None:
        return min(limit, tokenizer.model_max_length if own is None else own, LARGEST_LENGTH)
    expected = f"an integer from 1 to {limit}, the number of tokens that the model can take"
    return check_integer("max_length", max_length, expected, range(1, limit + 1))
