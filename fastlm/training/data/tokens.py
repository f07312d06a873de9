"""Token ids that are mapped into memory: a text in shards, read in windows."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The ids begin … end − 1 of a text.

    Attributes:
        shards: arrays of ids, which follow one another.
        ends: where each document of the text ends, int64, ascending; None: the text is one document.
    """

    shards: Sequence[np.ndarray]
    ends: np.ndarray | None = None
    begin: int = 0
    end: int = -1  # −1: that of the shards
    firsts: np.ndarray = dataclasses.field(init=False)  # the index of the first id of each shard, and of the end

    def __post_init__(self) -> None:
        firsts = np.cumsum([0, *(len(shard) for shard in self.shards)], dtype=np.int64)
        object.__setattr__(self, "firsts", firsts)  # the class is frozen
        if self.end < 0:
            object.__setattr__(self, "end", int(firsts[-1]))

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def dtype(self) -> np.dtype:
        """Of the stored ids."""
        return self.shards[0].dtype

    def cut(self, count: int) -> tuple["Tokens", "Tokens"]:
        """The first `count` ids, and the others."""
        middle = self.begin + count
        return dataclasses.replace(self, end=middle), dataclasses.replace(self, begin=middle)

    def __getitem__(self, index: slice) -> Tensor:
        """A slice of the ids, int64."""
        start, stop, step = index.indices(len(self))
        return torch.from_numpy(self.read(start, max(0, stop - start)))[::step]

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) ids from `start` on, int64."""
        out = np.empty(count, dtype=np.int64)
        start, filled = start + self.begin, 0
        shard = int(np.searchsorted(self.firsts, start, side="right")) - 1
        while filled < count:
            offset = start + filled - int(self.firsts[shard])
            some = self.shards[shard][offset : offset + count - filled]
            out[filled : filled + len(some)] = some
            filled += len(some)
            shard += 1
        return out

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """(len(starts), length) ids, int64: a window from each start on."""
        if len(self.shards) == 1:
            index = starts.numpy()[:, None] + np.arange(self.begin, self.begin + length)
            return torch.from_numpy(self.shards[0][index].astype(np.int64))
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self.read(start, length)
        return torch.from_numpy(out)

    def positions(self, starts: Tensor, length: int) -> Tensor:
        """(len(starts), length), int64: the position of each token of the windows in its document.

        A document that begins before a window counts from the beginning of the window.
        """
        out = np.empty((len(starts), length), dtype=np.int64)
        index = np.arange(length)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = 0
            if self.ends is not None:
                first = start + self.begin
                low, high = np.searchsorted(self.ends, np.array([first, first + length - 1]), side="right")
                begins = self.ends[low:high] - first
                row[begins] = begins
                np.maximum.accumulate(row, out=row)
            row[:] = index - row
        return torch.from_numpy(out)
