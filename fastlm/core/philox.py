"""Philox-4x32-10 in int64 tensors: the definition of the dropout masks, which every backend reproduces bit for bit.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words, as int64, for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words may wrap to a negative int64. Masking off the sign extension leaves its high word.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & WORD_MASK) ^ c1 ^ k0,
            p1 & WORD_MASK,
            (p0 >> 32 & WORD_MASK) ^ c3 ^ k1,
            p0 & WORD_MASK,
        )
        k0, k1 = k0 + KEY_INCREMENTS[0] & WORD_MASK, k1 + KEY_INCREMENTS[1] & WORD_MASK
    return c0, c1, c2, c3


def dropout_mask(seed: Tensor, rows: int, columns: int, batch_head: Tensor, p: float) -> Tensor:
    """Which elements dropout keeps: bool, (*batch_head.shape, rows, columns).

    batch_head is word 2 of the counter: 0 for a matrix, batch · heads + head for attention weights. Each counter gives
    four words, which belong to columns 16 apart, so that a vector of 16 lanes covers 64 columns of a row with one call.
    """
    blocks = -(-columns // 64)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    counters = torch.arange(blocks * 16, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    key = (seed & WORD_MASK, seed >> 32 & WORD_MASK)
    four = philox((counters, row, batch_head[..., None, None].to(torch.int64), zero), key)
    words = torch.stack(
        [word.expand(*batch_head.shape, rows, blocks * 16).unflatten(-1, (blocks, 16)) for word in four], dim=-2
    )
    return (words >= int(p * 2**32)).flatten(-3)[..., :columns]
