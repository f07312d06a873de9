"""Builds the compiled modules with ninja. Building needs no torch.

Each CPU module is for one instruction set (ISA). Its sources are csrc/bindings/*.cpp, one file per operator; each is
compiled to an object per ISA, with header dependencies, so that a change recompiles the operators that it reaches.

A build that fails leaves a package that uses PyTorch's own operators; fastlm/_build.json stores the reason for
fastlm.info().

Environment variables: CXX, CXXFLAGS, LDFLAGS and MAX_JOBS have their usual meaning. FASTLM_REQUIRE_BUILD=1 makes a
failed build an error. FASTLM_BUILD_ISAS=avx2,baseline builds only these modules. FASTLM_SANITIZE=address,undefined
builds with these sanitizers.

The CUDA kernels are one more module, compiled by nvcc. FASTLM_BUILD_CUDA is auto (build if nvcc and an NVIDIA driver
are found), 0 or 1. FASTLM_CUDA_ARCHS=80,90 selects the architectures. See docs/building.md.
"""

import ctypes.util
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Distribution, Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
JOB_MEMORY = 1 << 30  # bytes that one compiler process may need

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mprefer-vector-width=512"]
X86_ISAS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

# Contraction to FMA is wanted with every compiler. -ffast-math is not: kernels give NaN and infinity their meaning.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-falign-loops=64",
    "-Wall",
]

# Machine code for each of these (that of sm_80 also runs on 86 and 89, that of 120 on 121). The kernels use features of
# sm_80 only, so all machine code comes from the same PTX, which is included for later GPUs.
CUDA_ARCHS = ("80", "90", "100", "120")
OLDEST_NVCC = (12, 0)  # the first that knows C++20
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", "-Xptxas", "-v"]
# A kernel that spills registers fails the build, unless a part of its mangled name is listed here, with the reason.
MAY_SPILL: dict[str, str] = {
    **{
        f"attention_{name}_kernelIfLi": "attention in float32 favours accuracy"
        for name in ("forward", "backward_query", "backward_key")
    },
    **{
        f"attention_{name}_kernelINS0_4{dtype}ELi256E": "accumulators of a head_dim above 128 fill half the registers"
        for name in ("forward", "backward_query", "backward_key")
        for dtype in ("bf16", "fp16")
    },
}

CXX20_PROBE = """\
#include <concepts>
int f(auto g) { return g.template operator()<int>(); }
int main() { return f([]<std::integral T>() { return T(0); }); }
"""
OPENMP_PROBE = """\
#include <omp.h>
int f(int n) {
#pragma omp parallel num_threads(n)
  n = omp_get_thread_num();
  return n;
}
"""


class BuildFailed(Exception):
    """Nothing can be compiled; the message is the reason."""


@dataclass(frozen=True)
class Toolchain:
    command: list[str]
    name: str  # "GCC 12.4", for the report
    isas: dict[str, list[str]]  # the modules to build, with their flags
    openmp: bool
    openmp_link: list[str]


def compiles(command: list[str], source: str, *flags: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text(source)
        return (
            subprocess.run(
                [*command, *flags, str(probe), "-o", str(probe.with_suffix(""))], capture_output=True
            ).returncode
            == 0
        )


def macros_of(command: list[str]) -> dict[str, str]:
    """The macros that the compiler predefines: they identify it and its target."""
    listing = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    return dict(line.removeprefix("#define ").partition(" ")[::2] for line in listing.splitlines())


def compiler_name(macros: dict[str, str]) -> str:
    if "__clang__" in macros:
        brand = "Apple clang" if "__apple_build_version__" in macros else "clang"
        return f"{brand} {macros['__clang_major__']}.{macros['__clang_minor__']}"
    return f"GCC {macros['__GNUC__']}.{macros['__GNUC_MINOR__']}" if "__GNUC__" in macros else "unknown compiler"


def find_compiler() -> list[str]:
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["clang++"], ["c++"]]
    found = [command for command in candidates if shutil.which(command[0])]
    listed = ", ".join(shlex.join(command) for command in found or candidates)
    if not found:
        raise BuildFailed(f"no C++ compiler found (looked for {listed}; CXX may name another)")
    for command in found:
        if compiles(command, CXX20_PROBE, "-std=c++20"):
            return command
    raise BuildFailed(f"the C++ compiler does not work or does not know C++20 (tried {listed})")


