"""Chunks of logits (rows, vocab), under the loss and `linear_log_prob`."""

import triton
import triton.language as tl

from fastlm.kernels.elementary import tanh
from fastlm.kernels.sizes import cdiv

ROWS_PER_PARTIAL = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def transformed(z, scale, softcap, SOFTCAP: tl.constexpr):
    """A logit of the product, scaled and capped."""
    z = z.to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def load_logits(logits_ptr, column, vocab, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled and capped; −inf beyond the vocabulary."""
    z = transformed(tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")), scale, softcap, SOFTCAP)
    return tl.where(column < vocab, z, float("-inf")) if SOFTCAP else z


@triton.jit
def slope(z, softcap, SOFTCAP: tl.constexpr):
    """The derivative of the cap, by its result."""
    return 1 - (z / softcap) * (z / softcap) if SOFTCAP else 1.0


def num_partials(rows):
    """The number of partial sums over rows that a kernel by columns writes for the gradient of a bias."""
    return cdiv(rows, ROWS_PER_PARTIAL)
