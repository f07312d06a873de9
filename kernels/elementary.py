"""Elementary functions that Triton does not have on every GPU."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of float32. 1 − 2 / (exp(2|x|) + 1) would cancel near 0."""
    square = x * x
    p = -5.515159739e-3 * square + 2.046941607e-2
    p = p * square - 5.368802192e-2
    p = p * square + 1.333083033e-1
    p = p * square - 3.333325985e-1
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.65, x + x * square * p, tl.where(x < 0, -large, large))
