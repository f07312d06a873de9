"""Builds a small tree with the real setup.py and cpu_features.cpp and stand-ins for the kernels, in seconds."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "FASTLM_REQUIRE_BUILD", "FASTLM_BUILD_ISAS", "FASTLM_SANITIZE")
SETTINGS += ("FASTLM_BUILD_CUDA", "FASTLM_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH")

MODULE = """\
#include <pybind11/pybind11.h>
int answer();
PYBIND11_MODULE(FASTLM_MODULE, m) {
  m.def("answer", [] { return answer(); });
}
"""
OPERATOR = '#include "cpu/answer.h"\nint answer() { return value; }\n'
ANSWER = "constexpr int value = 42;\n"
# A new operator: a kernel and its binding, and nothing else.
DOUBLED = "namespace fastlm {\ninline int64_t doubled(int64_t x) { return 2 * x; }\n}\n"
DOUBLED_BINDING = """\
#include "arguments.h"
#include "cpu/doubled.h"
namespace fastlm::bindings {
struct doubled_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  int64_t x = keyword("x");
};
static int64_t doubled(const doubled_arguments& a) { return fastlm::doubled(a.x); }
FASTLM_BINDING(doubled)
}
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows yet")
COMPILER = shutil.which("g++") or shutil.which("c++")
# Where a build is required, as CI requires it, a missing compiler is a failure.
needs_compiler = pytest.mark.skipif(
    not COMPILER and os.environ.get("FASTLM_REQUIRE_BUILD") != "1", reason="no g++ or c++ here"
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXXFLAGS", "-O0")  # nothing here runs for long


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "a folder"  # with a space in its name
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "fastlm").mkdir()
    shutil.copy(ROOT / "setup.py", root)
    shutil.copy(ROOT / "csrc/cpu/cpu_features.cpp", root / "csrc/cpu")
    shutil.copy(ROOT / "csrc/libstdcxx.cpp", root / "csrc")
    (root / "csrc/bindings").mkdir()
    (root / "csrc/bindings/module.cpp").write_text(MODULE)
    (root / "csrc/bindings/answer.cpp").write_text(OPERATOR)
    (root / "csrc/cpu/answer.h").write_text(ANSWER)
    return root


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("fastlm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(body) makes CXX a script: `body` sees the arguments; if it does not exit, the real compiler runs."""

    def install(body, name="c++"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\n{body}\nexec {COMPILER} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))

    return install


def refusing(pattern):
    return f'case " $* " in *{pattern}*) echo "error: unsupported option" >&2; exit 1;; esac'


def build(tree, *arguments, **environment):
    command = [sys.executable, "setup.py", "build_ext", *(arguments or ("--inplace",))]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def compiled(done):
    """The objects that a build compiled."""
    return set(re.findall(r"compiling (\S+)", done.stdout))


def report(tree):
    return json.loads((tree / "fastlm/_build.json").read_text())


