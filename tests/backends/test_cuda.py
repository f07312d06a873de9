"""Who may use the CUDA C++ kernels, and what is said where they cannot serve. (tests/kernels/test_cuda_build.py has the real module.)"""

import contextlib
import subprocess
import sys
import types

import pytest
import torch

import fastlm
from fastlm.backends import choice, isa
from fastlm.backends import cuda as backend

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A GPU and a module for it, as far as the questions go that are asked before a launch."""
    found = types.SimpleNamespace(capability=(9, 0), driver=13010)
    launchers = {
        f"{name}_forward": None for name in ("attention", "layernorm_residual", "gelu_mlp", "linear_cross_entropy")
    }
    kernels = types.SimpleNamespace(
        archs="80,90", runtime_version=lambda: 13000, driver_version=lambda: found.driver, **launchers
    )
    monkeypatch.setattr(backend, "device_type", "cuda")
    monkeypatch.setattr(backend, "kernels", kernels)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    for cached in (backend.unfit, backend.unavailable):
        cached.cache_clear()
    yield found
    for cached in (backend.unfit, backend.unavailable):
        cached.cache_clear()


def refused(operator="layernorm_residual", device=CUDA, dtype=torch.bfloat16, **features):
    return backend.refuses(operator, device, dtype, **dict.fromkeys(choice.FEATURES[operator], 1) | features)


def test_what_it_serves(card):
    assert not any(refused(operator) for operator in choice.FEATURES if operator != "adamw")
    assert refused("adamw") == ["has no adamw"]
    assert refused(device=torch.device("cpu")) == ["serves CUDA tensors, not cpu (.to('cuda') moves them)"]
    assert refused(dtype=torch.float64) == [
        "computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64"
    ]
    assert refused("attention", key_len=2**31) == [f"counts up to {2**30} queries and keys, not {2**31}"]
    for tokens in ("query_tokens", "key_tokens"):
        assert refused("attention_varlen", **{tokens: 2**31}) == [f"counts up to {2**30} tokens, not {2**31}"]
    for operator in ("attention", "attention_varlen"):
        assert not refused(operator, head_dim=256)
        assert refused(operator, head_dim=257) == ["holds heads of head_dim up to 256, not 257"]


def test_a_launch_gives_pytorchs_device_back(card, monkeypatch):
    """The kernel's stream and the driver's current device are the tensor's, also where PyTorch's is another; nothing is set where it is the same."""
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
        with backend.on(x):
            seen.append((device[0], *backend.queue(x)))
    assert seen == [(1, 1, 71), (0, 0, 70)]
    assert moves == [torch.device("cuda", 1)] and device == [0]


TOO_OLD = "needs an architecture of sm_80 or later, and Card is sm_75 (auto takes another backend)"
NOT_BUILT_FOR = "is compiled for sm_90, sm_100 and what is later, and Card is sm_86 (FASTLM_BUILD_CUDA=1 FASTLM_CUDA_ARCHS=86 pip install builds it for that)"


@pytest.mark.parametrize(
    "archs, capability, reason",
    [
        ("80,90", (7, 5), TOO_OLD),
        ("90,100", (7, 5), TOO_OLD),
        ("90,100", (8, 6), NOT_BUILT_FOR),
        *(("80,90", capability, "") for capability in ((8, 0), (8, 9), (10, 0), (12, 1))),
        ("90,100", (9, 0), ""),
    ],
)
def test_a_gpu_needs_code_or_ptx(card, archs, capability, reason):
    """Where there is none, one line says which card it is and what helps."""
    card.capability, backend.kernels.archs = capability, archs
    assert refused() == ([reason] if reason else [])
    if reason:
        with pytest.raises(fastlm.Unsupported) as raised:
            choice.decide("linear", CUDA, torch.float16, "cuda", dict.fromkeys(choice.FEATURES["linear"], 1))
        cpu, triton = (
            ", ".join(choice.refusals(name, "linear", CUDA, torch.float16, {})) for name in ("cpu", "triton")
        )
        others = "torch could, but another was forced; reference could, but another was forced"
        assert str(raised.value) == (
            f"linear on cuda:0 in torch.float16 with backend='cuda': cpu {cpu}; triton {triton or 'could, but another was forced'}; cuda {reason}; {others}"
        )


@pytest.mark.parametrize(
    "driver, reason",
    [
        (0, ["finds no NVIDIA driver"]),
        (12090, ["needs a driver for CUDA 13.0 or later, and this one serves up to 12.9"]),
        (13000, []),
        (14000, []),
    ],
)
def test_the_driver_must_know_the_runtimes_major_version(card, driver, reason):
    card.driver = driver
    assert backend.unavailable() == refused() == reason


def test_rocm_and_no_gpu(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable() == ["finds no GPU (torch.cuda.is_available() is false)"]
    backend.unavailable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend.unavailable() == ["serves NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]


def test_the_account_of_the_module(card, monkeypatch):
    monkeypatch.setattr(isa, "report", lambda: {"cuda": {"version": "13.1", "archs": "80,90", "reason": ""}})
    assert backend.in_words() == (
        "CUDA 13.1, code for sm_80, sm_90 and PTX for later ones; needs a driver for CUDA 13 (580 or later); "
        "auto takes Triton first but where measurements of the GPU say otherwise"
    )


def test_a_module_that_is_not_built_says_why():
    code = "import sys; sys.modules['fastlm._cuda'] = None; import fastlm; print(fastlm.info().backends['cuda'][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("is not compiled here: "), done.stderr
