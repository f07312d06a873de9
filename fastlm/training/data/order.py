"""The order of training: which windows of the text a step trains on, and the random draws of its objective.

Both are functions of the seed, the step and the place of a sequence in the batch. No state has to be stored to go on
from a step, and each of several processes can compute its part of a batch.

A text of n tokens has N = (n − 1) // context windows of context + 1 tokens, of which neighbours share one. Sequence
g = step · batch + place of a run is window π(g mod N) of epoch g // N. The permutation π of an epoch is a Feistel
network on the smallest power of two ≥ N, applied until the result is < N (cycle walking; Black & Rogaway, 2002,
"Ciphers with arbitrary finite domains"), so that it takes no memory. An epoch begins at one of the first tokens of the
text, so that the tokens that its windows leave out at the end are not always the same.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

ROUNDS = 8
BLOCK = 4096  # sequences at most whose windows are computed at once
Keys = tuple[int, ...]


def starts(seed: int, step: int, places: range, *, batch: int, tokens: int, context: int) -> Tensor:
    """(len(places),) int64: where the windows of these places in the batch of a step begin.

    Args:
        seed: of the run, in [0, 2^63).
        step: 0, 1, …
        places: a part of range(batch), without gaps.
        tokens: number of tokens of the text, at least context + 1.
    """
    out = torch.empty(len(places), dtype=torch.int64)
    size = min(BLOCK, max(64, (tokens - 1) // context))
    first, filled = step * batch + places.start, 0
    while filled < len(out):
        number, offset = divmod(first + filled, size)
        some = block(seed, number, size, tokens, context)[offset : offset + len(out) - filled]
        out[filled : filled + len(some)] = torch.from_numpy(some)
        filled += len(some)
    return out


@functools.lru_cache(maxsize=4)
def block(seed: int, number: int, size: int, tokens: int, context: int) -> np.ndarray:
    """Where the windows of the sequences number · size … of a run begin. One at a time would take 50 times as long."""
    count = (tokens - 1) // context
    sequences = np.arange(number * size, (number + 1) * size)
    begins = np.empty_like(sequences)
    epochs, indices = np.divmod(sequences, count)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        own = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
        *keys, shift = keys_of(seed, epoch)
        left = (tokens - 1) % context  # tokens that the windows leave out
        begins[own] = permuted(indices[own], count, tuple(keys)) * context + shift % (left + 1)
    return begins


@functools.lru_cache(maxsize=8)
def keys_of(seed: int, epoch: int) -> Keys:
    """Numbers of 64 bits: a key for each round, and another one."""
    digests = [hashlib.sha256(f"{seed} {epoch} {i}".encode()).digest() for i in range(ROUNDS + 1)]
    return tuple(int.from_bytes(digest[:8], "little") for digest in digests)


def permuted(indices: np.ndarray, count: int, keys: Keys) -> np.ndarray:
    """The images of indices in [0, count) under a permutation of that range."""
    bits = (count - 1).bit_length()
    values = feistel(indices.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(values >= count)):  # less than half of them are, on average
        values[outside] = feistel(values[outside], bits, keys)
    return values.astype(np.int64)


def feistel(values: np.ndarray, bits: int, keys: Keys) -> np.ndarray:
    """A permutation of the numbers of so many bits. With an odd number of bits the halves swap their sizes."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    low, high = values & mask(low_bits), values >> np.uint64(low_bits)
    for key in keys:
        low, high = high, low ^ (mixed(high, key) & mask(low_bits))
        low_bits, high_bits = high_bits, low_bits
    return high << np.uint64(low_bits) | low


def mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def mixed(values: np.ndarray, key: int) -> np.ndarray:
    """A hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea & Flood, 2014)."""
    values = values + np.uint64(key)  # arithmetic of arrays wraps around
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def draws(seed: int, step: int, places: range, count: int) -> Tensor:
    """(len(places), 3, count) int64: independent random numbers of 32 bits for each token of these places of a step.

    They are those of NumPy's Philox-4x64-10 with the seed as its key and the step in its counter.
    """
    per_place = -(-3 * count // 4)  # of the counter, each of which gives four numbers
    generator = np.random.Philox(key=[seed, 0], counter=[places.start * per_place, 0, step, 0])
    numbers = generator.random_raw(len(places) * per_place * 4) >> np.uint64(32)
    by_place = numbers.astype(np.int64).reshape(len(places), per_place * 4)[:, : 3 * count]
    return torch.from_numpy(by_place.reshape(len(places), 3, count))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the dropout of a step in a process, of 63 bits."""
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