def answer_of(tree, name, call="answer()"):
    """The result of a call of the module's function, in a process of its own."""
    files = [str(tree / "fastlm" / (module + SUFFIX)) for module in ("_cpu_features", name)]  # the first loads OpenMP
    code = f"""
import importlib.util
for file in {files}:
    spec = importlib.util.spec_from_file_location({name!r} if file == {files[1]!r} else "_cpu_features", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
print(module.{call})
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_instruction_set_has_the_flags_of_the_narrower_ones(setup):
    isas = list(setup.X86_ISAS.values())
    assert list(setup.X86_ISAS) == ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    assert isas[0] == []  # a baseline module must run on every x86-64
    for narrower, wider in itertools.pairwise(isas):
        assert set(narrower) < set(wider)
    assert not any("fast-math" in flag or "march" in flag for flag in [*setup.FLAGS, *itertools.chain(*isas)])


def test_build_file_has_one_object_for_each_operator_and_instruction_set(setup, tmp_path):
    tools = setup.Toolchain(["ccache", "my g++"], "GCC 12.4", setup.X86_ISAS, True, [])
    text = setup.build_file(tools, [tmp_path])
    operators = [source.stem for source in (ROOT / "csrc/bindings").glob("*.cpp")]
    assert {"attention", "linear", "module"} <= set(operators)
    for isa, flags in setup.X86_ISAS.items():
        (link,) = (line for line in text.splitlines() if line.startswith(f"build _cpu_{isa}{SUFFIX}: link"))
        assert set(link.split()[3:]) == {f"_cpu_{isa}/{name}.o" for name in (*operators, "libstdcxx")}
        for operator in operators:
            assert f"build _cpu_{isa}/{operator}.o: compile" in text
        assert f"  module_flags = {' '.join([*flags, '-fopenmp', f'-DFASTLM_MODULE=_cpu_{isa}'])}\n" in text
    assert "cxx = ccache 'my g++'" in text
    assert "depfile = $out.d" in text
    assert "sanitize" not in text


def test_sanitizers_are_compiled_and_linked_in_and_errors_end_the_process(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_SANITIZE", "address,undefined")
    text = setup.build_file(setup.Toolchain(["g++"], "GCC", {"baseline": []}, True, []), [tmp_path])
    flags, link_flags = (
        next(line for line in text.splitlines() if line.startswith(f"{name} =")) for name in ("flags", "link_flags")
    )
    assert "-fsanitize=address,undefined" in flags and "-fno-sanitize-recover=all" in flags
    assert "-fsanitize=address,undefined" in link_flags


@needs_compiler
def test_a_compiler_without_openmp_as_apples_builds_one_thread(setup, compiler):
    compiler(refusing("-fopenmp"))
    tools = setup.find_toolchain()
    assert not tools.openmp and tools.openmp_link == []
    assert "-fopenmp" not in setup.build_file(tools, [])


@needs_compiler
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(setup, compiler):
    compiler(refusing("-mavx512bf16") + "\n" + 'case "$*" in *-dM*) echo "#define __x86_64__ 1";; esac')
    assert "avx512_bf16" not in setup.find_toolchain().isas


@needs_compiler
def test_other_architectures_build_the_generic_path(setup, compiler):
    compiler('case "$*" in *-dM*) set -- "$@" -U__x86_64__;; esac')
    assert setup.find_toolchain().isas == {"baseline": []}


@pytest.mark.parametrize(
    "macros, name",
    [
        ({"__GNUC__": "12", "__GNUC_MINOR__": "4"}, "GCC 12.4"),
        (
            {"__GNUC__": "4", "__GNUC_MINOR__": "2", "__clang__": "1", "__clang_major__": "19", "__clang_minor__": "1"},
            "clang 19.1",
        ),
        (
            {"__clang__": "1", "__clang_major__": "16", "__clang_minor__": "0", "__apple_build_version__": "16000026"},
            "Apple clang 16.0",
        ),
    ],
)
def test_the_report_names_the_compiler(setup, macros, name):
    assert setup.compiler_name(macros) == name


def test_jobs_follow_cores_memory_and_the_user(setup, monkeypatch):
    monkeypatch.setattr(setup, "JOB_MEMORY", 1)
    cores = setup.jobs()
    assert cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores >= 1
    monkeypatch.setattr(setup, "JOB_MEMORY", 1 << 60)
    if Path("/proc/meminfo").exists():
        assert setup.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup.jobs() == 7


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"CXX": "no-such-compiler"}, r"no C++ compiler found (looked for no-such-compiler; CXX may name another)"),
        ({"CXX": "false"}, r"the C++ compiler does not work or does not know C++20 (tried false)"),
    ],
)
def test_without_a_build_the_package_installs_and_says_why(tree, environment, reason):
    done = build(tree, **environment)
    assert done.returncode == 0, done.stderr
    assert reason in done.stderr
    assert report(tree)["modules"] == [] and reason in report(tree)["reason"]
    assert not list((tree / "fastlm").glob("*.so"))
    required = build(tree, **environment, FASTLM_REQUIRE_BUILD="1")
    assert required.returncode != 0 and reason in required.stderr


@needs_compiler
def test_an_unknown_instruction_set_is_an_error(tree):
    done = build(tree, FASTLM_BUILD_ISAS="avx1024,baseline")
    assert (
        done.returncode != 0
        and "FASTLM_BUILD_ISAS: expected names out of baseline" in done.stderr
        and "got avx1024" in done.stderr
    )


@pytest.mark.slow
@needs_compiler
def test_no_module_for_the_cpu(tree):
    done = build(tree, FASTLM_BUILD_ISAS="none")
    assert done.returncode == 0 and report(tree)["modules"] == [], done.stderr
    assert "FASTLM_BUILD_ISAS=none" in report(tree)["reason"]
    assert not list((tree / "fastlm").glob("_cpu_baseline*.so"))


@pytest.mark.slow
@needs_compiler
def test_a_build_in_place_reads_no_pyproject(tree):
    """As `make gpu-build` builds, with setuptools that is older than the form of that file."""
    (tree / "pyproject.toml").write_text("[project]\nname = 1\n")
    environment = {**os.environ, "FASTLM_BUILD_ISAS": "none"}
    assert build(tree, **environment).returncode != 0
    command = [sys.executable, "setup.py", "in-place"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "FASTLM_BUILD_ISAS=none" in report(tree)["reason"], done.stderr


@pytest.mark.slow
@needs_compiler
def test_an_operator_is_recompiled_alone_and_dropped_when_it_no_longer_compiles(tree):
    first = build(tree, FASTLM_BUILD_ISAS="baseline")
    assert first.returncode == 0 and report(tree)["reason"] == "", first.stdout + first.stderr
    assert report(tree)["modules"] == ["_cpu_baseline"]
    assert answer_of(tree, "_cpu_baseline") == "42"

    features, kernels = ("cpu_features", "libstdcxx"), ("answer", "libstdcxx", "module")
    expected = {*(f"_cpu_features/{name}.o" for name in features), *(f"_cpu_baseline/{name}.o" for name in kernels)}
    assert compiled(first) == expected

    again = build(tree, FASTLM_BUILD_ISAS="baseline")
    assert compiled(again) == set()

    (tree / "csrc/cpu/answer.h").write_text(ANSWER.replace("42", "43"))
    changed = build(tree, FASTLM_BUILD_ISAS="baseline")
    assert compiled(changed) == {"_cpu_baseline/answer.o"}
    assert answer_of(tree, "_cpu_baseline") == "43"

    (tree / "csrc/cpu/answer.h").write_text("#error broken here\n")
    broken = build(tree, FASTLM_BUILD_ISAS="baseline")
    assert broken.returncode == 0
    assert "_cpu_baseline did not compile" in report(tree)["reason"] and "broken here" in report(tree)["reason"]
    assert report(tree)["modules"] == [] and not (tree / f"fastlm/_cpu_baseline{SUFFIX}").exists()


@pytest.mark.slow
@needs_compiler
def test_a_new_operator_is_new_files_only(tree):
    for name in ("arguments.h", "tensor.h", "dispatch.h", "module.cpp"):
        shutil.copy(ROOT / "csrc/bindings" / name, tree / "csrc/bindings")
    for folder in ("csrc", "csrc/cpu"):
        for header in (ROOT / folder).glob("*.h"):
            shutil.copy(header, tree / folder)
    assert build(tree, FASTLM_BUILD_ISAS="baseline").returncode == 0
    (tree / "csrc/cpu/doubled.h").write_text(DOUBLED)
    (tree / "csrc/bindings/doubled.cpp").write_text(DOUBLED_BINDING)
    done = build(tree, FASTLM_BUILD_ISAS="baseline")
    assert done.returncode == 0 and report(tree)["reason"] == "", done.stdout + done.stderr
    assert compiled(done) == {"_cpu_baseline/doubled.o"}
    assert answer_of(tree, "_cpu_baseline", "doubled(x=21)") == "42"


@pytest.mark.slow
@needs_compiler
def test_one_module_that_does_not_compile_leaves_the_others(tree, setup):
    isas = list(setup.find_toolchain().isas)
    if "avx2" not in isas:
        pytest.skip("one instruction set on this architecture")
    (tree / "csrc/cpu/answer.h").write_text("#ifdef __AVX2__\n#error not this one\n#endif\n" + ANSWER)
    done = build(tree, "--build-lib", "out", FASTLM_BUILD_ISAS="baseline,avx2")
    assert done.returncode == 0, done.stderr
    written = json.loads((tree / "out/fastlm/_build.json").read_text())
    assert written["modules"] == ["_cpu_baseline"] and written["reason"].startswith("_cpu_avx2 did not compile: ")
    assert not list((tree / "fastlm").iterdir())  # only an editable install builds into the source tree


def test_other_headers_of_the_same_content_recompile_nothing(setup, tmp_path):
    """Build isolation unpacks pybind11 for every build."""
    for folder, text in (("one", "int a;"), ("two", "int a;"), ("three", "int b;")):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub/x.h").write_text(text)
    target = tmp_path / "include"
    setup.mirror(tmp_path / "one", target)
    os.utime(target / "sub/x.h", (1, 1))
    setup.mirror(tmp_path / "two", target)
    assert (target / "sub/x.h").stat().st_mtime == 1
    setup.mirror(tmp_path / "three", target)
    assert (target / "sub/x.h").read_text() == "int b;" and (target / "sub/x.h").stat().st_mtime != 1


# The CUDA module, with a stand-in for nvcc (tests/kernels/test_cuda_build.py runs the real one).

NVCC = """\
#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release $RELEASE, V$RELEASE.88"; exit ;;
  *--dryrun*) echo "#\\$ TOP=$(dirname "$0")/.." >&2; exit ;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) deps=$2 ;; -gencode=*) echo "flags: $1" ;; esac
  shift
