#!/usr/bin/env bash
# Runs small tests of the CUDA kernels under NVIDIA's compute-sanitizer, which finds out-of-bounds accesses and races on
# the GPU itself, as the emulator does on a CPU. One process per tool, each with an equal part of the time. A tool's
# report is in OUT/sanitizer-TOOL.txt; if there is nothing to run, one line says why.
#   gpu_sanitized.sh PYTHON OUT SECONDS TOOL… -- ARGUMENTS OF PYTEST…
# Exit status: 1 if a tool reports an error or a test fails. That the time runs out is reported, and fails nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$1 out=$2 limit=$3 tools=()
shift 3
while (($#)) && [[ $1 != -- ]]; do
  tools+=("$1")
  shift
done
shift

# Each kernel with its features: a training step of both models, heads of two widths, the gradient of a mask, split-K,
# recomputed rows; products in both layouts, losses with and without stored logits; teams of a warp and of several, and
# rows of any width.
attention=tests/kernels/test_cuda_attention.py::test_
products=tests/kernels/test_cuda_gemm.py::test_
norm=tests/kernels/test_cuda_layernorm_residual.py::test_
tests=(
  tests/kernels/test_training.py
  "${attention}heads_of_every_width["{64,136}"-torch."{float32,bfloat16}"-cuda]"
  "${attention}gradients_of_masks_over_several_tiles["{"(1, 1, 70, 90)","(2, 1, 1, 90)"}"-72-torch.bfloat16-cuda]"
  "${attention}few_queries_with_every_kind_of_mask[cuda]"
  "${attention}recomputed_rows[40-torch.bfloat16-cuda]"
  "${products}many_tiles[(130, 33, 261, 17)-"{linear,conv1d}"-torch."{float32,bfloat16}"-cuda]"
  "${products}losses_without_stored_logits[70-16-65-0.1-torch.bfloat16-cuda]"
  "${products}gradients_of_wide_and_of_many_rows[200-1100-0.1-torch.bfloat16-cuda]"
  "${norm}teams_of_every_size["{9-256,5-264,2-8200}"-torch.bfloat16-cuda]"
  "${norm}dropout_with_the_columns_of_a_thread_spread[1088-cuda]"
)

mkdir -p "$out"
rm -f "$out"/sanitizer-*.txt
sanitizer=
for found in "$(command -v compute-sanitizer)" \
  {"${CUDA_HOME:-}","${CUDA_PATH:-}",/usr/local/cuda}/bin/compute-sanitizer; do
  if [[ -x $found ]]; then
    sanitizer=$found
    break
  fi
done
if [[ -z $sanitizer ]]; then
  echo "compute-sanitizer is not on the PATH or in CUDA_HOME/bin (it is part of NVIDIA's toolkit): nothing is checked"
  exit 0
fi
export PYTHONPATH="$PWD"
if ! reasons=$("$python" -c 'import fastlm; print(*fastlm.info().backends["cuda"])') || [[ -n $reasons ]]; then
  echo "compute-sanitizer has nothing to look at: cuda ${reasons:-cannot be asked}"
  exit 0
fi

export FASTLM_TEST_DEVICE=cuda FASTLM_TEST_BACKENDS=cuda
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # separate allocations, so that accesses past the end are found
failed=0
for tool in "${tools[@]}"; do
  # Only this project's kernels are checked, and errors of driver calls that PyTorch handles are not reported.
  timeout -k 10 $((limit / ${#tools[@]})) "$sanitizer" --tool "$tool" --error-exitcode 99 \
    --kernel-regex kns=fastlm --report-api-errors no \
    --log-file "$out/sanitizer-$tool.txt" "$python" -m pytest -q -x -p no:cacheprovider -m gpu "${tests[@]}" "$@"
  status=$?
  if ((status == 124 || status == 137)); then
    echo "compute-sanitizer $tool: out of time after $((limit / ${#tools[@]})) s; see $out/sanitizer-$tool.txt"
  elif ((status)); then
    failed=1
    echo "compute-sanitizer $tool: exit status $status (99: something found, else of pytest);" \
      "see $out/sanitizer-$tool.txt"
  else
    echo "compute-sanitizer $tool: nothing found"
  fi
done
exit $failed