def find_toolchain() -> Toolchain:
    if sys.platform == "win32":
        raise BuildFailed("there are no compiled kernels for Windows yet")
    command = find_compiler()
    macros = macros_of(command)
    isas = X86_ISAS if "__x86_64__" in macros else {"baseline": []}
    isas = {isa: flags for isa, flags in isas.items() if compiles(command, "int main() {}", *flags)}
    if (wanted := os.environ.get("FASTLM_BUILD_ISAS")) == "none":  # for machines whose GPU is to be used
        isas = {}
    elif wanted:
        if unknown := set(wanted.split(",")) - set(isas):
            raise CompileError(
                f"FASTLM_BUILD_ISAS: expected names out of {','.join(isas)}, got {','.join(sorted(unknown))}"
            )
        isas = {isa: isas[isa] for isa in isas if isa in wanted.split(",")}
    # torch loads an OpenMP runtime before the modules are imported. GCC's code resolves its symbols there, so it is
    # linked to no runtime: a second copy would mean a second thread pool. Clang's code needs a runtime of its own and
    # is linked to it.
    openmp = compiles(command, OPENMP_PROBE, "-fopenmp", "-fPIC", "-shared")
    return Toolchain(
        command, compiler_name(macros), isas, openmp, ["-fopenmp"] if openmp and "__clang__" in macros else []
    )


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    home: Path  # with bin/, include/ and lib/ or lib64/
    version: str  # "13.0"
    archs: tuple[str, ...]


def nvcc_candidates() -> list[str]:
    """The user's choice, else the PATH, the folders of PyPI's packages, and that of NVIDIA's installers."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if homes:
        return [os.path.join(home, "bin", "nvcc") for home in homes]
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    installed = sorted(
        (str(file) for folder in packages for file in Path(folder, "nvidia").glob("cu*/bin/nvcc")), reverse=True
    )
    return [*filter(None, [shutil.which("nvcc")]), *installed, "/usr/local/cuda/bin/nvcc"]


def find_cuda() -> Cuda:
    """The CUDA toolkit to build with; BuildFailed says why there is none."""
    if sys.platform != "linux":
        raise BuildFailed("the CUDA kernels are built on Linux only")
    candidates = nvcc_candidates()
    nvcc = next(filter(os.path.exists, candidates), None)
    if nvcc is None:
        raise BuildFailed(
            f"no nvcc found (looked for {', '.join(candidates)}); install one by pip install nvidia-cuda-nvcc "
            "nvidia-cuda-runtime, or set CUDA_HOME to the folder that contains bin/nvcc"
        )

    def output_of(*options: str) -> str:
        done = subprocess.run(
            [nvcc, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        return done.stdout

    release, top = (
        re.search(r"release (\d+)\.(\d+)", output_of("--version")),
        re.search(r"#\$ TOP=(.+)", output_of("--dryrun", "-c", "-x", "cu", os.devnull)),
    )
    if release is None or top is None:
        raise BuildFailed(
            f"{nvcc} does not work: {(output_of('--version').strip().splitlines() or ['it prints nothing'])[-1]}"
        )
    if tuple(map(int, release.groups())) < OLDEST_NVCC:
        raise BuildFailed(
            f"{nvcc} is of CUDA {'.'.join(release.groups())}; {'.'.join(map(str, OLDEST_NVCC))} or later is needed"
        )
    home, known = Path(top[1]).resolve(), re.findall(r"compute_(\d+)", output_of("--list-gpu-arch"))
    if not (home / "include" / "cuda_runtime.h").exists():
        raise BuildFailed(
            f"cuda_runtime.h is not in {home / 'include'}; install it by pip install nvidia-cuda-runtime "
            "(of nvcc's version)"
        )
    archs = tuple(arch for arch in CUDA_ARCHS if arch in known)
    if wanted := os.environ.get("FASTLM_CUDA_ARCHS"):
        archs = tuple(sorted(set(wanted.split(",")), key=lambda arch: (len(arch), arch)))
        if wrong := [arch for arch in archs if arch not in known or int(arch) < 80]:
            usable = ",".join(arch for arch in known if int(arch) >= 80)
            raise CompileError(f"FASTLM_CUDA_ARCHS: expected architectures out of {usable}, got {','.join(wrong)}")
    return Cuda(nvcc, home, ".".join(release.groups()), archs)


def wanted_cuda() -> tuple[Cuda | None, str]:
    """(the toolkit or None, the reason if None)."""
    wanted = os.environ.get("FASTLM_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise CompileError(f"FASTLM_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "FASTLM_BUILD_CUDA=0"
    if wanted == "auto" and not (
        os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/dxg") or ctypes.util.find_library("cuda")
    ):
        return None, "no NVIDIA driver was found when fastlm was built (FASTLM_BUILD_CUDA=1 builds without one)"
    try:
        return find_cuda(), ""
    except BuildFailed as failure:
        return None, str(failure)


def words(*flags: str) -> str:
    """Flags as the value of a variable in build.ninja."""
    return shlex.join(flags).replace("$", "$$")


def cuda_build_file(cuda: Cuda, tools: Toolchain) -> str:
    """The part of build.ninja for _cuda: nvcc compiles the kernels, for all architectures, the host compiler the rest.

    ptxas reports registers and spills in a log beside each object.
    """
    from ninja.ninja_syntax import escape_path

    virtual = f"compute_{cuda.archs[0]}"
    code = ",".join([*(f"sm_{arch}" for arch in cuda.archs), virtual])
    compiler = next(
        (word for word in tools.command if os.path.basename(word) not in ("ccache", "sccache")), tools.command[0]
    )
    flags = [*NVCC_FLAGS, "-ccbin", compiler, f"-gencode=arch={virtual},code=[{code}]", f"-I{ROOT / 'csrc'}"]
    # The runtime's symbols are not exported: PyTorch has a runtime of its own, perhaps of another version.
    libraries = [f"-L{cuda.home / name}" for name in ("lib64", "lib") if (cuda.home / name).exists()]
    link = [*libraries, "-lcudart_static", "-lpthread", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    text = f"""\
