"""Mutations that change nothing a test of results can see, by rule and reason.

A rule names what such code is about in the project's own vocabulary, never a line. It covers a mutation if its pattern
is found in the path, the function or the statement.
"""

import re

from tests.mutation.mutation import Mutation

FILES = {
    r"/simd|/vmath|/intrinsics\.cuh|/vec\.cuh": "instructions, on which every test of an operator runs",
    r"amx|/gemm_small_lanes\.h": "instructions that are not those of the mutants",
    r"/peak\.h|cpu_features|device\.": "measures or describes the machine, and computes nothing",
    r"/launch\.(cuh|py)|/plan\.py|/copies\.py|/interpreter\.py": "launches",
    r"/configs\.py|/sizes\.py|/__init__\.py": "the sizes of tiles",
    r"/threads\.h|/streaming\.h": "which thread computes a part, and how results reach memory",
    r"/spec\.py|/gpu\.py|/(sdpa|varlen|packed)\.py": "FLOPs, bytes and errors, compared by test_every_operator.py",
}
STATEMENTS = {
    r"prefetch|stream|past_cache|cache": "prefetches and the way around the caches change the speed only",
    r"parts?_for|touched|_parts?\b|longest_first|\bwork\b|parallel|\bshared\b|\(end - begin\)": "threads share work so",
    r"blocking|\bblocks?\b|_blocks\b": "how a product is cut into blocks",
    r"\bchunk\b": "how many rows of logits exist at a time",
    r": nullptr;": "a bound of what is read, for the sanitizers",
    r"launch": "how kernels are launched",
    r"is_cuda": "on a GPU only, where no mutant runs",
    r"in_lanes": "only with a fused multiply-add, which the instruction set of the mutants lacks",
    r"max_of_splits = ": "the maximum only keeps exponentials in range",
    r"^active$": "dropout of nothing, where none is",
    r"scratch|make_buffer|padded|reserve|resize|aligned|alloc": "the size and the layout of working memory",
    r"\bif constexpr\b|FASTLM_ASSERT|check\(|Unsupported|mismatch|refuse": "no part of a result",
}


def of_file(file: str) -> str:
    return next((why for pattern, why in FILES.items() if re.search(pattern, file)), "")


def reason(mutation: Mutation) -> str:
    """Why the mutation is not expected to be noticed, or ""."""
    texts = (mutation.statement, mutation.function)
    of_code = (why for pattern, why in STATEMENTS.items() if any(re.search(pattern, text) for text in texts))
    return of_file(mutation.file) or next(of_code, "")
