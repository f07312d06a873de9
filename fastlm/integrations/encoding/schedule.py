"""Which texts are computed together: sorted by length, cut by tokens, tokenized ahead of the model.

The batches follow from the texts and the budget alone, so an interrupted run can be continued with the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

A = TypeVar("A")
B = TypeVar("B")

MAX_TOKENS_PER_BATCH = 4096  # the default budget
CHARACTERS_PER_TOKEN = 4  # about, in English: only decides how much is tokenized at once
CHUNK_BATCHES = 2  # tokenized at once
LOOK_AHEAD = 2  # chunks


class Item(NamedTuple):
    """A tokenized text."""

    number: int
    features: dict[str, list[int]]  # "input_ids" and what else the tokenizer gives for each token

    @property
    def tokens(self) -> int:
        return len(self.features["input_ids"])


def batches(
    sizes: Sequence[int], tokenize: Callable[[Sequence[int]], list[Item]], budget: int, *, padded: bool
) -> Iterator[list[Item]]:
    """The batches, longest texts first.

    Args:
        sizes: the number of characters of each text, by which they are sorted before they are tokenized.
        tokenize: from indices of texts.
        budget: tokens in a batch, of which one text may have more.
        padded: whether padding counts.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    pending: list[Item] = []
    for items in ahead(tokenize, chunks(order, sizes, CHUNK_BATCHES * CHARACTERS_PER_TOKEN * budget)):
        pending = sorted(pending + items, key=lambda item: -item.tokens)
        *full, pending = cut(pending, budget, padded)
        yield from full
    if pending:
        yield pending


def cut(items: list[Item], budget: int, padded: bool) -> list[list[Item]]:
    """Consecutive items, sorted from long to short, in batches. The last one may have room for more."""
    found: list[list[Item]] = [[]]
    used = 0
    for item in items:
        batch = found[-1]
        used = (len(batch) + 1) * (batch or [item])[0].tokens if padded else used + item.tokens
        if batch and used > budget:
            found.append([item])
            used = item.tokens
        else:
            batch.append(item)
    return found


def chunks(order: Sequence[int], sizes: Sequence[int], characters: int) -> list[list[int]]:
    """Consecutive indices, with so many characters at least. Every text counts for special tokens too."""
    found: list[list[int]] = []
    room = 0
    for i in order:
        if room <= 0:
            found.append([])
            room = characters
        found[-1].append(i)
        room -= sizes[i] + 2 * CHARACTERS_PER_TOKEN
    return found


def ahead(function: Callable[[A], B], arguments: list[A]) -> Iterator[B]:
    """map(function, arguments), computed in a thread at most LOOK_AHEAD calls before the results are taken."""
    if len(arguments) < 2:  # a thread would have nothing to overlap with
        yield from map(function, arguments)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="fastlm-tokenizer") as pool:
        rest = iter(arguments)
        waiting = deque(pool.submit(function, argument) for argument in islice(rest, LOOK_AHEAD))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, argument) for argument in islice(rest, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
