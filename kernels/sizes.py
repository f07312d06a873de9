"""Sizes on the host, in plain Python: Triton's functions of these names serve kernels too, and cost a microsecond or two a call."""


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least that is n or more; n ≥ 1."""
    return 1 << (n - 1).bit_length()
