"""Does the suite notice? Kernels, backends and operators broken on purpose, one thing at a time; the tests named beside each must fail.

Python is changed in a copy of the package. The C++ is compiled again, without optimisation for speed, for the one instruction set that every machine has;
several changes share a module where the tests of none can see the others.

FASTLM_TEST_MUTANTS=0/3 takes every third from the first on, 1/3 from the second, 2/3 from the third; by default all are taken.
"""

import concurrent.futures
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastlm

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastlm.__file__).parent
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
SHARE, SHARES = map(int, os.environ.get("FASTLM_TEST_MUTANTS", "0/1").split("/"))
assert 0 <= SHARE < SHARES, f"FASTLM_TEST_MUTANTS: expected 0/3, 1/3, 2/3 or the like, got {SHARE}/{SHARES}"


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # under fastlm/ or csrc/
    old: str  # stands there exactly once
    new: str
    tests: str  # of which at least one must fail: a file under tests/ and what pytest -k selects in it


def mutate(folder: Path, mutant: Mutant) -> None:
    path = folder / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} of: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))


def survives(folder: Path, mutant: Mutant, **environment: str) -> str:
    """Runs the mutant's tests against the package in `folder`: "" if one of them fails, as it must, else what pytest said."""
    file, _, selected = mutant.tests.partition(" ")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=line",
        "--durations=0",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={folder} {ROOT}",
    ]
    environment = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "FASTLM_TEST_PACKAGE": str(folder)}
        | environment
    )
    done = subprocess.run(
        [*command, f"tests/{file}", "-k", selected],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode == 1 and "1 failed" in done.stdout and "error" not in done.stdout.splitlines()[-1]:
        return ""
    return (
        f"{mutant}\npytest ended with {done.returncode} (1 = a test failed):\n{done.stdout[-1500:]}{done.stderr[-500:]}"
    )


# Python: one test process for each

REFERENCE, TORCH, CPU = ({"FASTLM_TEST_BACKENDS": name} for name in ("reference", "torch", "cpu"))
ORACLE, PHILOX, NATIVE, KERNELS, LAYOUT = (
    f"fastlm/backends/{name}.py" for name in ("reference", "philox", "torch", "cpu", "layout")
)
ATTENTION, LAYERNORM, LOSS, MLP, EDGE, AUTOCAST = (
    f"fastlm/ops/{name}.py"
    for name in ("attention", "layernorm_residual", "linear_cross_entropy", "gelu_mlp", "boundary", "autocast")
)

OPTIMIZER, LAYERS = "fastlm/optim/adamw.py", "fastlm/models/layers.py"

PYTHON = [
    # the oracle
    (REFERENCE, Mutant(ORACLE, "dbias = gflat.sum(0) if", "dbias = gflat[1:].sum(0) if", "ops/test_linear.py float64")),
    (
        REFERENCE,
        Mutant(ORACLE, "(1 + 3 * 0.044715 * x * x)", "(1 + 0.044715 * x * x)", "ops/test_gelu_mlp.py gelu_is_right"),
    ),
    (
        REFERENCE,
        Mutant(ORACLE, " - xhat * (gw * xhat).mean(-1, keepdim=True))", ")", "ops/test_layernorm_residual.py float64"),
    ),
    (REFERENCE, Mutant(ORACLE, "distance <= upper", "distance < upper", "ops/test_attention.py windows")),
    (
        REFERENCE,
        Mutant(
            ORACLE,
            "if reachable is None or (not captured(values) and finite.all())",
            "if True",
            "ops/test_attention.py behind_the_mask",
        ),
    ),
    (
        REFERENCE,
        Mutant(ORACLE, "dweights - delta + dlse[..., None]", "dweights - delta", "ops/test_attention.py log_sum_exp"),
    ),
    (
        REFERENCE,
        Mutant(
            ORACLE, "dropout_p, first), weights", "dropout_p, 0), weights", "ops/test_attention_varlen.py definition"
        ),
    ),
    (REFERENCE, Mutant(PHILOX, "range(10)", "range(9)", "ops/test_dropout.py authors")),
    (REFERENCE, Mutant(PHILOX, "words >= int", "words < int", "ops/test_dropout.py word")),
    # PyTorch's operators
    (
        TORCH,
        Mutant(
            NATIVE,
            "return not all(math.isfinite",
            "return False and not all(math.isfinite",
            "ops/test_attention.py behind_the_mask",
        ),
    ),
    (
        TORCH,
        Mutant(
            NATIVE, "or causal else (query, key)", "or causal else (query,)", "ops/test_attention.py nothing_but_nan"
        ),
    ),
    (
        TORCH,
        Mutant(
            NATIVE, "causal = upper == 0 and", "causal = upper >= 0 and", "ops/test_attention.py float64 or windows"
        ),
    ),
    (TORCH, Mutant(NATIVE, "ds.add_(dsummed)", "ds", "ops/test_layernorm_residual.py float64")),
    (TORCH, Mutant(NATIVE, "scale * (label_smoothing - 1)", "scale * -1", "ops/test_linear_cross_entropy.py float64")),
    # tensors to addresses
    (CPU, Mutant(KERNELS, "0 if size == 1 else stride", "stride", "ops/test_attention.py masks")),
    (CPU, Mutant(KERNELS, "torch.bool else 2 if", "torch.bool else 3 if", "ops/test_attention.py masks")),
    (
        CPU,
        Mutant(
            KERNELS,
            "(0, head_stride, token_stride, 1)",
            "(0, head_dim, token_stride, 1)",
            "ops/test_attention_varlen.py strides",
        ),
    ),
    (CPU, Mutant(LAYOUT, "if x.stride(-1) == 1 or", "if True or", "ops/test_linear.py strides")),
    # the operators themselves
    (
        REFERENCE,
        Mutant(ORACLE, "        if end < start:", "        if False:", "ops/test_attention_varlen.py do_not_fit"),
    ),
    (REFERENCE, Mutant(ATTENTION, "else offset + right", "else offset + right + 1", "ops/test_attention.py windows")),
    (REFERENCE, Mutant(ATTENTION, "offset if causal", "0 if causal", "ops/test_attention.py float64")),
    (
        REFERENCE,
        Mutant(
            LAYERNORM,
            "            dresidual = dx\n",
            "            dresidual = None\n",
            "ops/test_layernorm_residual.py float64",
        ),
    ),
    (
        REFERENCE,
        Mutant(LOSS, "ctx.gradients, None", "ctx.gradients, ctx.gradients", "ops/test_linear_cross_entropy.py again"),
    ),
    (
        REFERENCE,
        Mutant(LOSS, "if x.dtype == torch.float16:", "if False:", "ops/test_linear_cross_entropy.py underflow"),
    ),
    (
        REFERENCE,
        Mutant(
            LOSS,
            "    share = (target != ignore_index).sum()",
            "    share = (target == target).sum()",
            "ops/test_linear_cross_entropy.py float64",
        ),
    ),
    (
        REFERENCE,
        Mutant(
            MLP,
            "x.new_empty(hidden) if recompute < 1",
            "x.new_empty(hidden) if recompute < 2",
            "ops/test_every_operator.py contract",
        ),
    ),
    # what the models add
    (
        REFERENCE,
        Mutant(
            LAYERS,
            "return dtable.index_add_(0, ids, drows), None, None",
            "return dtable, None, None",
            "models/test_layers.py gradients_meet",
        ),
    ),
    (REFERENCE, Mutant(LAYERS, "if ctx.padding_idx >= 0:", "if False:", "models/test_layers.py gradients_meet")),
    # the optimiser
    (
        REFERENCE,
        Mutant(
            ORACLE, "torch.where(master.to(p.dtype) == p, held, w)", "held", "optim/test_adamw.py changed_by_others"
        ),
    ),
    (
        TORCH,
        Mutant(
            NATIVE,
            "if not (isinstance(factor, float) and factor == 1.0):",
            "if False:",
            "optim/test_adamw.py clip_grad_norm",
        ),
    ),
    (CPU, Mutant(KERNELS, "written = [*parameters, ", "written = [", "optim/test_adamw.py version")),
    (
        REFERENCE,
        Mutant(
            OPTIMIZER,
            "math.sqrt(sum(float(s) for s in squares)) * abs(float(factor))",
            "math.sqrt(sum(float(s) for s in squares))",
            "optim/test_adamw.py scaler",
        ),
    ),
    (
        REFERENCE,
        Mutant(OPTIMIZER, "state.pop(MASTER, None)  # rounded by PyTorch", "continue", "optim/test_adamw.py survive"),
    ),
    (REFERENCE, Mutant(EDGE, "return torch.randint(", "return 0 * torch.randint(", "ops/test_dropout.py calls_differ")),
    # autocast
    (
        REFERENCE,
        Mutant(
            AUTOCAST, "w if w is None else w.to(x.dtype) for w", "w for w", "ops/test_every_operator.py rounded_weights"
        ),
    ),
    (
        CPU,
        Mutant(
            KERNELS,
            "return torch.float32 if wide else x.dtype",
            "return x.dtype",
            "ops/test_every_operator.py not_rounded",
        ),
    ),
]


@pytest.mark.slow
def test_python_mutants(tmp_path):
    unbuilt = not list(PACKAGE.glob("_cpu_*.so"))

    def outcome(numbered):
        number, (backend, mutant) = numbered
        if unbuilt and backend is CPU:
            return ""
        folder = tmp_path / str(number)
        shutil.copytree(
            PACKAGE, folder / "fastlm", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
        )
        changed = folder / mutant.file
        changed.unlink()  # the link
        shutil.copy(PACKAGE.parent / mutant.file, changed)
        mutate(folder, mutant)
        return survives(folder, mutant, **backend)

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        survivors = "\n".join(filter(None, pool.map(outcome, enumerate(PYTHON[SHARE::SHARES]))))
    assert not survivors, survivors


# Triton: kernels in a copy of the folder beside the package, under the interpreter

QUERIES, KEYS = "kernels/attention.py", "kernels/attention_tiles.py"
ON_TRITON = [
    Mutant(
        QUERIES,
        "norm = norm * decay + tl.sum(weights, 1)",
        "norm = norm + tl.sum(weights, 1)",
        "ops/test_attention.py float64",
    ),
    Mutant(KEYS, "(j - i <= upper)", "(j - i < upper)", "ops/test_attention.py windows"),
    Mutant(
        "kernels/attention_backward.py",
        "dv += tl.where(seen[:, None], sent",
        "dv += tl.where(seen[:, None] | True, sent",
        "kernels/test_paths.py stays",
    ),
    Mutant("kernels/attention_backward.py", "(dweights - delta[None, :])", "dweights", "ops/test_attention.py float64"),
    Mutant(
        "kernels/attention_backward.py",
        "if EXACT:\n        delta",
        "if False:\n        delta",
        "kernels/test_paths.py rounded_once",
    ),
    Mutant(
        "kernels/attention_backward.py",
        "q, dk, PRECISION, EXACT)",
        "q, dk, PRECISION, False)",
        "kernels/test_paths.py rounded_once",
    ),
    Mutant(
        "kernels/attention_decode.py",
        "out = tl.sum(part * share[:, None], 0)",
        "out = tl.sum(part, 0)",
        "kernels/test_paths.py stretches",
    ),
    Mutant(
        "kernels/philox.py",
        "tl.join(words[0], words[2])",
        "tl.join(words[2], words[0])",
        "ops/test_dropout.py definition",
    ),
    Mutant(
        "kernels/philox.py",
        "columns // 64 * 16 + columns",
        "columns // 32 * 16 + columns",
        "kernels/test_paths.py hidden_nan",
    ),
    Mutant(
        "kernels/layernorm_residual.py", " - xhat * correlation[:, None]", "", "ops/test_layernorm_residual.py float64"
    ),
    Mutant(
        "kernels/gelu_mlp.py",
        "dactivated * slope).to(dhidden",
        "dactivated).to(dhidden",
        "ops/test_gelu_mlp.py float64",
    ),
    Mutant(
        "kernels/linear_cross_entropy.py", "* share - uniform", "* share", "ops/test_linear_cross_entropy.py float64"
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_mutants(tmp_path):
    def outcome(numbered):
        number, mutant = numbered
        folder = tmp_path / str(number)
        shutil.copytree(
            PACKAGE,
            folder / "fastlm",
            copy_function=os.symlink,
            ignore=shutil.ignore_patterns("__pycache__", "kernels"),
        )
        (folder / "fastlm" / "backends" / "triton.py").unlink()  # a link would lead it back to where it came from
        shutil.copy(PACKAGE / "backends" / "triton.py", folder / "fastlm" / "backends" / "triton.py")
        shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        mutate(folder, mutant)
        shutil.move(
            folder / "kernels", folder / "fastlm" / "kernels"
        )  # as installed: a checkout's own would be found elsewhere
        return survives(
            folder, mutant, FASTLM_TEST_BACKENDS="triton", TRITON_INTERPRET="1", FASTLM_TEST_INTERPRETED="1"
        )

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        survivors = "\n".join(filter(None, pool.map(outcome, enumerate(ON_TRITON[SHARE::SHARES]))))
    assert not survivors, survivors


# C++: a module for each group, in which no operator's tests run another's change

GEMM, PACK, TILE, SKINNY = (f"csrc/cpu/{name}.h" for name in ("gemm", "gemm_pack", "gemm_tile", "gemm_skinny"))
LINEAR, GELU, NORM, CE = (
    f"csrc/cpu/{name}.h" for name in ("linear", "gelu_mlp", "layernorm_residual", "linear_cross_entropy")
)
FORWARD, MASK, BACKWARD, SEQUENCES, DROPOUT = (
    f"csrc/cpu/{name}.h" for name in ("attention", "attention_mask", "attention_backward", "sequences", "philox")
)
ADAMW = "csrc/cpu/adamw.h"

CPP = [
    [
        Mutant(GEMM, "r % (PackedTogether * PanelRows) == 0", "r == 0", "ops/test_linear.py float64"),
        Mutant(
            FORWARD,
            "(vec::load(o + d * width + i, full{}) * factor)",
            "vec::load(o + d * width + i, full{})",
            "ops/test_attention.py float64",
        ),
        Mutant(SEQUENCES, "q, k, keys - queries};", "q, k, 0};", "ops/test_attention_varlen.py windows"),
        Mutant(NORM, " - n * vec::all(correlation)", "", "ops/test_layernorm_residual.py float64"),
        Mutant(ADAMW, "eps), w * decay)", "eps), w)", "optim/test_adamw.py step_against_float64"),
    ],
    [
        Mutant(LINEAR, "bias ? value + vec::load(bias + j, span) : value", "value", "ops/test_linear.py float64"),
        Mutant(
            MASK,
            "std::min(m.upper, diagonal + 1)",
            "std::min(m.upper + 1, diagonal + 1)",
            "ops/test_attention.py windows",
        ),
        Mutant(NORM, "squares / float(width) + eps", "squares / float(width)", "ops/test_layernorm_residual.py eps"),
        Mutant(ADAMW, "begin = std::max(begin, stop);", "begin = end;", "optim/test_adamw.py many_steps"),
    ],
    [
        Mutant(GELU, "(value * g.slope).store", "value.store", "ops/test_gelu_mlp.py float64"),
        Mutant(CE, " * factor - uniform)", " * factor)", "ops/test_linear_cross_entropy.py float64"),
        Mutant(DROPOUT, "k1 += 0xBB67AE85u", "k1 += 0xBB67AE84u", "ops/test_dropout.py definition"),
        Mutant(BACKWARD, "p[v] * (dp - d[v])).store", "p[v] * dp).store", "ops/test_attention.py float64"),
        Mutant(ADAMW, "select(rounded_to<T>(kept) == w, kept, w)", "kept", "optim/test_adamw.py changed_by_others"),
    ],
    [
        Mutant(
            CE, "z[target] -= scale * (1 - smoothing)", "z[target] -= scale", "ops/test_linear_cross_entropy.py float64"
        ),
        Mutant(MASK, "select(b == nothing, nothing, s + b)", "s + b", "ops/test_attention.py behind_the_mask"),
        Mutant(NORM, "v = vec::load(sr + i, span);", "(void)0;", "ops/test_layernorm_residual.py stream"),
        Mutant(
            GELU, "if (make_activated) g.value.store", "if (false) g.value.store", "ops/test_gelu_mlp.py recomputation"
        ),
        Mutant(ADAMW, "sum += sum_over", "sum = sum_over", "optim/test_adamw.py norm_against_float64"),
    ],
    [
        Mutant(
            SKINNY,
            "from_bits(pair & uvec::all(0xffff0000u))",
            "from_bits(pair << 16)",
            "ops/test_linear.py few_rows_are and bfloat16 and 7-65-63",
        ),
        Mutant(SKINNY, "if (a_sums && first == 0)", "if (a_sums)", "ops/test_linear.py few_rows_are and float32"),
        Mutant(PACK, "all = all + run;", "all = run;", "ops/test_linear.py float64"),
        Mutant(
            "csrc/cpu/streaming.h",
            "source + i, size_t(bytes - i)",
            "source + i, 0",
            "ops/test_layernorm_residual.py no_cache_holds",
        ),
    ],
    [
        Mutant(
            GEMM,
            "left.padded() * (right.first(p) - (all_panels ? 0 : right.first(p0)))",
            "0",
            "ops/test_linear.py float64",
        ),
        Mutant(MASK, "+ 1, whole, at.keys)", "+ 2, whole, at.keys)", "ops/test_attention.py windows"),
        Mutant(
            TILE,
            "const bool add = accumulate || first > 0;",
            "const bool add = first > 0;",
            "ops/test_linear.py float64",
        ),
        Mutant(
            "csrc/cpu/peak.h",
            "return flops * double(threads * Shares);",
            "return flops * double(Shares);",
            "benchmarks/test_machine.py counted",
        ),
    ],
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_cpp_mutants(tmp_path):
    import pybind11

    python_headers = sysconfig.get_path(
        "include"
    )  # here, as sysconfig does not start up well in several threads at once

    def built(numbered):
        number, group = numbered
        folder = tmp_path / str(number)
        shutil.copytree(
            PACKAGE, folder / "fastlm", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__", "_cpu_*")
        )
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for mutant in group:
            mutate(folder, mutant)
        module = folder / "fastlm" / f"_cpu_baseline{EXTENSION_SUFFIXES[0]}"
        command = [
            os.environ.get("CXX", "g++"),
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            "-fopenmp",
            "-ffp-contract=fast",
            "-DFASTLM_MODULE=_cpu_baseline",
        ]
        includes = [f"-I{folder / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{python_headers}"]
        subprocess.run(
            [*command, *includes, str(folder / "csrc" / "bindings.cpp"), "-o", str(module)],
            check=True,
            capture_output=True,
            text=True,
        )
        return [survives(folder, mutant, FASTLM_TEST_BACKENDS="cpu", FASTLM_ISA="baseline") for mutant in group]

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        survivors = "\n".join(
            outcome for outcomes in pool.map(built, enumerate(CPP[SHARE::SHARES])) for outcome in outcomes if outcome
        )
    assert not survivors, survivors


# CUDA C++: the same, built for the emulator, which also has to notice a barrier that is gone

LAUNCHERS = "csrc/cuda"
TILES, NORM_CU, MMA, REDUCE = (
    f"{LAUNCHERS}/{name}" for name in ("attention_tile.cuh", "layernorm_residual.cu", "mma.cuh", "reduce.cuh")
)

CUDA = [
    [
        Mutant(
            f"{LAUNCHERS}/attention.cu",
            "norm[half] = norm[half] * decay + sum;",
            "norm[half] = norm[half] + sum;",
            "ops/test_attention.py float64",
        ),
        Mutant(f"{LAUNCHERS}/gelu_mlp.cu", "0.134145f", "0.044715f", "ops/test_gelu_mlp.py float64"),
        Mutant(NORM_CU, " - n[c][i] * correlation", "", "ops/test_layernorm_residual.py float64"),
        Mutant(
            f"{LAUNCHERS}/linear_cross_entropy.cu",
            " * factor - uniform;",
            " * factor;",
            "ops/test_linear_cross_entropy.py float64",
        ),
        Mutant(f"{LAUNCHERS}/philox.cuh", "k1 += 0xBB67AE85u", "k1 += 0xBB67AE84u", "ops/test_dropout.py definition"),
    ],
    [
        Mutant(
            TILES,
            "j - i >= s.lower && j - i <= s.upper;",
            "j - i >= s.lower && j - i < s.upper;",
            "ops/test_attention.py windows",
        ),
        Mutant(
            f"{LAUNCHERS}/gemm.cuh", "__syncthreads();  // this stage", "// this stage", "kernels/test_cuda_gemm.py"
        ),
        Mutant(
            NORM_CU,
            " + n] = values[n];\n    __syncthreads();",
            " + n] = values[n];",
            "kernels/test_cuda_layernorm_residual.py teams",
        ),
    ],
    [
        Mutant(
            f"{LAUNCHERS}/attention_backward.cu",
            "* (dscores[n][e] - delta[e / 2]);",
            "* dscores[n][e];",
            "ops/test_attention.py float64",
        ),
        Mutant(NORM_CU, " - average - n * correlation", " - average", "ops/test_layernorm_residual.py float64"),
        Mutant(
            f"{LAUNCHERS}/gemm.cuh",
            "          if (again) {",
            "          if (false) {",
            "kernels/test_cuda_gemm.py finite",
        ),
        Mutant(
            f"{LAUNCHERS}/attention_decode.cu",
            "sum += exp2_fast((top[piece] - base) * Log2e) * part[",
            "sum += part[",
            "kernels/test_paths.py stretches",
        ),
        Mutant(
            f"{LAUNCHERS}/linear_cross_entropy.cu",
            "target >= 0 && target < vocab",
            "target >= 0 && target <= vocab",
            "ops/test_linear_cross_entropy.py assert",
        ),
        Mutant(
            TILES,
            "int64_t(first + row) * view.token_stride",
            "int((first + row) * view.token_stride)",
            "ops/test_every_operator.py two_to_the_31",
        ),
    ],
    [
        Mutant(
            MMA,
            "emulation::ldmatrix(shared, 4, true, line)",
            "emulation::ldmatrix(shared, 4, false, line)",
            "ops/test_attention.py float64",
        ),
        Mutant(
            f"{LAUNCHERS}/attention_decode.cu",
            "whole += exp2_fast((top[piece] - base) * Log2e) * norm",
            "whole += norm",
            "kernels/test_paths.py stretches",
        ),
        Mutant(
            f"{LAUNCHERS}/vec.cuh",
            "emulation::load<vec, Bytes>(from)",
            "emulation::load<vec, Bytes>(from + N)",
            "ops/test_layernorm_residual.py float64",
        ),
    ],
    [
        Mutant(
            REDUCE,
            "mask > 0; mask /= 2) value += shuffle_xor",
            "mask > 1; mask /= 2) value += shuffle_xor",
            "ops/test_linear_cross_entropy.py float64",
        ),
        Mutant(
            MMA, "emulation::copy_async_wait(N)", "emulation::copy_async_wait(N + 1)", "kernels/test_paths.py stretches"
        ),
    ],
    [
        Mutant(
            MMA,
            "emulation::words{a[0], a[1], a[2], a[3]}, b[0], b[1],\n",
            "emulation::words{a[0], a[1], a[2], a[3]}, b[1], b[0],\n",
            "ops/test_attention.py float64 and bfloat16",
        ),
        Mutant(
            f"{LAUNCHERS}/gemm.cuh",
            "warp_row + lane % 16, half * 2 + lane / 16",
            "warp_row + lane % 8, half * 2 + lane / 16",
            "ops/test_gelu_mlp.py float64 and float32",
        ),
        Mutant(
            REDUCE,
            "shared[lane] : 0.0f);\n  __syncthreads();",
            "shared[lane] : 0.0f);",
            "kernels/test_cuda_gemm.py gradients_of_wide",
        ),
    ],
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the emulator is built by GCC on Linux")
def test_cuda_mutants(tmp_path):
    survivors = []
    for number, group in enumerate(CUDA[SHARE::SHARES]):
        folder = tmp_path / str(number)
        shutil.copytree(
            PACKAGE, folder / "fastlm", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__", "_cuda*")
        )
        for part in ("csrc", "tests/cuda_emulation"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for mutant in group:
            mutate(folder, mutant)
        build = [sys.executable, "-m", "tests.cuda_emulation"]
        done = subprocess.run(
            build, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        survivors += [
            survives(folder, mutant, FASTLM_TEST_BACKENDS="cuda", FASTLM_CUDA_EMULATION="1", FASTLM_TEST_EMULATED="1")
            for mutant in group
        ]
    assert not any(survivors), "\n".join(filter(None, survivors))


def test_every_file_of_kernels_has_a_mutant():
    """A new kernel needs its own."""
    on_triton = {Path(mutant.file).name for mutant in ON_TRITON}
    without = {
        "__init__.py",
        "launch.py",
        "interpreter.py",
        "configs.py",
        "sizes.py",
    }  # through which every kernel's tests run, on a GPU or not
    assert {path.name for path in (ROOT / "kernels").glob("*.py")} - without == on_triton
    mutated = {Path(mutant.file).name for group in CPP for mutant in group}
    # every kernel's tests run through these
    spared = {
        "simd.h",
        "simd_avx2.h",
        "simd_avx512.h",
        "simd_generic.h",
        "tiles_amx.h",
        "vmath.h",
        "threads.h",
        "cpu_features.cpp",
    }
    assert {path.name for path in (ROOT / "csrc" / "cpu").iterdir()} - spared == mutated
    mutated = {Path(mutant.file).name for group in CUDA for mutant in group}
    spared = {"launch.cuh", "device.cu"}  # through which every kernel's tests run, or which needs a GPU
    assert {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu*")} - spared == mutated
