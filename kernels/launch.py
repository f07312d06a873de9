"""Every kernel is launched here, and the second launch of a kind is cheap.

Triton binds and specialises the arguments of each launch anew, in Python; at the widths of GPT-2 small that costs more than the kernel. Here a launch is
looked up by what Triton specialises on (types, 16-byte alignment, integers that are 1, multiples of 16 or wider than 32 bits, constants, and for AMD GPUs
whether a tensor's storage is within 2 GiB, where offsets of 32 bits reach all of it), and from the second time on the compiled kernel is called
directly, as Triton's own tutorials call one that was warmed up.
"""

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # what @triton.jit made of the kernels, decided when they are imported
if INTERPRETED:
    from fastlm.kernels import interpreter

    interpreter.mend()

HIP = torch.version.hip is not None
compiled: dict[tuple, object] = {}
MOST_COMPILED = 4096  # a program that never repeats a kind of launch must not grow without bound


def kind(argument):
    """What a compiled kernel depends on in one argument. Of integers that Triton was told not to specialise this is more than it needs: never less."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if argument is None or isinstance(argument, float):
        return argument is None
    if HIP:
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.untyped_storage().nbytes() < 2**31
    return argument.dtype, argument.data_ptr() % 16 == 0


def launch(kernel, programs, arguments, constants, warps, stages, device, debug=False):
    """kernel[(programs,)](*arguments, *constants), in the order of its parameters, on the current device, which is `device`.

    debug: device_assert is compiled in. Floating-point contraction is on: without it each multiply-add costs two instructions.
    """
    if programs == 0:
        return
    if INTERPRETED:
        interpreter.check(debug)
        kernel[(programs,)](*arguments, *constants)
        return
    key = kernel, device, warps, stages, constants, *map(kind, arguments)
    ready = compiled.get(key)
    if ready is not None:
        ready[(programs, 1, 1)](*arguments, *constants)
        return
    if len(compiled) >= MOST_COMPILED:
        compiled.clear()
    options = {"debug": True, "sanitize_overflow": False} if debug else {}
    compiled[key] = kernel[(programs,)](*arguments, *constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **options)
