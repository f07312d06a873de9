#!/usr/bin/env bash
# wheels.sh x86_64|aarch64: builds a manylinux wheel into dist/, installs it where there is neither a compiler nor the
# source tree, and runs tests of the operators on it: those of tests/ops and tests/optim, or what further arguments give
# pytest. For an x86-64 machine with Debian or Ubuntu; .venv has the tools.
#
# x86_64 is for the Python of .venv. aarch64 is cross-compiled for the Python of Debian's release SUITE: setup.py runs
# in this Python under emulation, and thereby builds for it; the compiler that it starts is a native one.
#
# GCC 12 compiles both: code of later versions needs a libstdc++ that is newer than manylinux_2_28, which PyTorch's own
# wheels are for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
architecture=$1
shift
suite=${SUITE:-trixie}
root=$PWD/build/$suite-arm64 # Debian's files for Arm, with Python and its headers
native=$PWD/.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

missing=()
needs() { command -v "$1" > /dev/null || missing+=("$2"); } # needs COMMAND PACKAGE
if [[ $architecture == aarch64 ]]; then
  needs aarch64-linux-gnu-g++-12 g++-12-aarch64-linux-gnu
  needs qemu-aarch64 qemu-user
  needs mmdebstrap mmdebstrap
  [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || missing+=(debian-archive-keyring)
else
  needs g++-12 g++-12
fi
if ((${#missing[@]})); then
  echo "missing on this machine: ${missing[*]} (Debian and Ubuntu: apt-get install ${missing[*]})" >&2
  exit 1
fi

if [[ $architecture == aarch64 ]]; then
  if [[ ! -d $root ]]; then
    mode=$([[ $(id -u) == 0 ]] && echo root || echo chrootless)
    mmdebstrap --quiet --mode="$mode" --variant=extract --architectures=arm64 \
      --include=base-files,python3,libpython3-dev,libstdc++6 "$suite" "$work/root"
    mkdir -p build
    mv "$work/root" "$root"
  fi
  export QEMU_LD_PREFIX=$root
  python=("$(command -v qemu-aarch64)" "$root/usr/bin/python3")
  modules="_cpu_baseline"
  export CXX=aarch64-linux-gnu-g++-12 CXXFLAGS="-idirafter $root/usr/include"
else
  python=("$native/python")
  modules="_cpu_amx _cpu_avx2 _cpu_avx512 _cpu_avx512_bf16 _cpu_baseline"
  export CXX=g++-12 CXXFLAGS=""
fi
export LDFLAGS=-s FASTLM_REQUIRE_BUILD=1 FASTLM_BUILD_CUDA=0
unset FASTLM_BUILD_ISAS FASTLM_SANITIZE

echo "--- build for $architecture"
mkdir "$work/source" "$work/built"
"$native/pip" install -q --target "$work/tools" setuptools pybind11 ninja
backend() { # backend HOOK FOLDER: build_sdist or build_wheel
  PYTHONPATH=$work/tools "${python[@]}" -c "from setuptools.build_meta import $1; $1('$2')" >> "$work/log" 2>&1 \
    || { cat "$work/log" >&2; exit 1; }
}
backend build_sdist "$work"
tar -xzf "$work"/fastlm-*.tar.gz -C "$work/source" --strip-components=1
(cd "$work/source" && backend build_wheel "$work/built")

# The modules are linked to no OpenMP library: they use PyTorch's, so that there is one thread pool. No library may be
# added to the wheel.
echo "--- repair"
"$native/auditwheel" show "$work"/built/fastlm-*.whl
PATH=$native:$PATH "$native/auditwheel" repair --wheel-dir "$work/repaired" "$work"/built/fastlm-*.whl
wheel=$(echo "$work"/repaired/fastlm-*.whl)
"$native/python" - "$wheel" "$architecture" "$modules" << 'PYTHON'
import pathlib
import re
import sys
import zipfile

wheel, architecture, modules = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3].split()
glibc = [int(minor) for minor in re.findall(f"manylinux_2_([0-9]+)_{architecture}", wheel.name)]
assert min(glibc, default=99) <= 28, f"expected a wheel for manylinux_2_28 or older, got {wheel.name}"
libraries = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
found = sorted(name.removeprefix("fastlm/").partition(".")[0] for name in libraries)
assert found == sorted([*modules, "_cpu_features"]), f"expected the modules {modules} alone, got {libraries}"
assert wheel.stat().st_size <= 15e6, f"expected at most 15 MB, got {wheel.stat().st_size} bytes"
print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {' '.join(found)}")
PYTHON

echo "--- install"
bare=$work/bare
if [[ $architecture == aarch64 ]]; then # with the oldest PyTorch that is supported
  version=$("${python[@]}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$native/uv" pip install -q --target "$bare" --python-platform aarch64-manylinux_2_28 --python-version "$version" \
    --only-binary :all: "$wheel" 'torch==2.9.*' pytest
  export PYTHONPATH=$bare
  pytest=("${python[@]}" -m pytest)
else # PyTorch and the other dependencies are those of .venv
  "$native/python" -m venv "$bare"
  "$native/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$bare/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
  "$bare/bin/pip" install -q --no-deps --force-reinstall "$wheel"
  python=("$bare/bin/python")
  pytest=("${python[@]}" -m pytest -n logical --maxprocesses 4 --dist loadfile)
fi

echo "--- test"
mkdir "$work/run"
cp -r tests pyproject.toml "$work/run"
(
  cd "$work/run"
  unset CXX
  export PATH=$bare/bin FASTLM_TEST_PACKAGE=$bare FASTLM_TEST_BACKENDS=cpu OMP_WAIT_POLICY=passive
  isas=$("${python[@]}" -c 'from fastlm import _cpu_features; print(*_cpu_features.isas())')
  for isa in $isas; do
    echo "$isa"
    FASTLM_ISA=$isa "${python[@]}" tests/build/smoke.py compiled
  done
  (($#)) || set -- tests/ops tests/optim
  "${pytest[@]}" -q -m "not slow" -k "not compile and not tracer and not opcheck" "$@"
)
mkdir -p dist
mv "$wheel" dist
echo "dist/${wheel##*/}"
