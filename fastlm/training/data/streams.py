"""The token ids of a text that is read in parts: those of the text as a whole, in memory that does not grow with it.

A tokenizer gives other ids at the ends of a piece than inside the text: it may join characters across the cut, add a
space in front, or take a line break at the end for another token. So pieces overlap, and each goes on where both have
the same tokens in a row.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

PIECE = 2**18  # characters that are encoded at a time
OVERLAP = 2**12  # characters that two pieces have in common
END = 2**10  # characters at the end of a piece whose tokens may depend on what follows
RUN = 32  # tokens in a row that two pieces have in common where one goes on for the other

Token = tuple[int, int, int]  # id, start and end; from the beginning of the piece


class Pieces:
    """A text that is read as far as is asked for."""

    def __init__(self, parts: Iterable[str]):
        self.parts, self.text, self.ended = iter(parts), "", False

    def first(self, count: int) -> str:
        """So many characters, or all that are left."""
        waiting, length = [self.text], len(self.text)
        while length < count and not self.ended:
            part = next(self.parts, None)
            self.ended = part is None
            if part is not None:
                waiting.append(part)
                length += len(part)
        self.text = "".join(waiting)
        return self.text[:count]

    def is_all(self, count: int) -> bool:
        """Whether no more than so many characters are left."""
        return len(self.first(count + 1)) <= count

    def drop(self, count: int) -> None:
        self.text = self.text[count:]


class Piece(NamedTuple):
    ids: list[int]
    places: list[tuple[int, int]]  # start and end of each token

    def tokens(self, begin: int, end: int) -> tuple[int, list[Token]]:
        """Those between two places, which count from `begin`, and the index of the first."""
        first = next((i for i, (start, _) in enumerate(self.places) if start >= begin), len(self.ids))
        found: list[Token] = []
        for token, (start, stop) in zip(self.ids[first:], self.places[first:], strict=True):
            if stop > end:
                break
            found.append((token, start - begin, stop - begin))
        return first, found


def token_ids(encode: Callable[[str], Piece], parts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of a text in lists.

    A text in which two pieces have no tokens in a row in common (one word of thousands of characters) is encoded in
    larger ones.
    """
    text, size, done = Pieces(parts), PIECE, 0  # done: number of tokens of the piece that were returned
    piece = encode(text.first(size))
    while not text.is_all(size):
        cut = size - OVERLAP
        following = encode(text.first(cut + PIECE)[cut:])
        first, tokens = piece.tokens(cut, size - END)
        second, others = following.tokens(0, OVERLAP - END)
        if (run := common_run(tokens, others)) is None:
            size *= 2
            piece = encode(text.first(size))
            continue
        yield piece.ids[done : first + run[0]]
        piece, done, size = following, second + run[1], PIECE
        text.drop(cut)
    yield piece.ids[done:]


def common_run(tokens: list[Token], others: list[Token]) -> tuple[int, int] | None:
    """Where RUN tokens in a row are the same, in either list."""
    places = {token: i for i, token in enumerate(others)}
    for i in range(len(tokens) - RUN + 1):
        j = places.get(tokens[i])
        if j is not None and tokens[i : i + RUN] == others[j : j + RUN]:
            return i, j
    return None
