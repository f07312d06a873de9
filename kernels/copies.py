"""Bulk copies of tiles (TMA) by tensor descriptors, on GPUs that have them: sm_90 and sm_100.

One thread issues the copy of a whole tile, and hardware computes the addresses and fills what is beyond the tensor with
zeros, where loads keep addresses and masks in registers. A descriptor is a kernel argument that Triton's launcher
encodes from an address, sizes and strides.
"""

from triton.tools.tensor_descriptor import TensorDescriptor


def of_heads(x, strides, tile, block):
    """The descriptor of (batch, heads, tokens, head_dim) for tiles of (tile, block), or None if there can be none.

    Its address and strides are multiples of 16 bytes, and no stride is 0. strides: of all dimensions but the last, 0
    where the size is 1.
    """
    if x.data_ptr() % 16:
        return None
    given = []
    for size, stride in zip(x.shape, strides, strict=False):
        if size == 1:
            stride = block  # any that is valid
        if stride * x.dtype.itemsize % 16 or stride <= 0:
            return None
        given.append(stride)
    return TensorDescriptor(x, list(x.shape), [*given, 1], [1, 1, tile, block])


def key(descriptor):
    """What a compiled kernel depends on."""
    return descriptor.base.dtype, *descriptor.block_shape


class Address:
    """A tensor of which only the address is known, as the launcher takes it."""

    __slots__ = ("address",)

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


class Moved:
    """A descriptor at another address, with the attributes of a TensorDescriptor, which the launcher reads."""

    def __init__(self, descriptor, address):
        self.__dict__ = descriptor.__dict__ | {"base": Address(address)}
