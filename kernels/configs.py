"""Launch configurations by architecture: tiles, warps, stages.

With 8 warps a tile of 64 rows or fewer would be multiplied twice by mma.sync, whose warps take 16 rows each; spilled
registers cost little outside of the loops of products. Tests look at both.

They are looked up by sizes alone, never by timing, so results do not depend on it. Shared memory limits the tiles:
227 KiB per program on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120, 64 on gfx942 and gfx1100. Tests
compile every row for every architecture that uses it.
"""

# (kernel, bytes per element, largest width of a head's tile) → (tile_m, tile_n, warps, stages), of queries and keys.
# "… copies": where bulk copies load the keys and values (copies.py).
SMALL = {  # fits into 99 KiB
    ("forward", 2, 64): (128, 32, 8, 3),
    ("forward", 2, 128): (128, 32, 8, 3),
    ("forward", 2, 256): (64, 32, 8, 2),
    ("forward", 4, 64): (64, 32, 8, 2),
    ("forward", 4, 128): (32, 32, 8, 2),
    ("forward", 4, 256): (16, 16, 8, 2),
    ("query", 2, 64): (128, 64, 8, 2),
    ("query masked", 2, 64): (128, 32, 8, 2),
    ("query", 2, 128): (128, 32, 8, 2),
    ("query", 2, 256): (32, 32, 8, 1),
    ("query", 4, 64): (32, 32, 8, 2),
    ("query", 4, 128): (32, 16, 8, 1),
    ("query", 4, 256): (16, 16, 8, 1),
    ("key", 2, 64): (32, 128, 8, 2),
    ("key masked", 2, 64): (32, 32, 4, 2),
    ("key", 2, 128): (32, 128, 8, 2),
    ("key masked", 2, 128): (32, 32, 4, 2),
    ("key", 2, 256): (16, 32, 8, 1),
    ("key", 4, 64): (32, 32, 8, 2),
    ("key", 4, 128): (16, 32, 8, 1),
    ("key", 4, 256): (16, 16, 8, 1),
    ("mask", 2, 64): (64, 32, 4, 1),
    ("mask", 2, 128): (64, 32, 4, 1),
    ("mask", 2, 256): (16, 32, 4, 1),
    ("mask", 4, 64): (32, 32, 4, 1),
    ("mask", 4, 128): (16, 32, 4, 1),
    ("mask", 4, 256): (16, 16, 4, 1),
    ("decode", 2, 64): (16, 64, 4, 2),
    ("decode", 2, 128): (16, 64, 8, 2),
    ("decode", 2, 256): (16, 32, 4, 2),
    ("decode", 4, 64): (16, 32, 4, 2),
    ("decode", 4, 128): (16, 32, 4, 2),
    ("decode", 4, 256): (16, 16, 4, 2),
}
HOPPER = SMALL | {  # a warpgroup multiplies tiles of at least 64 queries
    ("forward", 2, 64): (128, 128, 8, 3),
    ("forward", 2, 128): (128, 64, 8, 3),
    ("forward copies", 2, 64): (128, 128, 8, 3),
    ("forward copies", 2, 128): (128, 128, 8, 2),
    ("query copies", 2, 64): (128, 64, 8, 2),
    ("query copies", 2, 128): (128, 128, 8, 2),
    ("forward masked", 2, 64): (128, 64, 8, 2),
    ("query masked", 2, 64): (128, 64, 8, 2),
    ("query exact", 2, 64): (128, 32, 8, 2),
    ("key masked", 2, 64): (32, 128, 8, 2),
    ("query", 2, 128): (128, 64, 8, 2),
    ("query exact", 2, 128): (128, 32, 8, 2),
    ("key masked", 2, 128): (16, 128, 8, 2),
}
BLACKWELL = HOPPER | {
    ("query copies", 2, 128): (128, 64, 8, 2),
    ("query masked", 2, 64): (128, 64, 8, 1),
    ("key masked", 2, 64): (32, 128, 8, 1),
    ("key", 2, 128): (32, 32, 4, 2),
    ("key masked", 2, 128): (32, 32, 4, 2),
    ("forward", 2, 64): (128, 64, 8, 3),
    ("forward masked", 2, 128): (64, 64, 8, 2),
}
SM_86 = SMALL | {  # of sm_86, sm_89 and sm_120, on which ptxas allocates registers otherwise than on sm_80
    ("key", 2, 128): (16, 128, 8, 2),
    ("query masked", 2, 128): (128, 16, 8, 2),
}
# AMD: 64 KiB, and loads are prefetched into registers
AMD = SMALL | {
    ("forward", 2, 128): (64, 64, 8, 2),
    ("query", 2, 64): (64, 64, 8, 2),
    ("query masked", 2, 64): (64, 32, 8, 2),
    ("query", 2, 128): (64, 32, 8, 2),
    ("query masked", 2, 128): (32, 32, 8, 2),
    ("query exact", 2, 128): (32, 32, 8, 1),
    ("key", 2, 64): (32, 32, 4, 2),
    ("key masked", 2, 64): (32, 32, 8, 2),
    ("key", 2, 128): (32, 32, 8, 2),
    ("key masked", 2, 128): (32, 32, 8, 2),
    ("mask", 2, 128): (32, 32, 4, 1),
}
ONE_STAGE = {at: (m, n, warps, 1) for at, (m, n, warps, stages) in AMD.items()}

ATTENTION = {"sm_86": SM_86, "sm_89": SM_86, "sm_90": HOPPER, "sm_100": BLACKWELL, "sm_120": SM_86}


def table_of(architecture: str) -> dict[tuple[str, int, int], tuple[int, int, int, int]]:
    """An architecture that is not in the table takes the tiles that fit everywhere."""
    return ATTENTION.get(architecture, ONE_STAGE if architecture.startswith("gfx") else SMALL)


def attention_tile(
    architecture: str, which: str, itemsize: int, block: int, masked: bool = False, exact: bool = False
) -> tuple[int, int, int, int]:
    """(tile_m, tile_n, warps, stages).

    masked: with a mask, key padding, dropout, packed sequences or, backward, a softcap or a window, which need
    registers. exact: EXACT of attention_backward.py.
    """
    table, block = table_of(architecture), max(block, 64)
    names = (f"{which} exact",) * exact + (f"{which} masked",) * masked
    return (
        next((table[name, itemsize, block] for name in names if (name, itemsize, block) in table), None)
        or table[which, itemsize, block]
    )


def copies_tile(architecture: str, which: str, itemsize: int, block: int) -> tuple[int, int, int, int] | None:
    """(tile_m, tile_n, warps, stages) where bulk copies load the tiles of the loop (copies.py); None where they do not.

    Without masks, which need the registers, and packed sequences, behind whose ends are others.
    """
    table, at = table_of(architecture), (f"{which} copies", itemsize, max(block, 64))
    return table[at] if at in table else None


# gelu_mlp and glu_mlp: (architecture, bytes per element) → (tile_m, tile_n, tile_k, warps, stages) of the fused
# products. Where there is no row, the vendor's product and a pointwise kernel are used: on sm_90 and sm_100 the
# vendor's products use hardware that these kernels do not (bulk copies, tensor memory), and in float32 the product
# hides the memory traffic.
MLP = {
    ("sm_80", 2): (128, 64, 32, 8, 3),
    ("sm_86", 2): (128, 64, 32, 8, 3),
    ("sm_89", 2): (128, 64, 32, 8, 3),
    ("sm_120", 2): (64, 128, 32, 8, 3),
}
