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

from fastlm.core.philox import WORD_MASK, philox

ROUNDS = 8
Keys = tuple[int, ...]


def starts(seed: int, step: int, places: range, *, batch: int, tokens: int, context: int) -> Tensor:
    """(len(places),) int64: where the windows of these places in the batch of a step begin.

    Args:
        seed: of the run, in [0, 2^63).
        step: 0, 1, …
        places: a part of range(batch).
        tokens: number of tokens of the text, at least context + 1.
    """
    count = (tokens - 1) // context
    sequences = step * batch + torch.arange(places.start, places.stop, places.step).numpy()
    begin = np.empty_like(sequences)
    epochs, indices = np.divmod(sequences, count)
    for epoch in np.unique(epochs).tolist():
        own = epochs == epoch
        *keys, shift = keys_of(seed, epoch)
        left = (tokens - 1) % context  # tokens that the windows leave out
        begin[own] = permuted(indices[own], count, tuple(keys)) * context + shift % (left + 1)
    return torch.from_numpy(begin)


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
    """(3, len(places), count) int64: independent random numbers of 32 bits for each token of these places of a step."""
    place = torch.arange(places.start, places.stop, places.step)[:, None]
    token = torch.arange(count)
    counter = (token, place, torch.tensor(step & WORD_MASK), torch.tensor(step >> 32))
    key = (torch.tensor(seed & WORD_MASK), torch.tensor(seed >> 32))
    words = philox(counter, key)
    return torch.stack([word.expand(len(places), count) for word in words[:3]])
