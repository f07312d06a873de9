"""Kernel launches. The second launch of the same kind is cheap.

Triton binds and specialises the arguments of each launch in Python, which dominates at the widths of GPT-2 small. Here
a launch is looked up, first by its values, then, if they are new, by what Triton specialises on: types, 16-byte
alignment, integers that are 1, multiples of 16 or wider than 32 bits, constants, and for AMD GPUs whether the storage
of a tensor is smaller than 2 GiB, where 32-bit offsets reach all of it. From the second time on the compiled kernel is
launched directly, unless a profiler has registered launch hooks with Triton.
"""

import functools
import threading

import torch
import triton

from fastlm.kernels.copies import TensorDescriptor
from fastlm.kernels.copies import key as key_of_copies

HIP = torch.version.hip is not None
NUMBERS = frozenset((int, float, type(None)))
compiled: dict[tuple, object] = {}  # by the kinds of the arguments
repeated: dict[tuple, tuple] = {}  # by scalars and the dtypes and alignments of tensors: how to launch it
recording = threading.local()  # launches: what plan.py records in this thread, or None
MAX_ENTRIES = 4096  # of each: a program that never repeats a launch must not grow without bound


def kind(argument):
    """What a compiled kernel depends on in one argument. For integers with do_not_specialize it is more than needed."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if argument is None or isinstance(argument, float):
        return argument is None
    if isinstance(argument, TensorDescriptor):
        return key_of_copies(argument)
    if HIP:
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.untyped_storage().nbytes() < 2**31
    return argument.dtype, argument.data_ptr() % 16 == 0


@functools.cache
def current_stream():
    """Triton's function from a device index to its current stream."""
    return triton.runtime.driver.active.get_current_stream


def has_launch_hooks():
    return bool(triton.knobs.runtime.launch_enter_hook.calls or triton.knobs.runtime.launch_exit_hook.calls)


def launch_by_triton(kernel, programs, arguments, constants, warps, stages, debug):
    """Compiles the kernel if necessary, launches it and returns what was compiled, if anything was."""
    options = {"debug": True, "sanitize_overflow": False} if debug else {}
    return kernel[(programs,)](
        *arguments, *constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **options
    )


def record(*launch):
    """Adds (binary, programs, arguments, constants) to what this thread records, if it does."""
    recorded = getattr(recording, "launches", None)
    if recorded is not None:
        recorded.append(launch)


def launch(kernel, programs, arguments, constants, warps, stages, device, debug=False):
    """kernel[(programs,)](*arguments, *constants), in the order of its parameters, on `device`, the current device.

    debug: compile device_assert in. Floating-point contraction is on: otherwise a multiply-add takes two instructions.
    """
    if programs == 0:
        return
    known = (
        id(kernel),
        device,
        warps,
        stages,
        constants,
    )  # kernels live as long as their module, and hashing them is slow
    same = (
        *known,
        *[
            a
            if type(a) in NUMBERS
            else key_of_copies(a)
            if type(a) is TensorDescriptor
            else (a.dtype, a.untyped_storage().nbytes() < 2**31 if HIP else 0, a.data_ptr() & 15)
            for a in arguments
        ],
    )
    ready = repeated.get(same)
    if ready is None:
        key = *known, *map(kind, arguments)
        binary = compiled.get(key)
        if binary is None:
            if len(compiled) >= MAX_ENTRIES:
                compiled.clear()
            binary = launch_by_triton(kernel, programs, arguments, constants, warps, stages, debug)
            if binary is not None:
                compiled[key] = binary
                record(binary, programs, arguments, constants)
            return
        if len(repeated) >= MAX_ENTRIES:
            repeated.clear()
        ready = repeated[same] = binary, binary.run, binary.function, binary.packed_metadata
    binary, run, function, metadata = ready
    record(binary, programs, arguments, constants)
    if has_launch_hooks():
        binary[(programs, 1, 1)](*arguments, *constants)
    else:
        run(programs, 1, 1, current_stream()(device), function, metadata, None, None, None, *arguments, *constants)
