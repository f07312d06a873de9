"""Launches every kernel through Triton's real launcher, on a stub of the CUDA driver: launches.py OUT.json FOLDER

It needs a process of its own, with FOLDER, which holds the stub (stub_libcuda.c), in LD_LIBRARY_PATH and
TRITON_LIBCUDA_PATH. The backend is called with CPU tensors as if they were on an H100, and each launch is made four
times: through kernels/launch.py with other values of the same kinds, through it with its own values, which is a direct
launch, a second time with the same values, and through Triton. OUT.json gets what the driver received each time, and
what it should have received. Then whole calls are made twice: the second time they are launched by a plan
(kernels/plan.py); and one with bulk copies on two sets of inputs in turn.
"""

import ctypes
import dataclasses
import itertools
import json
import re
import struct
import sys
import types
from pathlib import Path

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

STREAM = 0x1230  # the current stream
CASES = {  # every kernel, with and without its optional arguments, with the tiles of a GPU: small tiles compile faster
    "attention bfloat16 64 causal": "sm_90",  # bulk copies
    "attention bfloat16 64 bias dropout": "sm_86",
    "attention bfloat16 64 bias dropout softcap": "sm_86",
    "attention bfloat16 64 bool padding": "sm_90",
    "attention bfloat16 64 packed": "sm_86",
    "attention bfloat16 64 decode softcap": "sm_90",
    "layernorm_residual bfloat16 768 dropout float32 stream": "sm_90",
    "rms_norm_residual bfloat16 128 heads": "sm_90",
    "rms_norm_residual bfloat16 960 dropout float32 stream": "sm_90",
    "rotary bfloat16 128 partial": "sm_90",
    "gelu_mlp bfloat16 recompute 0": "sm_90",
    "gelu_mlp bfloat16 recompute 1": "sm_80",  # fused
    "glu_mlp bfloat16 silu recompute 1": "sm_90",
    "glu_mlp bfloat16 gelu_tanh recompute 0": "sm_80",  # fused
    "linear_cross_entropy bfloat16": "sm_90",
    "linear_cross_entropy bfloat16 bias softcap": "sm_90",
    "linear_log_prob bfloat16": "sm_90",
    "linear_log_prob bfloat16 bias softcap": "sm_90",
}


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p))
loaded = {}  # the driver's handle of a function → (its name, the size of each parameter)
driven = []  # all launches that the driver received
through_triton = []  # the kernels that Triton launched itself


@LAUNCH
def on_launch(function, config, parameters):
    name, sizes = loaded[function]
    made = config.contents
    driven.append(
        {
            "kernel": name,
            "grid": [made.grid_x, made.grid_y, made.grid_z],
            "block": [made.block_x, made.block_y, made.block_z],
            "shared": made.shared,
            "stream": made.stream,
            "attributes": made.attribute_count,
            "parameters": [
                int.from_bytes(ctypes.string_at(parameters[i], size), "little") for i, size in enumerate(sizes)
            ],
        }
    )


def parameter_sizes(ptx):
    """The sizes of the kernel parameters in bytes."""
    header = re.search(r"\.entry \w+\((.*?)\n\)", ptx, re.DOTALL).group(1)
    found = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+) [^\n\[]*(?:\[(\d+)\])?", header)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def drive(folder, count=True):
    """Replaces the driver by the stub, and makes PyTorch report one H100. count: record what it receives."""
    stub = ctypes.CDLL(str(folder / "libcuda.so.1"))
    if count:
        ctypes.c_void_p.in_dll(stub, "on_launch").value = ctypes.cast(on_launch, ctypes.c_void_p).value
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda index=None: (9, 0)
    torch.cuda.current_stream = lambda index=None: types.SimpleNamespace(cuda_stream=STREAM)
    torch._C._cuda_getCurrentRawStream = lambda index: STREAM  # Triton prefers this function of a PyTorch for CUDA
    if not count:
        return

    load = triton.compiler.CompiledKernel._init_handles
    run = triton.JITFunction.run

    def and_measure(self):
        known = self.function
        load(self)
        if self.function != known:
            loaded[self.function] = self.name, parameter_sizes(self.asm["ptx"])

    def and_count(self, *arguments, **options):
        through_triton.append(self.__name__)
        return run(self, *arguments, **options)

    triton.compiler.CompiledKernel._init_handles = and_measure
    triton.JITFunction.run = and_count


def another(value):
    """Another value of the same kind in the sense of launch.kind."""
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=another(value.base))
    if isinstance(value, torch.Tensor):
        offset = value.data_ptr() % 16 // value.itemsize  # the same distance from a multiple of 16 bytes
        extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        return torch.empty(offset + extent, dtype=value.dtype).as_strided(value.shape, value.stride(), offset)
    if isinstance(value, float):
        return value + 0.5
    return value if value is None or value == 1 else value + 32


