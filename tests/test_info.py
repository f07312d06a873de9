import dataclasses

import pytest
import torch

import fastlm
from fastlm.backends import isa, selection


def test_the_fields():
    info = fastlm.info()
    assert [field.name for field in dataclasses.fields(info)] == [
        "version",
        "torch_version",
        "cpu",
        "isa",
        "isas",
        "bfloat16",
        "forced",
        "table",
        "gpus",
        "threads",
        "openmp",
        "backends",
        "operators",
        "allocator",
        "build",
        "cuda",
        "fallbacks",
        "copies",
    ]
    assert info.version == fastlm.__version__ and info.torch_version == torch.__version__
    assert list(info.backends) == ["cpu", "triton", "cuda", "torch", "reference"]
    assert info.backends["torch"] == info.backends["reference"] == []
    assert not info.backends["cuda"] or len(info.backends["cuda"]) == 1
    assert (
        not info.backends["triton"]
        or "needs Triton" in info.backends["triton"][0]
        or "finds no GPU" in info.backends["triton"][0]
    )
    assert (info.isa is None) == bool(info.build) == bool(info.backends["cpu"])
    assert info.isa is None or info.isa in info.isas


def test_threads_are_those_of_this_moment():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert fastlm.info().threads == 1
    finally:
        torch.set_num_threads(threads)


def test_it_is_a_copy():
    fastlm.info().fallbacks["nothing"] = 5
    assert "nothing" not in fastlm.info().fallbacks


EXAMPLE = {
    "version": "1.0",
    "torch_version": "2.9",
    "cpu": "Some CPU",
    "isa": "avx2",
    "isas": ["avx2", "baseline"],
    "bfloat16": "multiply-adds in float32",
    "forced": [],
    "table": "some rows",
    "gpus": ["Card: some rows", "Other: none"],
    "threads": 4,
    "openmp": True,
    "backends": {"cpu": [], "triton": ["is not part of this build"]},
    "operators": {"linear": ["cpu", "torch"]},
    "allocator": "tuned (so)",
    "build": "",
    "cuda": "not compiled here",
    "fallbacks": {"linear: torch instead of cpu": 3},
    "copies": {},
}


def test_the_report():
    assert str(dataclasses.replace(fastlm.info(), **EXAMPLE)).splitlines() == [
        "fastlm 1.0, PyTorch 2.9",
        "CPU: Some CPU; can run avx2, baseline",
        "compiled module: avx2, 4 threads, bfloat16 by multiply-adds in float32",
        "backend order: some rows",
        "GPU: Card: some rows",
        "GPU: Other: none",
        "CUDA module: not compiled here",
        "allocator: tuned (so)",
        "backends:",
        "  cpu        available",
        "  triton     is not part of this build",
        "operators:",
        "  linear               cpu, torch",
        "fallbacks:",
        "  linear: torch instead of cpu: 3",
        "copies: none",
    ]


@pytest.mark.parametrize(
    "environment, module, line",
    [
        ("torch", "", "backend torch (FASTLM_BACKEND=torch)"),
        (
            "tritn",
            "",
            "FASTLM_BACKEND: expected one of cpu, triton, cuda, torch, reference, got 'tritn'; did you mean 'triton'? "
            "(every call is this error)",
        ),
        (None, "avx2", "compiled module avx2 (FASTLM_ISA=avx2)"),
    ],
)
def test_what_is_forced_is_reported(monkeypatch, environment, module, line):
    """With a forced backend, the order of the others does not matter."""
    monkeypatch.setattr(selection, "from_environment", environment)
    monkeypatch.setattr(isa, "forced", module)
    lines = str(fastlm.info()).splitlines()
    assert f"forced: {line}" in lines
    assert any(line.startswith("backend order: ") for line in lines) == (not environment and isa.kernels is not None)
    with fastlm.use_backend("reference"):
        assert "forced: backend reference (use_backend('reference'))" in str(fastlm.info())


def test_the_report_without_openmp_and_without_a_module():
    info = dataclasses.replace(fastlm.info(), **EXAMPLE | {"openmp": False})
    assert "compiled module: avx2, 1 thread (built without OpenMP)" in str(info)
    info = dataclasses.replace(info, isa=None, build="no C++ compiler found", isas=[])
    assert "compiled module: none (no C++ compiler found)" in str(info)
    assert "can run no module that was built" in str(info)


def test_the_isa_is_that_of_the_module_in_use():
    assert fastlm.info().isa == isa.name and (isa.kernels is None or isa.kernels.__name__ == f"fastlm._cpu_{isa.name}")
