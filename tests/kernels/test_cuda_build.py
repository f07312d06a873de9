"""The CUDA kernels as nvcc compiles them, without a GPU.

They do not spill, use the intended instructions and are compiled for every architecture. Without a GPU the module loads
and reports why it is not available.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from tests.build.test_setup import setup  # noqa: F401, the fixture

ROOT = Path(__file__).parents[2]
MODULE = f"fastlm/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
REQUIRED = os.environ.get("FASTLM_REQUIRE_NVCC") == "1"  # a missing tool is then a failure

MATRIX = ("attention_forward_kernel", "attention_backward_key_kernel", "attention_backward_query_kernel", "gemm_kernel")
ASSERTING = (
    "linear_cross_entropy_row_kernel",
    "linear_cross_entropy_column_kernel",
    "linear_cross_entropy_combine_kernel",
    "linear_log_prob_row_kernel",
    "linear_log_prob_column_kernel",
    *MATRIX[:3],
)
STREAMING = tuple(
    f"{norm}_residual_{which}_kernel" for norm in ("layernorm", "rms_norm") for which in ("forward", "backward")
)

pytestmark = pytest.mark.slow


def missing(what):
    (pytest.fail if REQUIRED else pytest.skip)(what)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the package that setup.py built."""
    out = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(out)]
    environment = {**os.environ, "FASTLM_BUILD_CUDA": "1", "FASTLM_BUILD_ISAS": "baseline"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if "no nvcc found" in done.stdout:
        missing("needs nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-runtime")
    assert done.returncode == 0, done.stdout[-8000:]
    return out


@pytest.fixture(scope="module")
def cuobjdump():
    """A function that runs cuobjdump, which Triton brings."""
    found = shutil.which("cuobjdump")
    try:
        import triton

        beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(beside) if beside.exists() else found
    except ImportError:
        pass
    if not found:
        missing("needs cuobjdump, which Triton brings")

    def run(*options):
        environment = {
            **os.environ,
            "PATH": f"{Path(found).parent}{os.pathsep}{os.environ['PATH']}",
        }  # it calls nvdisasm
        return subprocess.run([found, *options], env=environment, capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture(scope="module")
def instructions(built, cuobjdump):
    """(architecture, kernel's mangled name) → the mnemonics in it, and how often each is there."""
    found, at = defaultdict(Counter), None
    arch = "?"
    for line in cuobjdump("-sass", str(built / MODULE)).splitlines():
        if named := re.match(r"\s*arch = (sm_\d+)", line):
            arch = named[1]
        elif named := re.match(r"\s*Function : (\S+)", line):
            at = found[arch, named[1]]
        elif at is not None and (code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", line)):
            at[code[1]] += 1
    return found


def archs(built):
    return json.loads((built / "fastlm/_build.json").read_text())["cuda"]["archs"].split(",")


def test_the_report(built):
    report = json.loads((built / "fastlm/_build.json").read_text())["cuda"]
    assert report["reason"] == "" and re.fullmatch(r"\d+\.\d+", report["version"])
    if "FASTLM_CUDA_ARCHS" not in os.environ and report["version"] >= "12.8":
        assert report["archs"] == "80,90,100,120"


def test_every_architecture_is_inside_and_ptx_for_later_ones(built, cuobjdump):
    assert set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("-lelf", str(built / MODULE)))) == {
        f"sm_{arch}" for arch in archs(built)
    }
    assert set(re.findall(r"\.(sm_\d+)\.ptx", cuobjdump("-lptx", str(built / MODULE)))) == {f"sm_{archs(built)[0]}"}


def type_of(kernel):
    """The dtype of a kernel: the first template argument in its mangled name."""
    arguments = kernel.partition("kernelI")[2]
    return next((name for name in ("bf16", "fp16") if arguments.startswith(f"NS0_4{name}E")), "fp32")


PRODUCTS = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "fp32": "HMMA.1688.F32.TF32"}


@pytest.mark.parametrize("kernel", MATRIX)
def test_products_run_on_tensor_cores(kernel, built, instructions):
    """Each kernel uses the instruction of its dtype only. The emulator cannot show this."""
    for arch in archs(built):
        those = {
            name: mnemonics for (on, name), mnemonics in instructions.items() if on == f"sm_{arch}" and kernel in name
        }
        assert {type_of(name) for name in those} == set(PRODUCTS)
        for name, mnemonics in those.items():
            assert {code for code in mnemonics if code.startswith("HMMA.")} == {PRODUCTS[type_of(name)]}, (
                f"{name} on sm_{arch}"
            )


