"""Triton's interpreter, mended where it does not do what every GPU does. Imported only under TRITON_INTERPRET=1.

It keeps bfloat16 as integers, truncates when it converts float32 to them (GPUs round to nearest even), and multiplies matrices of them as the integers
that they are not. Seen in Triton 3.6 to 3.9. That of 3.6 turns a number into an index in a way that NumPy 2.4 refuses.
"""

import numpy as np
import torch
from triton.runtime import interpreter

tl = interpreter.tl
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
cast_as_it_comes, dot_as_it_comes, patch_as_it_comes = (
    Builder.cast_impl,
    Builder.create_dot,
    interpreter._patch_lang_tensor,
)


def cast_impl(self, source, dtype):
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return Handle(bits.reshape(source.data.shape), dtype.scalar)
    return cast_as_it_comes(self, source, dtype)


def create_dot(self, a, b, total, *options):
    a, b = (
        Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return dot_as_it_comes(self, a, b, total, *options)


def patch_lang_tensor(tensor, *scope):
    patch_as_it_comes(tensor, *scope)
    tensor.__index__ = lambda number: number.handle.data.item()


def check(asserts: bool) -> None:
    """Whether device asserts are checked in what is launched next: it leaves them out, as launches without debug do."""
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=asserts, sanitize_overflow=False)


def mend() -> None:
    Builder.cast_impl, Builder.create_dot, interpreter._patch_lang_tensor = cast_impl, create_dot, patch_lang_tensor
