"""Compiles CUDA C++ sources for the emulator, incrementally, by ninja, in build/cuda_emulation of the checkout."""

import fcntl
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2].resolve()
HERE = Path(__file__).parent.resolve()
FOLDER = ROOT / "build" / "cuda_emulation"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

COMPILER = "g++"  # not CXX: the emulator depends on the instrumentation of GCC
COMMON = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-fmax-errors=5",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'csrc/cuda'}",
    f"-I{HERE}",
]
# The emulator defines the functions of the thread sanitizer's instrumentation. Loops must not become calls of memset,
# which are not instrumented. CUDA allows reading memory as several types. a·b + c is fused where the CPU can, as on a
# GPU.
DEVICE = [
    *("-x", "c++", "-include", "intrinsics.h", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    *(
        "-fno-tree-loop-distribute-patterns",
        "-fno-strict-aliasing",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
    ),
]


def fused_multiply_add() -> list[str]:
    """The flags of the CPU that the module is built for and runs on."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= set(flags) else []


def words(*flags: object) -> str:
    return shlex.join(map(str, flags)).replace("$", "$$")


def build(name: str, kernels: list[Path], bindings: list[Path]) -> Path:
    """The shared library or module <name>, of instrumented kernel sources and of host sources.

    Raises:
        RuntimeError: with the messages of the compiler.
    """
    import ninja

    target = FOLDER / f"{name}{SUFFIX}"
    host = [*COMMON, *fused_multiply_add(), f"-DFASTLM_MODULE={name}", '-DFASTLM_CUDA_ARCHS="80"']
    text = f"""\
ninja_required_version = 1.5
builddir = {name}
rule compile
  command = {COMPILER} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compiling $in
rule link
  command = {COMPILER} $in -shared -pthread -ldl -o $out
  description = linking $out
"""
    objects = []
    # The emulator comes first: of a template that both instantiate, as those of std::string, the linker keeps the first
    # copy, and the emulator must not call an instrumented one.
    parts = [(source, [*host, "-fno-strict-aliasing"]) for source in sorted(HERE.glob("*.cpp"))]
    parts += [(source, [*host, *DEVICE]) for source in kernels]
    if bindings:
        includes = ["-isystem", sysconfig.get_path("include")]
        parts += [(source, [*host, *includes]) for source in bindings]
    for source, flags in parts:
        objects.append(f"{name}/{source.name}.o")
        text += f"build {objects[-1]}: compile {source}\n  flags = {words(*flags)}\n"
    text += f"build {target.name}: link {' '.join(objects)}\n"
    FOLDER.mkdir(parents=True, exist_ok=True)
    script = FOLDER / f"{name}.ninja"
    jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(FOLDER), "-f", script.name, "-j", jobs]
    with open(FOLDER / f"{name}.lock", "w") as lock:  # concurrent builds would write the same files
        fcntl.flock(lock, fcntl.LOCK_EX)
        script.write_text(text)
        built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode:
        raise RuntimeError(built.stdout)
    return target
