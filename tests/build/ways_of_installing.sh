#!/usr/bin/env bash
# ways_of_installing.sh FOLDER: installs from the sdist, without a compiler, and with a compiler without OpenMP (as
# Apple's), in virtual environments in FOLDER. torch and the other dependencies come from .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath "$1")
smoke=$PWD/tests/build/smoke.py

new_venv() { # new_venv NAME: sees the dependencies, but not this checkout
  .venv/bin/python -m venv "$folder/$1"
  .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$folder/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
}

check() { # check NAME EXPECTED: outside the checkout, so that the installed package is imported
  (cd "$folder" && "$folder/$1/bin/python" "$smoke" "$2" && "$folder/$1/bin/fastlm" info)
}

echo "--- from the sdist"
.venv/bin/python -m build -q --sdist --outdir "$folder/dist"
# One module is compiled; the others need only their source files, which are compared with the list.
git -c safe.directory='*' ls-files csrc kernels fastlm setup.py | sort > "$folder/needed"
tar -tzf "$folder"/dist/fastlm-*.tar.gz | sed 's|^[^/]*/||' | sort > "$folder/archived"
if comm -13 "$folder/archived" "$folder/needed" | grep .; then
  echo "missing in the sdist" >&2
  exit 1
fi
new_venv from-sdist
FASTLM_REQUIRE_BUILD=1 FASTLM_BUILD_ISAS=baseline \
  "$folder/from-sdist/bin/pip" install -q --no-deps "$folder"/dist/fastlm-*.tar.gz
check from-sdist compiled

echo "--- without a compiler"
new_venv without-compiler
FASTLM_REQUIRE_BUILD=0 CXX=/bin/false "$folder/without-compiler/bin/pip" install -q --no-deps .
check without-compiler plain

echo "--- without OpenMP"
compiler=$folder/c++-without-openmp
cat > "$compiler" << 'SCRIPT'
#!/bin/sh
case " $* " in *-fopenmp*) echo "error: unsupported option '-fopenmp'" >&2; exit 1 ;; esac
exec g++ "$@"
SCRIPT
chmod +x "$compiler"
new_venv without-openmp
FASTLM_REQUIRE_BUILD=1 CXX=$compiler FASTLM_BUILD_ISAS=baseline "$folder/without-openmp/bin/pip" install -q --no-deps .
check without-openmp one-thread