nvcc = {words(cuda.nvcc)}
nvcc_flags = {words(*flags)}
rule nvcc
  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = compiling $out
"""
    for kernel in kernels:
        text += f"build {kernel.stem}.cu.o: nvcc {escape_path(str(kernel))}\n"
    bindings = sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp"))
    defines = ["-DFASTLM_MODULE=_cuda", "-DFASTLM_DEVICE=cuda", f'-DFASTLM_CUDA_ARCHS="{",".join(cuda.archs)}"']
    objects = " ".join(f"{kernel.stem}.cu.o" for kernel in kernels)
    return text + module_build("_cuda", bindings, defines, link, objects)


def spills(logs: list[str]) -> list[str]:
    """The kernels that spill registers, from the output of ptxas -v: "kernel spills 8 bytes on sm_80"."""
    found = []
    for log in logs:
        kernel = arch = ""
        for line in log.splitlines():
            if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
                kernel, arch = entry.groups()
            elif (spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and kernel:
                stored, loaded = map(int, spill.groups())
                if (stored or loaded) and not any(name in kernel for name in MAY_SPILL):
                    found.append(f"{kernel} spills {max(stored, loaded)} bytes on {arch}")
    return found


def module_build(name: str, sources: list[Path], flags: list[str], link_flags: list[str], objects: str = "") -> str:
    """The part of build.ninja for one module: an object per source, and the link."""
    from ninja.ninja_syntax import escape_path

    text = ""
    for source in sources:
        text += f"build {name}/{source.stem}.o: compile {escape_path(str(source))}\n"
        text += f"  module_flags = {words(*flags)}\n"
        objects = f"{name}/{source.stem}.o {objects}"
    return f"{text}build {name}{SUFFIX}: link {objects}\n  module_link_flags = {words(*link_flags)}\n"


def build_file(tools: Toolchain, includes: list[Path], cuda: Cuda | None = None) -> str:
    """The text of build.ninja: the target `<module><suffix>` for each module."""
    sanitize = [f"-fsanitize={os.environ['FASTLM_SANITIZE']}"] if os.environ.get("FASTLM_SANITIZE") else []
    flags = [*FLAGS, *(option for folder in includes for option in ("-isystem", str(folder))), f"-I{ROOT / 'csrc'}"]
    if sanitize:
        flags += [*sanitize, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    # On macOS the symbols of Python are resolved when a module is loaded; elsewhere that is the default.
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    text = f"""\
ninja_required_version = 1.5
cxx = {words(*tools.command)}
flags = {words(*flags)}
user_flags = {words(*shlex.split(os.environ.get("CXXFLAGS", "")))}
link_flags = {words(*shared, *sanitize, *shlex.split(os.environ.get("LDFLAGS", "")))}
rule compile
  command = $cxx $flags $module_flags $user_flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compiling $out
