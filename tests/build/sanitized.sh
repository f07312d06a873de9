#!/usr/bin/env bash
# Runs the operator tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree
# (Linux, GCC): the module of the narrowest instruction set, where the compiler instruments every load, and that of the
# widest that this machine has. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$PWD/.venv/bin/python
copy=build/sanitized
rm -rf "$copy"
mkdir -p "$copy"
git -c safe.directory='*' ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
widest_and_narrowest='from fastlm import _cpu_features as f; print(*dict.fromkeys((f.isas()[0], "baseline")))'
isas=${FASTLM_SANITIZE_ISAS:-$("$python" -c "$widest_and_narrowest")}
cd "$copy"
FASTLM_REQUIRE_BUILD=1 FASTLM_BUILD_ISAS=${isas// /,} FASTLM_SANITIZE=address,undefined \
  "$python" setup.py -q build_ext --inplace

# The sanitizer runtime must be the first library of the process and needs libstdc++ at its start. Leaks of Python
# itself are not reported.
LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
tests="tests/ops tests/optim tests/fuzz/test_files.py"
for isa in $isas; do # with --capture=sys reports of errors go to the terminal
  FASTLM_ISA=$isa "$python" -c 'import fastlm; print(fastlm.backends.isa.kernels.__file__)' | grep build/sanitized
  FASTLM_ISA=$isa FASTLM_TEST_BACKENDS=cpu "$python" -m pytest -q -x -n logical --maxprocesses 4 --dist loadfile \
    --capture=sys --durations=5 $tests -m "not slow" \
    -k "not compile and not opcheck and not contract" "$@"
  tests="tests/ops tests/optim" # reading damaged files does not depend on the instruction set
done
