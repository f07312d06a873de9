"""Which calls the CUDA kernels support and the reasons for refusing others.

tests/kernels/test_cuda_build.py tests the compiled module itself.
"""

import contextlib
import subprocess
import sys
import types

import pytest
import torch

import fastlm
from fastlm.backends import cuda as backend
from fastlm.backends import gpu, isa, registry, selection
from fastlm.ops.linear.spec import Sizes as LinearSizes

CUDA = torch.device("cuda", 0)
OPERATORS = registry.operators()


@pytest.fixture
def card(monkeypatch):
    """A GPU and a module compiled for it as far as backend selection inspects them."""
    found = types.SimpleNamespace(capability=(9, 0), driver=13010)
    kernels = types.SimpleNamespace(archs="80,90", runtime_version=lambda: 13000, driver_version=lambda: found.driver)
    monkeypatch.setattr(backend, "device_type", "cuda")
    monkeypatch.setattr(backend, "kernels", kernels)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    clear_caches()
    yield found
    clear_caches()


def clear_caches():
    backend.gpu_refusals.cache_clear()
    backend.unavailable.cache_clear()


def refusals(name="layernorm_residual", device=CUDA, dtype=torch.bfloat16, **changed):
    """Why the backend refuses a call of an operator whose sizes are 1 except for the changed ones."""
    operator = OPERATORS[name]
    sizes = operator.sizes(*[1] * len(operator.size_names))._replace(**changed)
    return operator.refusals("cuda", device, dtype, sizes)


def test_supported_calls(card):
    assert not any(refusals(name) for name in OPERATORS if name != "adamw")
    assert refusals("adamw") == ["does not implement adamw"]
    cpu = torch.device("cpu")
    assert refusals(device=cpu) == ["supports CUDA tensors, not cpu (.to('cuda') moves them)"]
    dtypes = "torch.float32, torch.bfloat16, torch.float16"
    assert refusals(dtype=torch.float64) == [f"computes in {dtypes}, not torch.float64"]
    for length in ("query_len", "key_len"):
        for packed, unit in ((False, "queries and keys"), (True, "tokens")):
            reasons = refusals("attention", packed=packed, **{length: 2**31})
            assert reasons == [f"counts up to {2**30} {unit}, not {2**31}"]
    for packed in (False, True):
        assert not refusals("attention", packed=packed, head_dim=256)
        reasons = refusals("attention", packed=packed, head_dim=257)
        assert reasons == ["holds heads of head_dim up to 256, not 257"]


def test_a_launch_restores_the_current_device(card, monkeypatch):
    """A kernel launches on its tensor's device and stream. PyTorch's current device is set only where it differs."""
    device, moves = [0], []

    @contextlib.contextmanager
    def moved(to):
        moves.append(to)
        before, device[0] = device[0], to.index
        yield
        device[0] = before

    monkeypatch.setattr(torch.cuda, "device", moved)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: types.SimpleNamespace(cuda_stream=70 + of.index))
    seen = []
    for index in (1, 0):
        x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        with gpu.on_device(x):
            seen.append((device[0], *backend.device_and_stream(x)))
    assert seen == [(1, 1, 71), (0, 0, 70)]
    assert moves == [torch.device("cuda", 1)] and device == [0]


TOO_OLD = "needs an architecture of sm_80 or later, and Card is sm_75 (auto takes another backend)"
NOT_COMPILED = (
    "is compiled for sm_90, sm_100 and later, and Card is sm_86 "
    "(FASTLM_BUILD_CUDA=1 FASTLM_CUDA_ARCHS=86 pip install builds it for that)"
)


@pytest.mark.parametrize(
    "archs, capability, reason",
    [
        ("80,90", (7, 5), TOO_OLD),
        ("90,100", (7, 5), TOO_OLD),
        ("90,100", (8, 6), NOT_COMPILED),
        *(("80,90", capability, "") for capability in ((8, 0), (8, 9), (10, 0), (12, 1))),
        ("90,100", (9, 0), ""),
    ],
)
def test_a_gpu_needs_code_or_ptx(card, archs, capability, reason):
    """One line says which GPU has none, and what to do."""
    card.capability, backend.kernels.archs = capability, archs
    assert refusals() == ([reason] if reason else [])
    if reason:
        linear, sizes, forced = OPERATORS["linear"], LinearSizes(1, 1, 1, True), "could, but another was forced"
        with pytest.raises(fastlm.Unsupported) as raised:
            selection.decide(linear, CUDA, torch.float16, "cuda", sizes)
        cpu, triton = (", ".join(linear.refusals(name, CUDA, torch.float16, sizes)) for name in ("cpu", "triton"))
        assert str(raised.value) == (
            f"linear on cuda:0 in torch.float16 with backend='cuda': cpu {cpu}; triton {triton or forced}; "
            f"cuda {reason}; torch {forced}; reference {forced}"
        )


@pytest.mark.parametrize(
    "driver, reasons",
    [
        (0, ["finds no NVIDIA driver"]),
        (12090, ["needs a driver for CUDA 13.0 or later, and this one supports up to 12.9"]),
        (13000, []),
        (14000, []),
    ],
)
def test_the_driver_must_support_the_runtimes_major_version(card, driver, reasons):
    card.driver = driver
    assert registry.unavailable("cuda") == refusals() == reasons


def test_rocm_and_no_gpu_are_reported(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert registry.unavailable("cuda") == ["finds no GPU (torch.cuda.is_available() is false)"]
    clear_caches()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert registry.unavailable("cuda") == ["supports NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]


def test_the_summary_of_the_module(card, monkeypatch):
    monkeypatch.setattr(isa, "report", lambda: {"cuda": {"version": "13.1", "archs": "80,90", "reason": ""}})
    expected = "CUDA 13.1, code for sm_80, sm_90 and PTX for later ones; needs a driver for CUDA 13 (580 or later)"
    assert backend.summary() == fastlm.info().cuda == expected


def test_a_module_that_is_not_compiled_says_why():
    code = "import sys; sys.modules['fastlm._cuda'] = None; import fastlm; print(fastlm.info().backends['cuda'][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("is not compiled here: "), done.stderr
