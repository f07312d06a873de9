#!/usr/bin/env bash
# wheels.sh x86_64|aarch64: builds a manylinux wheel into dist/, installs it where there is neither a compiler nor the
# source tree, and runs tests of the operators on it. Further arguments are passed to pytest. For an x86-64 machine with
# Debian or Ubuntu; .venv has the tools.
#
# x86_64 is for the Python of .venv. aarch64 is cross-compiled for the Python of Debian's release SUITE: setup.py runs in
# this Python under emulation, and thereby builds for it; the compiler that it starts is a native one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
architecture=$1
shift
platform=manylinux_2_28_$architecture # as PyTorch's own wheels
suite=${SUITE:-trixie}
root=$PWD/build/$suite-arm64 # Debian's files for Arm, with Python and its headers
native=$PWD/.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

missing=()
needs() { command -v "$1" > /dev/null || missing+=("$2"); } # needs COMMAND PACKAGE
if [[ $architecture == aarch64 ]]; then
  needs aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
  needs qemu-aarch64 qemu-user
  needs mmdebstrap mmdebstrap
  [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || missing+=(debian-archive-keyring)
else
  needs g++ g++
fi
if ((${#missing[@]})); then
  echo "missing on this machine: ${missing[*]} (Debian and Ubuntu: apt-get install ${missing[*]})" >&2
  exit 1
fi

if [[ $architecture == aarch64 ]]; then
  if [[ ! -d $root ]]; then
    mmdebstrap --quiet --variant=extract --architectures=arm64 \
      --include=base-files,python3,libpython3-dev,libstdc++6 "$suite" "$work/root"
    mkdir -p build
    mv "$work/root" "$root"
  fi
  export QEMU_LD_PREFIX=$root
  python=("$(command -v qemu-aarch64)" "$root/usr/bin/python3")
  modules="_cpu_baseline"
  export CXX=aarch64-linux-gnu-g++ CXXFLAGS="-idirafter $root/usr/include"
else
  python=("$native/python")
  modules="_cpu_amx _cpu_avx2 _cpu_avx512 _cpu_avx512_bf16 _cpu_baseline"
  unset CXX CXXFLAGS
fi
# Code of newer versions of libstdc++ is compiled in, as older versions lack these symbols.
CXXFLAGS="${CXXFLAGS-} -D_GLIBCXX_EXTERN_TEMPLATE=0"
export CXXFLAGS LDFLAGS=-s FASTLM_REQUIRE_BUILD=1 FASTLM_BUILD_CUDA=0
unset FASTLM_BUILD_ISAS FASTLM_SANITIZE

echo "--- build for $architecture"
"$native/python" -m build -q --sdist --outdir "$work/sdist" .
mkdir "$work/source" "$work/built"
tar -xzf "$work"/sdist/fastlm-*.tar.gz -C "$work/source" --strip-components=1
"$native/pip" install -q --target "$work/tools" setuptools ninja
(cd "$work/source" && PYTHONPATH=$work/tools "${python[@]}" -c "
from setuptools.build_meta import build_wheel
build_wheel('$work/built')") > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# Fails where a symbol is newer than the platform's. The modules are linked to no OpenMP library: they use PyTorch's, so
# that there is one thread pool, and none may be added here.
echo "--- repair"
"$native/auditwheel" show "$work"/built/fastlm-*.whl
PATH=$native:$PATH "$native/auditwheel" repair --plat "$platform" --only-plat --wheel-dir "$work/repaired" \
  "$work"/built/fastlm-*.whl
wheel=$(echo "$work"/repaired/fastlm-*.whl)
"$native/python" - "$wheel" "$modules" << 'PYTHON'
import pathlib, sys, zipfile

wheel, modules = pathlib.Path(sys.argv[1]), sys.argv[2].split()
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
  for isa in $("${python[@]}" -c 'from fastlm import _cpu_features; print(*_cpu_features.isas())'); do
    echo "$isa"
    FASTLM_ISA=$isa "${python[@]}" tests/build/smoke.py compiled
  done
  "${pytest[@]}" -q -m "not slow" -k "not compile and not tracer and not opcheck" tests/ops tests/optim "$@"
)
mkdir -p dist
mv "$wheel" dist
echo "dist/${wheel##*/}"
