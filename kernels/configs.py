"""Launch configurations by architecture: tiles, warps, stages. One small table, looked up by sizes alone, never by timing: bits do not depend on luck.

Shared memory bounds the tiles: 227 KiB a program on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120, 64 on gfx942 and gfx1100. Tests
compile every row for every architecture that it serves.
"""

# (pass, bytes of an element, width of the head's tile up to) → (tile_m, tile_n, warps, stages): queries, keys
SMALL = {  # what 99 KiB hold
    ("forward", 2, 64): (128, 32, 8, 3),
    ("forward", 2, 128): (64, 64, 8, 2),
    ("forward", 2, 256): (64, 32, 8, 2),
    ("forward", 4, 64): (64, 32, 8, 2),
    ("forward", 4, 128): (32, 32, 8, 2),
    ("forward", 4, 256): (16, 16, 8, 2),
    ("query", 2, 64): (64, 64, 8, 2),
    ("query masked", 2, 64): (64, 32, 8, 2),
    ("query masked", 2, 128): (32, 32, 8, 2),
    ("query exact", 2, 128): (32, 32, 8, 1),
    ("query", 2, 128): (64, 32, 8, 2),
    ("query", 2, 256): (32, 32, 8, 1),
    ("query", 4, 64): (32, 32, 8, 2),
    ("query", 4, 128): (32, 16, 8, 1),
    ("query", 4, 256): (16, 16, 8, 1),
    ("key", 2, 64): (32, 32, 4, 2),
    ("key masked", 2, 64): (32, 32, 8, 2),
    ("key exact", 2, 64): (32, 32, 8, 2),
    ("key", 2, 128): (32, 32, 8, 2),
    ("key exact", 2, 128): (32, 32, 8, 2),
    ("key", 2, 256): (16, 32, 8, 1),
    ("key", 4, 64): (32, 32, 8, 2),
    ("key", 4, 128): (16, 32, 8, 1),
    ("key", 4, 256): (16, 16, 8, 1),
    ("mask", 2, 64): (64, 32, 8, 1),
    ("mask", 2, 128): (32, 32, 4, 1),
    ("mask", 2, 256): (16, 32, 4, 1),
    ("mask", 4, 64): (32, 32, 4, 1),
    ("mask", 4, 128): (16, 32, 4, 1),
    ("mask", 4, 256): (16, 16, 4, 1),
    ("decode", 2, 64): (16, 64, 4, 2),
    ("decode", 2, 128): (16, 64, 4, 2),
    ("decode", 2, 256): (16, 32, 4, 2),
    ("decode", 4, 64): (16, 32, 4, 2),
    ("decode", 4, 128): (16, 32, 4, 2),
    ("decode", 4, 256): (16, 16, 4, 2),
}
LARGE = SMALL | {  # sm_80
    ("forward", 2, 128): (128, 32, 8, 3),
}
HOPPER = LARGE | {  # a warpgroup of four multiplies tiles of 64 queries at least
    ("forward", 2, 64): (128, 128, 8, 3),
    ("forward", 2, 128): (128, 64, 8, 3),
    ("query", 2, 64): (128, 64, 8, 2),
    ("query masked", 2, 64): (128, 64, 8, 2),
    ("query exact", 2, 64): (128, 32, 8, 2),
    ("key", 2, 64): (32, 128, 8, 2),
    ("forward masked", 2, 64): (128, 64, 8, 2),
    ("query", 2, 128): (64, 64, 8, 2),
    ("query masked", 2, 128): (64, 32, 8, 2),
    ("key masked", 2, 128): (32, 32, 8, 1),
}
BLACKWELL = HOPPER | {
    ("forward", 2, 64): (128, 64, 8, 3),
    ("forward masked", 2, 128): (64, 64, 8, 2),
}
SM_120 = SMALL | {  # as ptxas deals out registers there, SMALL's rows spill a few
    ("query masked", 2, 128): (32, 16, 8, 2),
    ("query exact", 2, 64): (64, 32, 8, 1),
}
ONE_STAGE = {
    at: (m, n, warps, 1) for at, (m, n, warps, stages) in SMALL.items()
}  # AMD: 64 KiB, and loads are kept in flight in registers
# Small, so that small tests have several tiles, and of unlike sides, so that no side is taken for the other.
UNLIKE = {"forward": (64, 32), "query": (32, 64), "key": (32, 64), "mask": (64, 32), "decode": (16, 32)}
INTERPRETER = {at: (*UNLIKE[at[0]], 1, 1) for at in SMALL if at[0] in UNLIKE}

ATTENTION = {"sm_80": LARGE, "sm_90": HOPPER, "sm_100": BLACKWELL, "sm_120": SM_120, "interpreter": INTERPRETER}


def table_of(architecture: str) -> dict[tuple[str, int, int], tuple[int, int, int, int]]:
    """An architecture that is not in the table gets the tiles that fit everywhere."""
    return ATTENTION.get(architecture, ONE_STAGE if architecture.startswith("gfx") else SMALL)


def attention_tile(
    architecture: str, which: str, itemsize: int, block: int, masked: bool = False, exact: bool = False
) -> tuple[int, int, int, int]:
    """masked: with what wants registers too: a mask, padding, dropout, packed sequences. exact: with the products in two parts of attention_backward.py."""
    table, block = table_of(architecture), max(block, 64)
    names = (f"{which} exact",) * exact + (f"{which} masked",) * masked
    return (
        next((table[name, itemsize, block] for name in names if (name, itemsize, block) in table), None)
        or table[which, itemsize, block]
    )


# gelu_mlp: (architecture, bytes of an element) → (tile_m, tile_n, tile_k, warps, stages) of the fused products. Not in the table: the vendor's product
# and a pointwise pass. Predicted, until measured: on sm_90 and sm_100 the vendor's products use hardware that these kernels do not (bulk copies, tensor
# memory) and outrun the fusion; in float32 nothing is gained, as the product hides the traffic.
MLP = {
    ("sm_80", 2): (128, 64, 32, 8, 3),
    ("sm_86", 2): (128, 64, 32, 8, 3),
    ("sm_89", 2): (128, 64, 32, 8, 3),
    ("sm_120", 2): (64, 128, 32, 8, 3),
    ("interpreter", 2): (64, 32, 32, 1, 1),
    ("interpreter", 4): (64, 32, 32, 1, 1),
}
