"""What the kernels of feed-forward blocks share: activations, tiles of a product, and their order.

There are as many programs as the GPU has multiprocessors. They iterate over the tiles in groups of rows, so that the
weights of a group stay in the cache. The contents of a tile do not depend on which program computes it, so results are
the same on every GPU of an architecture.
"""

import triton
import triton.language as tl

from fastlm.kernels.configs import MLP


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """(gelu(x), gelu'(x)) of float32."""
    if TANH:
        # ½ (1 + tanh(t)) = 1 / (1 + exp(−2t)): no cancellation, and no tanh, which not every GPU has
        t = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        half = 1 / (1 + tl.exp(-t))
        slope = half + x * half * (1 - half) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        half = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return x * half, slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) of float32."""
    if ACTIVATION == "silu":
        half = 1 / (1 + tl.exp(-x))
        value = x * half
        slope = half + value * (1 - half)
    elif ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)  # NaN stays
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        value, slope = gelu(x, ACTIVATION == "gelu_tanh")
    return value, slope


@triton.jit
def tile_coordinates(tile, tiles_m, tiles_n):
    """(row, column) of a tile: GROUP rows of tiles at a time, by columns, which keeps the weights in the cache."""
    GROUP: tl.constexpr = 8
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit
def product(
    a_ptr,
    a_stride,
    w_ptr,
    w_k_stride,
    w_n_stride,
    row,
    column,
    rows,
    k,
    n,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a @ w in float32. Rows and columns beyond the end wrap around; their results are not stored."""
    m = row * TILE_M + tl.arange(0, TILE_M)
    j = column * TILE_N + tl.arange(0, TILE_N)
    inner_index = tl.arange(0, TILE_K)
    a_at = a_ptr + (m % rows).to(tl.int64)[:, None] * a_stride + inner_index[None, :]
    w_at = w_ptr + inner_index.to(tl.int64)[:, None] * w_k_stride + (j % n).to(tl.int64)[None, :] * w_n_stride
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for begin in range(0, k, TILE_K):
        inside = inner_index < k - begin
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_at += TILE_K
        w_at += tl.cast(TILE_K, tl.int64) * w_k_stride
    return acc


def fused_tile(architecture, itemsize):
    """(tile_m, tile_n, tile_k, warps, stages), or None to use the vendor's product and a pointwise kernel."""
    return MLP.get((architecture, itemsize))


def num_programs(tiles, num_processors):
    return tiles if num_processors is None else min(tiles, num_processors)
