"""Makes fastlm's triton backend run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1), and corrects that.

The interpreter of Triton 3.6 to 3.9 stores bfloat16 as integers. It truncates float32 to bfloat16, where GPUs round to
nearest even, and its matrix product multiplies the integers. Triton 3.6 converts a scalar to an index in a way that
NumPy 2.4 rejects. The interpreter also ignores the launch option `debug`, which decides whether device_assert is
checked.
"""

import numpy as np
import torch
from triton.runtime import interpreter

from fastlm.backends import triton as backend
from fastlm.kernels import configs

# Small, so that small tests have several tiles, and not square, so that mixed-up dimensions show.
NOT_SQUARE = {"forward": (64, 32), "query": (32, 64), "key": (32, 64), "mask": (64, 32), "decode": (16, 32)}
TILES = {at: (*NOT_SQUARE[at[0]], 1, 1) for at in configs.SMALL if at[0] in NOT_SQUARE}

tl = interpreter.tl
Builder, Handle, Executor = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.GridExecutor
original_cast, original_dot = Builder.cast_impl, Builder.create_dot
original_patch, original_call = interpreter._patch_lang_tensor, Executor.__call__


def cast_impl(self, source, dtype):
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return Handle(bits.reshape(source.data.shape), dtype.scalar)
    return original_cast(self, source, dtype)


def create_dot(self, a, b, acc, *options):
    a, b = (
        Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return original_dot(self, a, b, acc, *options)


def patch_lang_tensor(tensor, *scope):
    original_patch(tensor, *scope)
    tensor.__index__ = lambda scalar: scalar.handle.data.item()


def call(self, *arguments, debug=False, **options):
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=debug, sanitize_overflow=False)
    return original_call(self, *arguments, **options)


def correct() -> None:
    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor, Executor.__call__ = patch_lang_tensor, call


def install() -> None:
    correct()
    configs.ATTENTION["cpu"] = TILES
    configs.MLP |= {("cpu", itemsize): (64, 32, 32, 1, 1) for itemsize in (2, 4)}
    backend.accept("cpu")