@pytest.mark.parametrize("kernel", MATRIX)
def test_operands_are_loaded_by_asynchronous_copies_and_ldmatrix(kernel, built, instructions):
    """Copies have 16 bytes and bypass L1. ldmatrix loads four matrices, transposed for 16-bit rows along n."""
    for arch in archs(built):
        for (on, name), mnemonics in instructions.items():
            if on != f"sm_{arch}" or kernel not in name:
                continue
            assert any(code.startswith("LDGSTS.E.BYPASS.") and ".128" in code for code in mnemonics), (
                f"{name} on sm_{arch}"
            )
            loads = {code for code in mnemonics if code.startswith("LDSM.")}
            transposes = type_of(name) != "fp32" and (
                "gemm_kernel" not in name or "16ELb0E" in name
            )  # Lb0: weights contiguous along n
            assert loads == {"LDSM.16.M88.4", *(["LDSM.16.MT88.4"] if transposes else [])}, (
                f"{name} on sm_{arch}: {loads}"
            )


def test_tiles_of_attention_are_copied_without_loops(built, instructions):
    """At head dims of 64 and 128 in 16 bits: an address is computed once, and all copies of a tile follow."""
    for (arch, name), mnemonics in instructions.items():
        copies = re.search(r"attention_forward_kernelINS0_4(?:bf|fp)16ELi(64|128)E", name)
        if copies:
            count = sum(n for code, n in mnemonics.items() if code.startswith("LDGSTS."))
            assert count >= int(copies[1]) // 16 * 4, f"{name} on {arch}: {count}"


@pytest.mark.parametrize("kernel", ASSERTING)
def test_release_builds_assert_values(kernel, built, instructions):
    """The only absolute call in a kernel is __assertfail."""
    for arch in archs(built):
        those = {
            name: mnemonics for (on, name), mnemonics in instructions.items() if on == f"sm_{arch}" and kernel in name
        }
        assert those
        for name, mnemonics in those.items():
            assert any(code.startswith("CALL.ABS") for code in mnemonics), f"{name} on sm_{arch}"
    assert not any(
        code.startswith("CALL.ABS")
        for (_, name), mnemonics in instructions.items()
        if "gemm_kernel" in name
        for code in mnemonics
    )


@pytest.mark.parametrize("kernel", STREAMING)
def test_streams_are_read_and_written_by_16_bytes(kernel, built, instructions):
    for arch in archs(built):
        those = {
            name: mnemonics for (on, name), mnemonics in instructions.items() if on == f"sm_{arch}" and kernel in name
        }
        assert len(those) == 5  # the types of x and of the residual stream
        for name, mnemonics in those.items():
            for access in ("LDG.E.128", "STG.E.128"):
                assert any(code.startswith(access) for code in mnemonics), f"{access}: {name} on sm_{arch}"


@pytest.mark.parametrize("kernel", [name for name in STREAMING if "backward" in name])
def test_backward_copies_the_next_row_while_it_computes(kernel, built, instructions):
    """dy, s and ds: 12 copies or more of 16 bytes, for the first row and for the next."""
    for arch in archs(built):
        for (on, name), mnemonics in instructions.items():
            if on == f"sm_{arch}" and kernel in name:
                copies = sum(
                    n for code, n in mnemonics.items() if code.startswith("LDGSTS.E.BYPASS.") and ".128" in code
                )
                assert copies >= 24, f"{name} on {arch}: {copies}"


def test_the_spill_check_read_the_log_of_every_kernel(built, setup):  # noqa: F811
    """The build fails on spills. This checks that there was a log for each source and architecture."""
    folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        log = (folder / f"{source.stem}.cu.o.log").read_text()
        if "__global__" in source.read_text():
            assert {f"sm_{arch}" for arch in archs(built)} == set(
                re.findall(r"Compiling entry function '\S+' for '(sm_\d+)'", log)
            ), source.name
        assert setup.spills([log]) == []
    assert all(reason for reason in setup.MAY_SPILL.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_module_loads_and_reports_why_it_is_unavailable(built):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastlm._cuda", {str(built / MODULE)!r})
module = sys.modules["fastlm._cuda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import fastlm
info = fastlm.info()
print(info.backends["cuda"][0])
print(info.cuda)
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTLM_CUDA_EMULATION"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why, what = done.stdout.splitlines()
    assert why.startswith(("finds no NVIDIA driver", "finds no GPU", "needs a driver for CUDA", "supports NVIDIA GPUs"))
    assert re.match(r"CUDA \d+\.\d+, code for sm_80, .* needs a driver for CUDA \d+", what)
