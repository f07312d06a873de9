"""What the tests of all operators share."""

import dataclasses
import importlib
import importlib.util
import os

import pytest
import torch

# Relative to the largest value. 16 bits: half a unit in the last place, the rounding of the result itself. float32: four units, what a few sums of
# a handful of terms may differ by when they are added in another order; on so few terms PyTorch's own error is 0 as often as not.
FLOOR = {torch.float32: 2**-21, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-48}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The backends that this run must cover. A named backend that is missing fails; it is not skipped. `cuda` is covered where it is named: by `make gpu`, and by CI
# in the emulator.
WITH_TRITON = (
    ",triton" if importlib.util.find_spec("triton") else ""
)  # on a GPU, or under its interpreter (see conftest.py)
BACKENDS = os.environ.get("FASTLM_TEST_BACKENDS", f"reference,torch,cpu{WITH_TRITON}").split(",")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("FASTLM_CUDA_EMULATION") == "1"
# Whose kernels run on the CPU in a way that is made for checking: a hundred times slower than anything else.
SLOW = {name for name, so in (("triton", INTERPRETED), ("cuda", EMULATED)) if so}


def on_every_backend(test):
    return pytest.mark.parametrize("backend", BACKENDS)(test)


def on_backends(*names):
    """For what not every backend does: those of the named ones that this run covers."""
    return pytest.mark.parametrize("backend", [name for name in BACKENDS if name in names])


def on_every_backend_that_raises(test):
    """Wrong values are an exception, but where the kernels of a GPU look at them: there they are a device assert, after which the process is of no use."""
    names = [
        name for name in BACKENDS if os.environ.get("FASTLM_TEST_DEVICE") != "cuda" or name not in ("triton", "cuda")
    ]
    return pytest.mark.parametrize("backend", names)(test)


def floats(*shape, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(
        torch.get_default_device()
    )  # the same numbers everywhere


def targets(vocab, *shape, ignored=()):
    generator = torch.Generator("cpu").manual_seed(vocab)
    target = torch.randint(vocab, shape, generator=generator, device="cpu").to(torch.get_default_device())
    target.view(-1)[list(ignored)] = -100
    return target


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def leaf(x, dtype):
    """An input in dtype, asking for its gradient; targets and bool masks as they are."""
    return x.detach().to(dtype).clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x


def outputs_and_gradients(function, inputs, dtype, upstream_dtype=None):
    """Every result of function(*inputs) and the gradient of every floating-point input, all in dtype; None for a gradient that does not exist."""
    leaves = [leaf(x, dtype) for x in inputs]
    results = as_tuple(function(*leaves))
    upstreams = [floats(*y.shape).to(upstream_dtype or dtype).to(y.dtype) for y in results]
    asked = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    return (*(y.detach() for y in results), *torch.autograd.grad(results, asked, upstreams, allow_unused=True))


def error(a, truth):
    """Largest difference, relative to the largest true value (absolute where the truth is nothing but float64's own rounding). Infinities must agree."""
    if not truth.numel():
        return 0.0
    a = a.double()
    largest = torch.where(truth.isfinite(), truth, 0).abs().max().item()
    return torch.where(a == truth, 0, a - truth).abs().max().item() / (largest if largest > 1e-12 else 1.0)


def assert_within_twice_torch(ours, torch_own, inputs, dtype):
    """Outputs and gradients: our error against float64 is at most twice the error of PyTorch's own operator in the same dtype."""
    rounded = [
        x.to(dtype).double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs
    ]  # the truth starts from the same rounded inputs
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
    """fastlm.ops.{operator}.{backend}."""
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

        return dataclasses.replace(implementation, forward=forward)

    monkeypatch.setattr(found, "implementation", watched)
    return calls


def small_chunks(monkeypatch, backend, size):
    """Cross-entropy on chunks of logits of so many bytes, so that a small test has several."""
    if backend != "reference":
        monkeypatch.setattr(implementation_module("linear_cross_entropy", backend), "LOGITS_BYTES", size)