rule link
  command = $cxx $in $link_flags $module_link_flags -o $out
  description = linking $out
"""
    openmp = ["-fopenmp"] if tools.openmp else ["-Wno-unknown-pragmas"]
    library = ROOT / "csrc/libstdcxx.cpp"
    text += module_build("_cpu_features", [ROOT / "csrc/cpu/cpu_features.cpp", library], [], [])
    bindings = [*sorted((ROOT / "csrc/bindings").glob("*.cpp")), library]
    for isa, isa_flags in tools.isas.items():
        name = f"_cpu_{isa}"
        text += module_build(name, bindings, [*isa_flags, *openmp, f"-DFASTLM_MODULE={name}"], tools.openmp_link)
    return text + (cuda_build_file(cuda, tools) if cuda else "")


def jobs() -> int:
    """The number of compiler processes: one per core, as far as free memory allows."""
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdecimal() or int(wanted) < 1:
            raise CompileError(f"MAX_JOBS: expected a whole number of at least 1, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, free // JOB_MEMORY))


def mirror(source: Path, target: Path) -> None:
    """Copies the headers that differ.

    An isolated build has its headers in a new folder each time. The copies keep path and time stamp, so that ninja
    recompiles nothing.
    """
    for file in source.rglob("*.h"):
        copy = target / file.relative_to(source)
        if not copy.exists() or not filecmp.cmp(file, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def compile_modules(folder: Path, cuda: Cuda | None) -> tuple[Toolchain, list[Path], str]:
    """Runs ninja in `folder`. Returns the toolchain, the modules that were built, and ninja's output."""
    tools = find_toolchain()
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildFailed(f"Python.h is not in {python} (Debian and Ubuntu: apt-get install python3-dev)")
    try:
        import ninja
        import pybind11
    except ImportError as missing:
        raise BuildFailed(f"{missing.name} is not installed (a build with isolation installs it)") from missing
    folder.mkdir(parents=True, exist_ok=True)
    mirror(Path(pybind11.get_include()), folder / "include")
    (folder / "build.ninja").write_text(build_file(tools, [python, folder / "include"], cuda))
    names = ["_cpu_features", *(f"_cpu_{isa}" for isa in tools.isas), *(["_cuda"] if cuda else [])]
    targets = [folder / f"{name}{SUFFIX}" for name in names]
    for target in targets:  # those that exist afterwards were built
        target.unlink(missing_ok=True)
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-k", "0", "-j", str(jobs())]
    print(
        f"fastlm: building {', '.join(names)} with {tools.name}{'' if tools.openmp else ', without OpenMP'}", flush=True
    )
    if cuda:
        print(f"fastlm: _cuda with CUDA {cuda.version} ({cuda.nvcc}) for sm_{', sm_'.join(cuda.archs)}", flush=True)
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace").stdout
    print(log, flush=True)
    return tools, [target for target in targets if target.exists()], log


def first_error(log: str) -> str:
    return next(
        (line.replace(f"{ROOT}{os.sep}", "").strip() for line in log.splitlines() if "error" in line.lower()),
        "see the build log",
    )


