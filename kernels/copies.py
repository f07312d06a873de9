"""Bulk copies of tiles (TMA) by tensor descriptors, on GPUs that have them: sm_90 and sm_100.

One thread issues the copy of a whole tile, and hardware computes the addresses and fills what is beyond the tensor with
zeros, where loads keep addresses and masks in registers. A descriptor is a kernel argument that Triton's launcher
encodes from an address, sizes and strides.
"""

import copy
import inspect
import sys

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_ADDRESSES = 128  # of a descriptor


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


class Descriptors(dict):
    """By address: the same descriptor there, as a launch takes it, which keeps no tensor.

    encode: what a launch takes instead of a descriptor; None for the descriptor itself. The addresses of a model's
    tensors repeat from step to step, and encoding takes some microseconds.
    """

    def __init__(self, descriptor, encode):
        super().__init__()
        self.descriptor, self.encode = Moved(descriptor, 0), encode

    def __missing__(self, address):
        if len(self) >= MAX_ADDRESSES:
            self.clear()
        made = Moved(self.descriptor, address)
        self[address] = made = self.encode(made) if self.encode else made
        return made


def encoding(binary):
    """(what launches a compiled kernel with encoded descriptors, an iterator over the encoders of its descriptors).

    Triton's launcher encodes each descriptor at each launch, and passes on what it is encoded to, its sizes and its
    strides. Where it is not made as in Triton 3.7.1 to 3.9 this is (binary.run, nothing).
    """
    kinds = getattr(binary.metadata, "tensordesc_meta", None)
    if not kinds or None in kinds:  # no descriptor, or the kernel takes the parts of one
        return binary.run, iter(())
    try:
        direct = copy.copy(binary.run)
        make = sys.modules[type(direct).__module__].make_tensordesc_arg
        direct.launch, direct.kernel_signature  # noqa: B018 (raises if one is missing)
        direct.launch = triton.runtime.driver.active.utils.launch
    except AttributeError:
        return binary.run, iter(())
    rest = [None] * (len(inspect.signature(make).parameters) - 2)  # of which tiles depend in no version
    return direct, iter([lambda descriptor, kind=kind: make(descriptor, kind, *rest)[0] for kind in kinds])
