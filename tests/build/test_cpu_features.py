"""The module's report of this CPU against that of the operating system."""

import importlib
from pathlib import Path

import pytest

import fastlm

CPUINFO, CACHES = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")

if fastlm.info().build:
    pytest.skip(f"nothing is compiled here: {fastlm.info().build}", allow_module_level=True)

features = importlib.import_module("fastlm._cpu_features")


@pytest.fixture
def cpuinfo():
    if not CPUINFO.exists() or "vendor_id" not in CPUINFO.read_text():
        pytest.skip("no /proc/cpuinfo of an x86 here")
    lines = (line.split(":", 1) for line in CPUINFO.read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, value in lines}


def test_instruction_sets_are_those_that_linux_reports(cpuinfo):
    flags = set(cpuinfo["flags"].split())
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    expected, so_far = ["baseline"], set()
    for isa, own in needed.items():
        so_far |= own
        if so_far <= flags:
            expected.insert(0, isa)
    assert features.isas() == expected
    assert features.has_amx() == ({"amx_tile", "amx_bf16"} <= flags)


def test_the_cpu_is_the_one_that_linux_names(cpuinfo):
    assert features.vendor() == cpuinfo["vendor_id"]
    assert features.brand() == cpuinfo["model name"]
    assert (features.family(), features.model()) == (int(cpuinfo["cpu family"]), int(cpuinfo["model"]))


def test_microarchitecture_fits_the_instruction_sets():
    """With a wrong row of the table, backends would be selected by another CPU's measurements."""
    name, isas = features.microarchitecture(), features.isas()
    if name in ("zen4", "zen5", "cooperlake", "sapphirerapids", "emeraldrapids", "graniterapids"):
        assert isas[0] in (
            "amx",
            "avx512_bf16",
            "avx2",
            "baseline",
        )  # the last two: a virtual machine that hides AVX-512, or AVX
    elif name in ("zen1", "zen2", "zen3", "haswell", "broadwell", "skylake", "alderlake", "raptorlake", "meteorlake"):
        assert isas[0] in ("avx2", "baseline")
    else:
        assert isinstance(name, str)


def test_cache_sizes_are_those_that_linux_reports():
    if not (CACHES / "index0").exists():
        pytest.skip("Linux does not list this machine's caches")
    known = {}
    for cache in CACHES.glob("index*"):
        if (cache / "type").read_text().strip() != "Instruction":
            size = (cache / "size").read_text().strip()
            known[int((cache / "level").read_text())] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    assert features.caches() == tuple(known.get(level, 0) for level in (1, 2, 3))
