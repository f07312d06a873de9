"""Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensors: the dropout masks of every backend.

For a given seed the mask is the same bit for bit in C++, CUDA and Triton; this is the definition that they are tested against.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words, as int64, for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words wraps to a negative int64; its upper word is right all the same once the sign's copies are masked off.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def kept(seed: Tensor, rows: int, columns: int, third: Tensor, p: float) -> Tensor:
    """Which elements dropout keeps, bool: (*third.shape, rows, columns).

    Word 2 of the counter is `third`: 0 for a matrix, batch·heads + head for attention weights. Each counter gives four words,
    which stand 16 columns apart: a vector of 16 lanes fills 64 columns of a row with one call.
    """
    blocks = -(-columns // 64)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    counters = torch.arange(blocks * 16, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    each = philox((counters, row, third[..., None, None].to(torch.int64), zero), (seed & WORD, seed >> 32 & WORD))
    words = torch.stack(
        [word.expand(*third.shape, rows, blocks * 16).unflatten(-1, (blocks, 16)) for word in each], dim=-2
    )
    return (words >= int(p * 2**32)).flatten(-3)[..., :columns]