done
echo "$out:" > "$deps"
echo "ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'"
echo "ptxas info    : Function properties for _Z6kernelv"
echo "    $SPILLED bytes stack frame, $SPILLED bytes spill stores, $SPILLED bytes spill loads"
[ -z "$BROKEN" ] || { echo "kernel.cu(3): error: $BROKEN" >&2; exit 2; }
exec g++ -x c++ -c -fPIC /dev/null -o "$out"
"""


@pytest.fixture
def toolkit(tree):
    """The environment of a build by the stand-in; adds a kernel to the tree."""
    home = tree / "cuda home"
    for folder in ("bin", "include", "lib"):
        (home / folder).mkdir(parents=True)
    (home / "bin/nvcc").write_text(NVCC)
    (home / "bin/nvcc").chmod(0o755)
    (home / "include/cuda_runtime.h").touch()
    subprocess.run(["ar", "rc", str(home / "lib/libcudart_static.a")], check=True)
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").touch()
    (tree / "csrc/bindings/cuda").mkdir()
    module = MODULE.replace("return answer()", "return FASTLM_CUDA_ARCHS")
    (tree / "csrc/bindings/cuda/module.cpp").write_text(module)
    return {
        "CUDA_HOME": str(home),
        "RELEASE": "13.0",
        "SPILLED": "0",
        "FASTLM_BUILD_ISAS": "baseline",
        "FASTLM_BUILD_CUDA": "1",
    }


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux only")


@pytest.mark.slow
@needs_compiler
@needs_linux
def test_the_cuda_module_is_built_for_the_architectures_that_nvcc_knows(tree, toolkit):
    done = build(tree, **toolkit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)["cuda"] == {"reason": "", "version": "13.0", "archs": "80,90"} and report(tree)["modules"] == [
        "_cpu_baseline"
    ]
    assert answer_of(tree, "_cuda") == "80,90"
    assert "compiling" not in build(tree, **toolkit).stdout
    (log,) = (tree / "build").glob("*/kernel.cu.o.log")
    assert "flags: -gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]" in log.read_text()

    assert build(tree, **toolkit | {"FASTLM_BUILD_CUDA": "0"}).returncode == 0
    assert report(tree)["cuda"]["reason"] == "FASTLM_BUILD_CUDA=0" and not (tree / f"fastlm/_cuda{SUFFIX}").exists()


@pytest.mark.slow
@needs_compiler
@needs_linux
@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"SPILLED": "8"}, "_Z6kernelv spills 8 bytes on sm_90"),
        ({"BROKEN": "no such thing"}, "_cuda did not compile: kernel.cu(3): error: no such thing"),
        (
            {"CUDA_HOME": "/nowhere"},
            "no nvcc found (looked for /nowhere/bin/nvcc); install one by pip install nvidia-cuda-nvcc",
        ),
        ({"RELEASE": "11.8"}, "is of CUDA 11.8; 12.0 or later is needed"),
        ({"FASTLM_CUDA_ARCHS": "75,90,91"}, "FASTLM_CUDA_ARCHS: expected architectures out of 80,90, got 75,91"),
        ({"FASTLM_BUILD_CUDA": "yes"}, "FASTLM_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_what_is_wrong_with_the_cuda_module_is_an_error_that_says_so(tree, toolkit, changed, reason):
    done = build(tree, **toolkit | changed)
    assert done.returncode != 0 and reason in done.stderr, done.stdout + done.stderr
    assert not (tree / f"fastlm/_cuda{SUFFIX}").exists()


def test_auto_asks_for_a_driver_and_a_kernel_may_spill_where_it_is_listed(setup, monkeypatch):
    monkeypatch.setattr(setup.os.path, "exists", lambda path: False)
    monkeypatch.setattr(setup.ctypes.util, "find_library", lambda name: None)
    assert setup.wanted_cuda()[1].startswith("no NVIDIA driver was found when fastlm was built")
    monkeypatch.setattr(setup.ctypes.util, "find_library", lambda name: "libcuda.so.1")
    monkeypatch.setattr(setup, "find_cuda", lambda: "a toolkit")
    assert setup.wanted_cuda() == ("a toolkit", "")

    log = """\
Compiling entry function '_Z3one' for 'sm_80'
 0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
"""
    assert setup.spills([log, log.replace("sm_80", "sm_90")]) == [
        "_Z3one spills 4 bytes on sm_80",
        "_Z3one spills 4 bytes on sm_90",
    ]
    monkeypatch.setitem(setup.MAY_SPILL, "3one", "a reason")
    assert setup.spills([log]) == []