def parameters_of(kernel, arguments):
    """The bits that the driver should receive: all arguments but constants, None, and integers that are 1."""
    given = []
    for parameter, value in zip(kernel.params, arguments, strict=False):
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            continue
        if isinstance(value, float):
            given.append(struct.unpack("I", struct.pack("f", value))[0])
        elif isinstance(value, TensorDescriptor):
            given += [value.base.data_ptr(), *value.shape, *value.strides]
        elif isinstance(value, int):
            given.append(value % 2 ** (32 if -(2**31) <= value < 2**31 else 64))
        else:
            given.append(value.data_ptr())
    return given


def odd():
    """Arguments that no other case has.

    A dropout threshold of 64 bits, neither residual nor bias, rows that are not aligned, float16 and float32.
    """
    from tests.kernels.support import backward, forward

    x, w = torch.zeros(40, 71, dtype=torch.float16)[:, 1:68], torch.zeros(67)
    seed = torch.zeros((), dtype=torch.int64)
    y, summed, mean, rstd = forward("layernorm_residual", "triton", x, None, w, None, seed, 1e-5, 0.6)
    saved = summed, w, mean, rstd, seed, 1e-5, 0.6
    backward("layernorm_residual", "triton", y, None, *saved, x.dtype, (True, False, True, False))


def ones():
    """All sizes are 1, which Triton makes constants."""
    from tests.kernels.support import backward, forward

    q, starts, every = torch.zeros(1, 1, 1, 1), torch.tensor([0, 1], dtype=torch.int32), (True,) * 3
    settings = 1.0, 0.0, -(2**62), 0, 0.0, True
    inputs = q, q, q, None, None, None, None, None
    out, lse = forward("attention", "triton", *inputs, *settings, False)
    backward("attention", "triton", out, lse, *inputs, out, lse, *settings, (*every, False))
    inputs = q[0], q[0], q[0], None, None, starts, starts, None
    out, lse = forward("attention", "triton", *inputs, *settings, False)
    backward("attention", "triton", out, None, *inputs, out, lse, *settings, (*every, False))
    x, w = torch.zeros(1, 1), torch.ones(1)
    y, summed, mean, rstd = forward("layernorm_residual", "triton", x, x, w, w, None, 1e-5, 0.0)
    backward("layernorm_residual", "triton", y, y, summed, w, mean, rstd, None, 1e-5, 0.0, x.dtype, (True,) * 4)
    y, summed, rstd = forward("rms_norm_residual", "triton", x, x, w, None, 1e-6, 0.0, False)
    saved = summed, w, rstd, None, 1e-6, 0.0, False, x.dtype
    backward("rms_norm_residual", "triton", y, y, *saved, (True,) * 3)
    y, hidden, activated = forward("gelu_mlp", "triton", x, x, w, x, None, "none", "linear", 1)
    saved = x, x, w, x, None, hidden, activated
    backward("gelu_mlp", "triton", y, *saved, "none", "linear", False, (True,) * 5)
    inputs = x, x, x, x, w, w, None
    y, *saved = forward("glu_mlp", "triton", *inputs, "silu", 1)
    backward("glu_mlp", "triton", y, *inputs, *saved, "silu", False, (True,) * 7)
    target = torch.zeros(1, dtype=torch.int64)
    forward("linear_cross_entropy", "triton", x, x, w, target, w, -100, 0.1, 1.0, 30.0, False, every)
    inputs = x, x, w, target
    _, *saved = forward("linear_log_prob", "triton", *inputs, -100, 0.7, 30.0)
    backward("linear_log_prob", "triton", w, w, *inputs, *saved, -100, 0.7, 30.0, False, every)


def cases():
    """(title, GPU whose tiles are used, call)."""
    from tests.kernels import ahead_of_time

    calls = dict(ahead_of_time.cases(False))
    for title, card in CASES.items():
        yield title, card, calls[title]
    yield "layernorm_residual float16 odd", "sm_90", odd
    yield "float32 ones", "sm_90", ones


