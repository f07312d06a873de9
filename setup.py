"""Builds the compiled modules: the same C++ sources once per instruction set, by ninja, against pybind11 alone (no torch is needed to build).

Whatever fails here leaves a package that works on PyTorch's own operators; fastlm/_build.json keeps the reason for fastlm.info().

CXX, CXXFLAGS, LDFLAGS and MAX_JOBS mean what they always mean. FASTLM_REQUIRE_BUILD=1 makes a failed build an error, FASTLM_BUILD_ISAS=avx2,baseline
builds those modules only, FASTLM_SANITIZE=address,undefined builds with these sanitizers. See docs/building.md.
"""

import filecmp
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
JOB_MEMORY = 2 << 30  # what compiling one module may take, bytes

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mprefer-vector-width=512"]
X86_ISAS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

# Contraction to FMA is wanted on every compiler; -ffast-math is not: NaN and infinity have a meaning here.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall"]

CXX20_PROBE = "#include <concepts>\nint f(auto g) { return g.template operator()<int>(); }\nint main() { return f([]<std::integral T>() { return T(0); }); }\n"
OPENMP_PROBE = "#include <omp.h>\nint f(int n) {\n#pragma omp parallel num_threads(n)\n  n = omp_get_thread_num();\n  return n;\n}\n"


class BuildFailed(Exception):
    """Why there is nothing compiled."""


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
        return subprocess.run([*command, *flags, str(probe), "-o", str(probe.with_suffix(""))], capture_output=True).returncode == 0


def macros_of(command: list[str]) -> dict[str, str]:
    """What the compiler predefines: who it is and what it compiles for."""
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
    if wanted := os.environ.get("FASTLM_BUILD_ISAS"):
        if unknown := set(wanted.split(",")) - set(isas):
            raise CompileError(f"FASTLM_BUILD_ISAS: expected names out of {','.join(isas)}, got {','.join(sorted(unknown))}")
        isas = {isa: isas[isa] for isa in isas if isa in wanted.split(",")}
    # torch has loaded an OpenMP runtime before our modules are imported. GCC's code finds its functions there, so it is linked to none: a second
    # copy would mean a second pool of threads. Clang's code calls another runtime, which it must bring.
    openmp = compiles(command, OPENMP_PROBE, "-fopenmp", "-fPIC", "-shared")
    return Toolchain(command, compiler_name(macros), isas, openmp, ["-fopenmp"] if openmp and "__clang__" in macros else [])


