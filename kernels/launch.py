"""Every kernel is launched here, and the second launch of a kind is cheap.

Triton binds and specialises the arguments of each launch anew, in Python, and at the widths of GPT-2 small it is launches that decide. Here a launch is
looked up, first by its numbers as they are, then, where they are new, by what Triton specialises on (types, 16-byte alignment, integers that are 1,
multiples of 16 or wider than 32 bits, constants, and for AMD GPUs whether a tensor's storage is within 2 GiB, where offsets of 32 bits reach all of it).
From the second time on the compiled kernel is started as Triton itself starts one, unless a profiler has asked Triton to tell it of launches.
"""

import functools

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # @triton.jit reads it when the kernels are imported
HIP = torch.version.hip is not None
NUMBERS = frozenset((int, float, type(None)))
compiled: dict[tuple, object] = {}  # by kinds
repeated: dict[tuple, tuple] = {}  # by numbers, and the types and alignments of tensors: how to start it
MOST = 4096  # of each; a program that never repeats a launch must not grow without bound


def kind(argument):
    """What a compiled kernel depends on in one argument. Of integers that Triton was told not to specialise this is more than it needs: never less."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if argument is None or isinstance(argument, float):
        return argument is None
    if HIP:
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.untyped_storage().nbytes() < 2**31
    return argument.dtype, argument.data_ptr() % 16 == 0


@functools.cache
def current_stream():
    """Triton's function of a device's index."""
    return triton.runtime.driver.active.get_current_stream


def watched():
    """Whether someone is to be told of every launch."""
    return bool(triton.knobs.runtime.launch_enter_hook.calls or triton.knobs.runtime.launch_exit_hook.calls)


def launch_by_triton(kernel, programs, arguments, constants, warps, stages, debug):
    """Compiles the kernel if necessary, launches it and returns what was compiled (None from the interpreter)."""
    options = {"debug": True, "sanitize_overflow": False} if debug else {}
    return kernel[(programs,)](
        *arguments, *constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **options
    )


def launch(kernel, programs, arguments, constants, warps, stages, device, debug=False):
    """kernel[(programs,)](*arguments, *constants), in the order of its parameters, on the current device, which is `device`.

    debug: device_assert is compiled in. Floating-point contraction is on: without it each multiply-add costs two instructions.
    """
    if programs == 0:
        return
    if INTERPRETED:
        launch_by_triton(kernel, programs, arguments, constants, warps, stages, debug)
        return
    known = id(kernel), device, warps, stages, constants  # kernels live as long as their module, and hash slowly
    same = (
        *known,
        *[
            a
            if type(a) in NUMBERS
            else (a.dtype, a.untyped_storage().nbytes() < 2**31 if HIP else 0, a.data_ptr() & 15)
            for a in arguments
        ],
    )
    ready = repeated.get(same)
    if ready is None:
        key = *known, *map(kind, arguments)
        binary = compiled.get(key)
        if binary is None:
            if len(compiled) >= MOST:
                compiled.clear()
            compiled[key] = launch_by_triton(kernel, programs, arguments, constants, warps, stages, debug)
            return
        if len(repeated) >= MOST:
            repeated.clear()
        ready = repeated[same] = binary, binary.run, binary.function, binary.packed_metadata
    binary, run, function, metadata = ready
    if watched():
        binary[(programs, 1, 1)](*arguments, *constants)
    else:
        run(programs, 1, 1, current_stream()(device), function, metadata, None, None, None, *arguments, *constants)