def main():
    out, folder = map(Path, sys.argv[1:])
    drive(folder)
    import fastlm.backends.triton  # noqa: F401 (finds fastlm.kernels in a checkout)
    from fastlm.kernels import launch
    from tests.kernels.support import kernel_modules, set_architecture

    made = []

    def each_way(kernel, programs, arguments, constants, warps, stages, device, debug=False):
        global STREAM
        begin, counts = len(driven), [len(through_triton)]
        others = tuple(map(another, arguments))
        for values, grid in ((others, programs + 1), (arguments, programs)):
            STREAM += 16
            to_launch(kernel, grid, values, constants, warps, stages, device, debug)
            counts.append(len(through_triton))
        to_launch(kernel, programs, arguments, constants, warps, stages, device, debug)
        counts.append(len(through_triton))
        options = {"debug": True, "sanitize_overflow": False} if debug else {}
        binary = kernel[(programs,)](
            *arguments, *constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **options
        )
        key = (id(kernel), device, warps, stages, constants, *map(launch.kind, arguments))
        first, past, again, own = driven[begin:]
        assert (first["stream"], first["grid"]) == (STREAM - 16, [programs + 1, 1, 1])
        made.append(
            {
                "case": title,
                "kernel": kernel.__name__,
                "grid": [programs, 1, 1],
                "block": [32 * warps, 1, 1],
                "shared": binary.metadata.shared,
                "stream": STREAM,
                "through_triton": [after - before for before, after in itertools.pairwise(counts)],
                "same_binary": launch.compiled[key] is binary,
                "parameters": {"first": parameters_of(kernel, others), "past": parameters_of(kernel, arguments)},
                "driven": {"first": first, "past": past, "again": again, "own": own},
            }
        )

    to_launch = launch.launch
    for module in kernel_modules():
        module.launch = each_way
    for title, card, call in cases():  # noqa: B007
        set_architecture(setattr, card)
        call()
    repeated = repeated_calls()
    out.write_text(json.dumps({"launches": made, "repeated": repeated, "moved": moved_calls(folder)}))


def repeated_calls():
    """Calls that are made twice, the second time by a plan: what the driver received, and the addresses of results."""
    from fastlm.kernels import launch
    from tests.kernels import ahead_of_time
    from tests.kernels.support import kernel_modules, set_architecture

    made, unplanned = [], []

    def counted(*launched, **options):
        unplanned.append(launched[0].__name__)
        launch.launch(*launched, **options)

    def twice(function):
        def both(operator, backend, *arguments):
            runs, kept = [], []
            for _ in range(2):
                begin, counts = len(driven), len(unplanned)
                results = function(operator, backend, *arguments)
                kept.append(results)  # so that the next are elsewhere
                runs.append(
                    {
                        "driven": driven[begin:],
                        "unplanned": unplanned[counts:],
                        "results": [None if result is None else result.data_ptr() for result in results],
                    }
                )
            made.append({"case": title, "operator": operator, "runs": runs})
            return results

        return both

    for module in kernel_modules():
        module.launch = counted
    ahead_of_time.forward, ahead_of_time.backward = twice(ahead_of_time.forward), twice(ahead_of_time.backward)
    calls = dict(ahead_of_time.cases(False))
    for title, card in CASES.items():
        if title.split()[0] in ("attention", "layernorm_residual", "rms_norm_residual", "rotary"):
            set_architecture(setattr, card)
            calls[title]()
    return made


def moved_calls(folder):
    """attention by bulk copies on two sets of inputs in turn: what the driver received and encoded."""
    from tests.kernels.support import forward, set_architecture

    set_architecture(setattr, "sm_90")
    encoded, made = ctypes.c_int.in_dll(ctypes.CDLL(str(folder / "libcuda.so.1")), "encoded"), []
    inputs = [[torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16) for _ in range(3)] for _ in range(2)]
    for which in (0, 0, 1, 0, 1):
        begin, before = len(driven), encoded.value
        forward("attention", "triton", *inputs[which], *[None] * 5, 0.125, 0.0, -(2**62), 0, 0.0, False, False)
        copied = [x.data_ptr() for x in inputs[which][1:]]
        made.append({"copied": copied, "driven": driven[begin:], "encoded": encoded.value - before})
    return made


if __name__ == "__main__":
    main()