class BuildModules(build_ext):
    def run(self) -> None:
        package = Path(ROOT if self.inplace else self.build_lib, "fastlm")
        cuda, why_no_cuda = wanted_cuda()
        if cuda is None:
            self.without_cuda(why_no_cuda)
        on_cuda = {
            "reason": why_no_cuda,
            "version": cuda.version if cuda else "",
            "archs": ",".join(cuda.archs) if cuda else "",
        }
        report = {"modules": [], "openmp": False, "compiler": "", "reason": "", "cuda": on_cuda}
        built: list[Path] = []
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        try:
            tools, built, log = compile_modules(folder, cuda)
            report |= {"openmp": tools.openmp, "compiler": tools.name}
            names = [file.name.removesuffix(SUFFIX) for file in built]
            if missing := [f"_cpu_{name}" for name in ("features", *tools.isas) if f"_cpu_{name}" not in names]:
                report["reason"] = f"{', '.join(missing)} did not compile: {first_error(log)}"
            if not tools.isas:
                report["reason"] = "FASTLM_BUILD_ISAS=none, as `make gpu` sets it"
            if "_cpu_features" in names:  # without it no module is used: it reports which ones this CPU can run
                report["modules"] = [name for name in names if name.startswith("_cpu_") and name != "_cpu_features"]
            if cuda:
                on_cuda["reason"] = self.check_cuda(folder, "_cuda" in names, log)
        except BuildFailed as failure:
            report["reason"] = str(failure)
            on_cuda["reason"] = on_cuda["reason"] or str(failure)
        if on_cuda["reason"]:
            built = [file for file in built if file.name != f"_cuda{SUFFIX}"]
            self.without_cuda(on_cuda["reason"])
        if report["reason"]:
            print(
                f"fastlm: {report['reason']}. The package falls back to PyTorch's own operators.",
                file=sys.stderr,
                flush=True,
            )
            if os.environ.get("FASTLM_REQUIRE_BUILD") == "1":
                raise CompileError(f"FASTLM_REQUIRE_BUILD=1: {report['reason']}")
        self.install_into(package, built, report)

    def without_cuda(self, reason: str) -> None:
        print(f"fastlm: no CUDA kernels: {reason}", flush=True)
        if os.environ.get("FASTLM_BUILD_CUDA") == "1":
            raise CompileError(f"FASTLM_BUILD_CUDA=1: {reason}")

    def check_cuda(self, folder: Path, linked: bool, log: str) -> str:
        """The reason not to use the CUDA module, or ""."""
        logs = [
            file.read_text(errors="replace")
            for file in sorted(folder.glob("*.cu.o.log"))
            if (ROOT / "csrc/cuda" / file.name.removesuffix(".o.log")).exists()
        ]
        if not linked:
            wrong = next((text for text in logs if "error" in text.lower()), log)
            return f"_cuda did not compile: {first_error(wrong)}"
        return "; ".join(spills(logs))

    def install_into(self, package: Path, built: list[Path], report: dict) -> None:
        package.mkdir(parents=True, exist_ok=True)
        for old in (
            *package.glob(f"_cpu_*{SUFFIX}"),
            *package.glob(f"_cuda{SUFFIX}"),
        ):  # of an earlier build; unlinked and not overwritten, as a process may have mapped it
            old.unlink()
        for file in built:
            shutil.copyfile(file, package / file.name)
        (package / "_build.json").write_text(json.dumps(report, indent=1) + "\n")
        self.written = [package / file.name for file in built] + [package / "_build.json"]

    def get_outputs(self) -> list[str]:
        return [str(file) for file in getattr(self, "written", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in an editable install `run` puts the modules beside the Python files


def build_in_place() -> None:
    """Compiles the modules to beside the Python files, with setuptools of any version.

    Does not read pyproject.toml, whose form is newer than what is installed on many machines with a GPU.
    """
    command = BuildModules(Distribution({"name": "fastlm", "ext_modules": [EXTENSION]}))
    command.inplace = True
    command.ensure_finalized()
    command.run()


# One extension stands for all modules: it makes the wheel platform-specific and runs build_ext.
EXTENSION = Extension("fastlm._cpu_features", ["csrc/cpu/cpu_features.cpp"])

if __name__ == "__main__" and sys.argv[1:] == ["in-place"]:
    build_in_place()
elif __name__ == "__main__":
    setup(
        # kernels/ is installed as fastlm.kernels; a top-level package `kernels` would shadow another library.
        packages=[*find_namespace_packages(include=["fastlm", "fastlm.*"]), "fastlm.kernels"],
        package_dir={"fastlm.kernels": "kernels"},
        ext_modules=[EXTENSION],
        cmdclass={"build_ext": BuildModules},
    )
