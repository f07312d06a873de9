#!/usr/bin/env bash
# Runs the operator tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree
# (Linux, GCC): the module of the narrowest instruction set, where the compiler instruments every load, and that of the
# widest that this machine has. Then damaged files are read with the former. Arguments are passed to pytest, which then
# runs the operator tests alone.
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
run() { # run ISA ARGUMENTS…: with --capture=sys reports of errors go to the terminal
  FASTLM_ISA=$1 FASTLM_TEST_BACKENDS=cpu "$python" -m pytest -q -x -n logical --maxprocesses 4 --capture=sys \
    --durations=5 -o faulthandler_timeout=7200 -m "not slow" "${@:2}"
}
for isa in $isas; do
  FASTLM_ISA=$isa "$python" -c 'import fastlm; print(fastlm.backends.isa.kernels.__file__)' | grep build/sanitized
  run "$isa" --dist loadfile tests/ops tests/optim -k "not compile and not opcheck and not contract" "$@"
done
(($#)) || run baseline --dist load tests/fuzz/test_files.py # does not depend on the instruction set
