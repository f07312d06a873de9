"""Sizes on the host, in plain Python. Triton's functions of the same names cost one or two microseconds per call."""


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; n ≥ 1."""
    return 1 << (n - 1).bit_length()