def build_file(tools: Toolchain, includes: list[Path]) -> str:
    """The text of build.ninja: the target `<module><suffix>` for each module."""
    from ninja.ninja_syntax import escape_path

    def words(*flags: str) -> str:
        return shlex.join(flags).replace("$", "$$")

    sanitize = [f"-fsanitize={os.environ['FASTLM_SANITIZE']}"] if os.environ.get("FASTLM_SANITIZE") else []
    flags = [*FLAGS, *(option for folder in includes for option in ("-isystem", str(folder))), f"-I{ROOT / 'csrc'}"]
    if sanitize:
        flags += [*sanitize, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    # On macOS a module finds Python only when it is loaded; elsewhere that is the default.
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
    modules = {"_cpu_features": ("csrc/cpu/cpu_features.cpp", [], [])}
    for isa, isa_flags in tools.isas.items():
        openmp = ["-fopenmp"] if tools.openmp else ["-Wno-unknown-pragmas"]
        modules[f"_cpu_{isa}"] = ("csrc/bindings.cpp", [*isa_flags, *openmp, f"-DFASTLM_MODULE=_cpu_{isa}"], tools.openmp_link)
    for name, (source, module_flags, link_flags) in modules.items():
        text += f"""\
build {name}.o: compile {escape_path(str(ROOT / source))}
  module_flags = {words(*module_flags)}
build {name}{SUFFIX}: link {name}.o
  module_link_flags = {words(*link_flags)}
"""
    return text


def jobs() -> int:
    """As many compilers as there are cores, and no more than the free memory feeds."""
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
    """Copies the files that differ. An isolated build finds its headers in a new folder each time; ninja must see the same ones, as old as they are."""
    for file in source.rglob("*.h"):
        copy = target / file.relative_to(source)
        if not copy.exists() or not filecmp.cmp(file, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def compile_modules(folder: Path) -> tuple[Toolchain, list[Path], str]:
    """Runs ninja in `folder`: what was built, and what the compiler said of the rest."""
    tools = find_toolchain()
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildFailed(f"Python.h is not in {python} (Debian and Ubuntu: apt-get install python3-dev)")
    try:
        import ninja
        import pybind11
    except ImportError as missing:
        raise BuildFailed(f"{missing.name} is missing, which an isolated build installs by itself") from missing
    folder.mkdir(parents=True, exist_ok=True)
    mirror(Path(pybind11.get_include()), folder / "include")
    (folder / "build.ninja").write_text(build_file(tools, [python, folder / "include"]))
    names = ["_cpu_features", *(f"_cpu_{isa}" for isa in tools.isas)]
    targets = [folder / f"{name}{SUFFIX}" for name in names]
    for target in targets:  # so that one which exists afterwards is one that was built
        target.unlink(missing_ok=True)
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-k", "0", "-j", str(jobs())]
    print(f"fastlm: building {', '.join(names)} with {tools.name}{'' if tools.openmp else ', without OpenMP'}", flush=True)
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace").stdout
    print(log, flush=True)
    return tools, [target for target in targets if target.exists()], log


class BuildModules(build_ext):
    def run(self) -> None:
        package = Path(ROOT if self.inplace else self.build_lib, "fastlm")
        report = {"modules": [], "openmp": False, "compiler": "", "reason": ""}
        built: list[Path] = []
        try:
            tools, built, log = compile_modules(ROOT / "build" / f"ninja-{sys.implementation.cache_tag}")
            report |= {"openmp": tools.openmp, "compiler": tools.name}
            names = [file.name.removesuffix(SUFFIX) for file in built]
            if missing := [f"_cpu_{name}" for name in ("features", *tools.isas) if f"_cpu_{name}" not in names]:
                first_error = next((line.replace(f"{ROOT}{os.sep}", "").strip() for line in log.splitlines() if "error" in line.lower()), "see the build log")
                report["reason"] = f"{', '.join(missing)} did not compile: {first_error}"
            if "_cpu_features" in names:  # it says which of the others this CPU can run: without it none is used
                report["modules"] = [name for name in names if name != "_cpu_features"]
        except BuildFailed as failure:
            report["reason"] = str(failure)
        if report["reason"]:
            print(f"fastlm: {report['reason']}. The package works without; PyTorch's own operators serve there.", file=sys.stderr, flush=True)
            if os.environ.get("FASTLM_REQUIRE_BUILD") == "1":
                raise CompileError(f"FASTLM_REQUIRE_BUILD=1: {report['reason']}")
        self.install_into(package, built, report)

    def install_into(self, package: Path, built: list[Path], report: dict) -> None:
        package.mkdir(parents=True, exist_ok=True)
        for old in package.glob(f"_cpu_*{SUFFIX}"):  # of an earlier build; never overwritten, as a running process may have it mapped
            old.unlink()
        for file in built:
            shutil.copyfile(file, package / file.name)
        (package / "_build.json").write_text(json.dumps(report, indent=1) + "\n")
        self.written = [package / file.name for file in built] + [package / "_build.json"]

    def get_outputs(self) -> list[str]:
        return [str(file) for file in getattr(self, "written", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install finds the modules where `run` put them, beside the Python files


if __name__ == "__main__":
    setup(
        # kernels/ is installed as fastlm.kernels, and never as kernels, which is the name of another library.
        packages=[*find_namespace_packages(include=["fastlm", "fastlm.*"]), "fastlm.kernels"],
        package_dir={"fastlm.kernels": "kernels"},
        # One extension stands for all modules: with it the wheel is one for this platform, and build_ext runs.
        ext_modules=[Extension("fastlm._cpu_features", ["csrc/cpu/cpu_features.cpp"])],
        cmdclass={"build_ext": BuildModules},
    )
