"""How well a language model predicts texts: loss, perplexity, bits per byte, and the accuracy of masked tokens."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from fastlm.core.errors import mismatch
from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel
from fastlm.training.data.order import draws
from fastlm.training.data.streams import Piece, token_ids
from fastlm.training.objectives import IGNORED, MaskedToken, NextToken
from fastlm.training.settings import check_integer
from fastlm.training.tokenizers import special_ids, vocabulary_size

TOKENS_AT_ONCE = 4096  # of a forward pass

Text = str | Iterable[str]  # as a whole or in parts, of which one at a time is in memory
Window = tuple[Tensor, Tensor]  # inputs and targets of a sequence, (tokens,)
Progress = Callable[[int], None]  # called with the number of tokens that a forward pass read


@dataclasses.dataclass
class CausalScore:
    """Sums over all texts.

    The first token of a text, which nothing precedes, is not predicted. In bits per byte it counts as one of a uniform
    distribution over the vocabulary, so that these are the length of a code for the whole text.
    """

    nats: float = 0.0
    tokens: int = 0  # that were predicted
    first_nats: float = 0.0
    bytes: int = 0  # of the texts in UTF-8

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return (self.nats + self.first_nats) / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@dataclasses.dataclass
class MaskedScore:
    """Sums over all masked positions."""

    nats: float = 0.0
    correct: int = 0
    masked: int = 0
    tokens: int = 0

    @property
    def loss(self) -> float:
        """Nats per masked token."""
        return self.nats / self.masked

    @property
    def accuracy(self) -> float:
        return self.correct / self.masked

    def as_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "accuracy": self.accuracy, "masked": self.masked, "tokens": self.tokens}


@torch.no_grad()
def score_causal(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress = lambda tokens: None,
) -> CausalScore:
    """Predicts every token of every text from the tokens before it, in windows that overlap.

    Args:
        context: number of tokens of a window; None: the model's context.
        stride: number of tokens between two windows; every token is predicted from at least context − stride tokens,
            those at the beginning excepted. None: half of the context.
    """
    largest = model.config.max_position_embeddings
    context = largest if context is None else context
    check_at_most("context", context, largest, "the context of the model")
    stride = max(1, context // 2) if stride is None else stride
    check_at_most("stride", stride, context, "the context")
    score, vocabulary = CausalScore(), model.config.vocab_size

    def windows() -> Iterator[Window]:
        def counted(parts: Iterable[str]) -> Iterator[str]:
            for part in parts:
                score.bytes += len(part.encode())
                yield part

        def with_first(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
            if (first := next(pieces, None)) is not None:
                score.first_nats += math.log(vocabulary)
                yield first
                yield from pieces

        for text in texts:
            pieces = encoded(tokenizer, counted(parts_of(text)), vocabulary)
            yield from sliding_windows(with_first(pieces), context, stride)

    with evaluating(model):
        for inputs, targets in batched(windows(), max(1, TOKENS_AT_ONCE // context)):
            count = int((targets != IGNORED).sum())
            loss = NextToken().loss(model, inputs.to(model.device), targets.to(model.device))
            score.nats += loss.item() * count
            score.tokens += count
            progress(inputs.numel())
    if not score.tokens:
        raise mismatch("data", "a text of at least two tokens", "none")
    return score


def sliding_windows(pieces: Iterable[Tensor], context: int, stride: int) -> Iterator[Window]:
    """Every token but the first is a target once. pieces: the ids of a text; those of one window are kept."""
    rest, ids, begin = iter(pieces), torch.empty(0, dtype=torch.int64), 0  # begin: of ids in the text
    start = done = 0  # done: number of targets so far
    while True:
        ids, begin = ids[start - begin :], start
        start = 0 if done == 0 else done + stride - context
        while begin + len(ids) <= start + context and (piece := next(rest, None)) is not None:
            ids = torch.cat([ids, piece])
        length = begin + len(ids)  # of the text, if it ends in this window
        start = max(0, min(start, length - 1 - context))  # so that the last window is a whole one
        targets = ids[start + 1 - begin :][:context].clone()
        if start + len(targets) <= done:
            return
        targets[: done - start] = IGNORED
        yield ids[start - begin :][: len(targets)], targets
        done = start + len(targets)


@torch.no_grad()
def score_masked(
    model: EncoderForMaskedLM,
    tokenizer: Tokenizer,
    mask_token: int | None,
    texts: Iterable[Text],
    *,
    context: int | None = None,
    seed: int = 0,
    progress: Progress = lambda tokens: None,
) -> MaskedScore:
    """Predicts 15 % of the tokens, of which 80 % are masked, 10 % replaced and 10 % kept, as BERT was trained.

    The choice depends on the seed. Each window has the special tokens that the tokenizer adds ([CLS] … [SEP]).
    """
    if mask_token is None:
        raise mismatch("tokenizer", "a tokenizer with a mask token", "one without")
    context = model.config.context if context is None else context
    check_at_most("context", context, model.config.context, "the context of the model")
    before, after = special_tokens(tokenizer)
    if (body := context - len(before) - len(after)) < 1:
        raise mismatch("context", f"more than the {len(before) + len(after)} special tokens", context)
    objective = MaskedToken(vocabulary_size(tokenizer), mask_token, special_ids(tokenizer))
    score = MaskedScore()

    def windows() -> Iterator[Window]:
        number = 0
        for text in texts:
            for ids in cut(encoded(tokenizer, parts_of(text), model.config.vocab_size), body):
                random = draws(seed, number, range(1), len(ids))
                number += 1
                inputs, targets = (x[0] for x in objective.pairs(F.pad(ids, (0, 1))[None], random))
                ends = len(before), len(after)
                whole = torch.cat([torch.tensor(before), inputs, torch.tensor(after)]).long()
                yield whole, F.pad(targets, ends, value=IGNORED)

    with evaluating(model):
        for inputs, targets in batched(windows(), max(1, TOKENS_AT_ONCE // context)):
            chosen = targets != IGNORED
            logits = model(inputs.to(model.device)).logits[chosen.to(model.device)].float().cpu()
            score.nats += F.cross_entropy(logits, targets[chosen], reduction="sum").item()
            score.correct += int((logits.argmax(-1) == targets[chosen]).sum())
            score.masked += len(logits)
            score.tokens += inputs.numel()
            progress(inputs.numel())
    if not score.masked:
        raise mismatch("data", "a text of at least one token", "none")
    return score


def check_at_most(name: str, value: int, largest: int, what: str) -> None:
    check_integer(name, value, 1)
    if value > largest:
        raise mismatch(name, f"at most {largest}, {what}", value)


def parts_of(text: Text) -> Iterable[str]:
    return [text] if isinstance(text, str) else text


def encoded(tokenizer: Tokenizer, parts: Iterable[str], vocabulary: int) -> Iterator[Tensor]:
    """Token ids of a text without special tokens, in pieces that are not empty."""

    def encode(text: str) -> Piece:
        try:
            found = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception for a character outside the vocabulary
            raise mismatch("data", "characters of the tokenizer's vocabulary", f"{text[:40]!r} ({error})") from None
        return Piece(found.ids, found.offsets)

    for ids in token_ids(encode, parts):
        if ids and max(ids) >= vocabulary:
            raise mismatch("tokenizer", f"ids below {vocabulary}, the vocabulary of the model", max(ids))
        if ids:
            yield torch.tensor(ids, dtype=torch.int64)


def cut(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The ids of a text, `size` at a time; of an empty text once none."""
    left = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        *whole, left = torch.cat([left, piece]).split(size)
        yield from whole
    yield left


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text."""
    added = tokenizer.encode("").ids
    if not added:
        return [], []
    sample = next(word for word in ("a", "the", "0", ".") if tokenizer.encode(word, add_special_tokens=False).ids)
    plain, whole = tokenizer.encode(sample, add_special_tokens=False).ids, tokenizer.encode(sample).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def batched(windows: Iterable[Window], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `size` windows of one length."""
    some: list[Window] = []
    for window in windows:
        if some and (len(some) == size or len(window[0]) != len(some[0][0])):
            yield stacked(some)
            some = []
        some.append(window)
    if some:
        yield stacked(some)


def stacked(some: Sequence[Window]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*some, strict=True)
    return torch.stack(inputs), torch.stack(targets)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
