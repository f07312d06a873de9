"""What the tests of all operators share."""

import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import sys
import traceback

import pytest
import torch

# Relative to the largest value. 16 bits: half a unit in the last place, the rounding of the result itself. float32:
# four units, by which short sums may differ when added in another order; PyTorch's own error of such sums is often 0.
FLOOR = {torch.float32: 2**-21, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-48}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The backends under test. One that is named and not available fails; it is not skipped. `make gpu` names `cuda`, and so
# does CI for the emulator. Triton runs on a GPU or in its interpreter (see conftest.py).
WITH_TRITON = ",triton" if importlib.util.find_spec("triton") else ""
BACKENDS = os.environ.get("FASTLM_TEST_BACKENDS", f"reference,torch,cpu{WITH_TRITON}").split(",")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("FASTLM_CUDA_EMULATION") == "1"
# Backends whose kernels are interpreted or emulated on the CPU: a hundred times slower than the others.
SLOW = {name for name, slow in (("triton", INTERPRETED), ("cuda", EMULATED)) if slow}


def on_every_backend(test):
    return pytest.mark.parametrize("backend", BACKENDS)(test)


def on_backends(*names):
    """Parametrise a test by those of the named backends that are under test."""
    return pytest.mark.parametrize("backend", [name for name in BACKENDS if name in names])


def on_every_backend_that_raises(test):
    """Parametrise a test by the backends that raise an exception for wrong values.

    GPU kernels make a device assert instead, after which the process cannot continue.
    """
    on_gpu = os.environ.get("FASTLM_TEST_DEVICE") == "cuda"
    names = [name for name in BACKENDS if not on_gpu or name not in ("triton", "cuda")]
    return pytest.mark.parametrize("backend", names)(test)


def check_drawn(path):
    """The PNG can be read and more than a frame is on it."""
    from PIL import Image

    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    drawn = sum(count for count, color in colors if color != (255, 255, 255))
    assert len(colors) > 2 and drawn > 0.01 * sum(count for count, _ in colors)


def run_in_new_process(function, *arguments):
    """Calls a function of a module in a process of its own.

    For process groups: gloo's destructor holds the GIL while it waits for a thread that may itself need the GIL to
    finish, so a process that has one ends without destroying it.
    """
    process = multiprocessing.get_context("spawn").Process(target=call_and_exit, args=(function, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0


def call_and_exit(function, arguments):
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def floats(*shape, dtype=torch.float32):
    """Normal numbers on the default device, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


def targets(vocab, *shape, ignored=()):
    generator = torch.Generator("cpu").manual_seed(vocab)
    target = torch.randint(vocab, shape, generator=generator, device="cpu").to(torch.get_default_device())
    target.view(-1)[list(ignored)] = -100
    return target


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def leaf(x, dtype):
    """A floating-point input in dtype that requires a gradient; targets and bool masks unchanged."""
    return x.detach().to(dtype).clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x


def recorded_calls(monkeypatch, owner, name):
    """The positional arguments of each call of a function from now on, which is called as before."""
    calls, own = [], getattr(owner, name)

    def record(*arguments):
        calls.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(owner, name, record)
    return calls


def shrunk(*shape):
    """A tensor whose storage was resized to 16 bytes."""
    x = torch.zeros(shape)
    x.untyped_storage().resize_(16)
    return x


def outputs_and_gradients(function, inputs, dtype, upstream_dtype=None, upstream_factor=1.0):
    """The results of function(*inputs) and the gradients of its floating-point inputs, all computed in dtype.

    A gradient that does not exist is None.
    """
    leaves = [leaf(x, dtype) for x in inputs]
    results = as_tuple(function(*leaves))
    upstreams = [(floats(*y.shape) * upstream_factor).to(upstream_dtype or dtype).to(y.dtype) for y in results]
    wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    return (*(y.detach() for y in results), *torch.autograd.grad(results, wanted, upstreams, allow_unused=True))


def error(a, truth):
    """The largest difference relative to the largest true value. Infinities must agree.

    It is absolute where the true values are only rounding errors of float64.
    """
    if not truth.numel():
        return 0.0
    a = a.double()
    largest = torch.where(truth.isfinite(), truth, 0).abs().max().item()
    return torch.where(a == truth, 0, a - truth).abs().max().item() / (largest if largest > 1e-12 else 1.0)


def assert_within_twice_torch(ours, torch_own, inputs, dtype):
    """Check that results and gradients have at most twice the error of PyTorch's operator in the same dtype.

    The error is the difference from float64 results of the same rounded inputs.
    """
    rounded = [x.to(dtype).double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    truths = outputs_and_gradients(torch_own, rounded, torch.float64, dtype)
    theirs = outputs_and_gradients(torch_own, inputs, dtype)
    for i, (a, b, truth) in enumerate(zip(outputs_and_gradients(ours, inputs, dtype), theirs, truths, strict=True)):
        assert a.shape == truth.shape, f"result {i}"
        assert error(a, truth) <= 2 * error(b, truth) + FLOOR[dtype], (
            f"result {i}: {error(a, truth):.2e} against torch's {error(b, truth):.2e}"
        )


def assert_same_bits(a, b):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), f"result {i}"


def implementation_module(operator, backend):
    """The module fastlm.ops.{operator}.{backend}."""
    return importlib.import_module(f"fastlm.ops.{operator}.{backend}")


def count_forwards(monkeypatch, operator):
    """A list to which every forward call of an operator appends its backend's name."""
    from fastlm.backends import registry, selection

    calls = []
    monkeypatch.setattr(selection, "_selected", {})
    found = registry.operators()[operator]
    original = found.implementation

    def watched(name):
        implementation = original(name)

        def forward(call):
            calls.append(name)
            return implementation.forward(call)

        return dataclasses.replace(implementation, forward=forward, composite=None)

    monkeypatch.setattr(found, "implementation", watched)
    return calls


def small_chunks(monkeypatch, backend, size):
    """Set the bytes of a chunk of logits of cross-entropy, so that a small test has several chunks."""
    if backend != "reference":
        set_logits_bytes(monkeypatch, implementation_module("linear_cross_entropy", backend), size)


def set_logits_bytes(monkeypatch, module, size):
    """Of a chunk, in the module of an implementation; on a GPU it follows from the memory of the card."""
    if hasattr(module, "LOGITS_BYTES"):
        monkeypatch.setattr(module, "LOGITS_BYTES", size)
    else:
        monkeypatch.setattr(module, "logits_bytes", lambda index: size)
