#!/usr/bin/env bash
# Runs the operator tests, on 1 to 4 threads and from several Python threads, on a module built with ThreadSanitizer, in
# a copy of the tree (Linux, GCC). Before that, it plants two races and checks that each is reported: a sanitizer that
# sees nothing would pass everything. Arguments are passed to pytest.
#
# libgomp is not instrumented; csrc/cpu/threads.h declares where its threads start and finish. Neither are Python and
# PyTorch, whose own accesses are ignored. The module is that of the narrowest instruction set, where the compiler
# instruments every access; work is split in the same way on all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$PWD/.venv/bin/python
copy=build/thread_sanitized
rm -rf "$copy"
mkdir -p "$copy"
git -c safe.directory='*' ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
export FASTLM_ISA=baseline FASTLM_TEST_BACKENDS=cpu

build() {
  FASTLM_REQUIRE_BUILD=1 FASTLM_BUILD_CUDA=0 FASTLM_BUILD_ISAS=baseline FASTLM_SANITIZE=thread \
    "$python" setup.py -q build_ext --inplace
}

sanitized() { # sanitized ARGUMENTS…: Python with the runtime of the sanitizer, which must be the first library of the
  # process and needs addresses that are not randomised. The first race ends the process. A race with an access that is
  # no longer in the history is not reported, so the history is as long as it can be.
  LD_PRELOAD=$(g++ -print-file-name=libtsan.so):$(g++ -print-file-name=libstdc++.so) OMP_NUM_THREADS=4 \
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66 history_size=7" \
    PYTHONPATH=$PWD PYTHONMALLOC=malloc setarch -R "$python" "$@"
}

layernorm='
import torch, fastlm
torch.set_num_threads(4)
x, norm = torch.randn(2000, 256, requires_grad=True), torch.ones(256, requires_grad=True)
for _ in range(10):
    y, s = fastlm.layernorm_residual(x, x, norm, norm, backend="cpu")
    torch.autograd.grad(y, [x, norm], y)
'

plant() { # plant FILE CORRECT RACE: a race must be reported while RACE stands in place of CORRECT
  cp "$1" correct
  "$python" - "$@" << 'EOF'
import pathlib, sys
path, correct, race = pathlib.Path(sys.argv[1]), *sys.argv[2:]
text = path.read_text()
assert text.count(correct) == 1, f"{path}: expected {correct!r} once, got {text.count(correct)}"
path.write_text(text.replace(correct, race))
EOF
  build
  if sanitized -c "$layernorm" > planted.txt 2>&1 || ! grep -q 'WARNING: ThreadSanitizer: data race' planted.txt; then
    tail -n 50 planted.txt
    echo "a planted race was not reported: $1: $3" >&2
    return 1
  fi
  echo "a planted race is reported: $1: $3"
  cp correct "$1"
}

# All parts of the backward pass add to one partial sum of dweight.
plant csrc/cpu/layernorm_residual.h 'partial + part * 2 * padded : nullptr' 'partial : nullptr'
# The last part of a thread is the first of the next one too.
plant csrc/cpu/threads.h 'end = parts * (range + 1) / count;' 'end = parts * (range + 1) / count + (range + 1 < count);'
build
sanitized -c "$layernorm"
sanitized -m pytest -q -x -n logical --maxprocesses 4 --dist loadfile --capture=sys --durations=5 \
  tests/ops tests/optim -m "not slow" -k "not compile and not opcheck and not contract" "$@"
