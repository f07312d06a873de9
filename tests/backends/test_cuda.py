"""The backend cuda: where it is available and which GPUs it supports, without a GPU.

tests/kernels/test_cuda_build.py tests the compiled module.
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

CUDA = torch.device("cuda", 0)
OPERATORS = registry.operators()


@pytest.fixture
def card(monkeypatch):
    """A GPU and a module for it, as far as backend selection asks for them."""
    found = types.SimpleNamespace(capability=(9, 0), driver=13010)
    kernels = types.SimpleNamespace(archs="80,90", runtime_version=lambda: 13000, driver_version=lambda: found.driver)
    monkeypatch.setattr(backend, "device_type", "cuda")
    monkeypatch.setattr(backend, "kernels", kernels)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    for cached in (backend.gpu_refusals, backend.unavailable):
        cached.cache_clear()
    yield found
    for cached in (backend.gpu_refusals, backend.unavailable):
        cached.cache_clear()


def refusals(name="layernorm_residual", device=CUDA, dtype=torch.bfloat16, **sizes):
    operator = OPERATORS[name]
    ones = operator.sizes(*[1] * len(operator.size_names))
    return operator.refusals("cuda", device, dtype, ones._replace(**sizes))


def test_what_it_supports(card):
    for name in OPERATORS:
        assert refusals(name) == (["does not implement adamw"] if name == "adamw" else [])
    assert refusals(device=torch.device("cpu")) == ["supports CUDA tensors, not cpu (.to('cuda') moves them)"]
    assert refusals(dtype=torch.float64) == [
        "computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64"
    ]
    for packed, what in ((False, "queries and keys"), (True, "tokens")):
        for length in ("query_len", "key_len"):
            reasons = refusals("attention", packed=packed, **{length: 2**31})
            assert reasons == [f"counts up to {2**30} {what}, not {2**31}"]
        assert not refusals("attention", packed=packed, head_dim=256)
        assert refusals("attention", packed=packed, head_dim=257) == ["holds heads of head_dim up to 256, not 257"]


def test_a_launch_restores_pytorchs_current_device(card, monkeypatch):
    """The stream and the driver's current device are the tensor's. Nothing is set if it is PyTorch's device already."""
    device, moves = [0], []

    @contextlib.contextmanager
    def move(to):
        moves.append(to)
        before, device[0] = device[0], to.index
        yield
        device[0] = before

    monkeypatch.setattr(torch.cuda, "device", move)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: types.SimpleNamespace(cuda_stream=70 + of.index))
    launches = []
    for index in (1, 0):
        x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        with gpu.on_device(x):
            launches.append((device[0], *backend.device_and_stream(x)))
    assert launches == [(1, 1, 71), (0, 0, 70)]
    assert moves == [torch.device("cuda", 1)] and device == [0]


TOO_OLD = "needs an architecture of sm_80 or later, and Card is sm_75 (auto takes another backend)"
NOT_COMPILED_FOR = (
    "is compiled for sm_90, sm_100 and later, and Card is sm_86 "
    "(FASTLM_BUILD_CUDA=1 FASTLM_CUDA_ARCHS=86 pip install builds it for that)"
)


@pytest.mark.parametrize(
    "archs, capability, reason",
    [
        ("80,90", (7, 5), TOO_OLD),
        ("90,100", (7, 5), TOO_OLD),
        ("90,100", (8, 6), NOT_COMPILED_FOR),
        *(("80,90", capability, "") for capability in ((8, 0), (8, 9), (10, 0), (12, 1))),
        ("90,100", (9, 0), ""),
    ],
)
def test_a_gpu_needs_code_or_ptx(card, archs, capability, reason):
    card.capability, backend.kernels.archs = capability, archs
    assert refusals() == ([reason] if reason else [])
    if reason:
        linear = OPERATORS["linear"]
        sizes = linear.sizes(*[1] * len(linear.size_names))
        with pytest.raises(fastlm.Unsupported) as raised:
            selection.decide(linear, CUDA, torch.float16, "cuda", sizes)
        cpu, triton = (", ".join(linear.refusals(name, CUDA, torch.float16, sizes)) for name in ("cpu", "triton"))
        others = "torch is available, but not selected; reference is available, but not selected"
        assert str(raised.value) == (
            f"linear on cuda:0 in torch.float16 with backend='cuda': cpu {cpu}; "
            f"triton {triton or 'is available, but not selected'}; cuda {reason}; {others}"
        )


@pytest.mark.parametrize(
    "driver, reason",
    [
        (0, ["finds no NVIDIA driver"]),
        (12090, ["needs a driver for CUDA 13.0 or later, and this one supports up to 12.9"]),
        (13000, []),
        (14000, []),
    ],
)
def test_the_driver_must_support_the_runtimes_major_version(card, driver, reason):
    card.driver = driver
    assert backend.unavailable() == refusals() == reason


def test_rocm_and_no_gpu(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable() == ["finds no GPU (torch.cuda.is_available() is false)"]
    backend.unavailable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend.unavailable() == ["supports NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]


def test_the_summary_of_the_module(card, monkeypatch):
    monkeypatch.setattr(isa, "report", lambda: {"cuda": {"version": "13.1", "archs": "80,90", "reason": ""}})
    assert backend.summary() == (
        "CUDA 13.1, code for sm_80, sm_90 and PTX for later ones; needs a driver for CUDA 13 (580 or later)"
    )


def test_without_a_module_the_reason_is_reported():
    code = "import sys; sys.modules['fastlm._cuda'] = None; import fastlm; print(fastlm.info().backends['cuda'][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("is not compiled here: "), done.stderr
