"""The generator of mutants: where it makes which, and that a compiled one changes what it says."""

import ast
import ctypes
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutation import build, by_hand, cpp, python_source, run
from tests.mutation.mutation import apply, in_order, sample

CPP = """\
#pragma once
#define TWICE(x) ((x) + (x))
namespace n {
struct pair { int first = 1 + 2; };
// a + b < c
template <class T, int N = 1 + 1> T clipped(const T* x, T low, T high) {
  static_assert(N < 3);
  constexpr int Tile = 4 + N;
  T sum = 0;
  for (int i = 0; i < N; ++i) sum += x[i];
  for (int i = 0; i < N; i += 2) sum = sum - x[i];
  while (sum > high) sum -= high;
  if (sum < low) throw std::runtime_error("sum " + std::to_string(sum + 1));
#ifdef __AVX512F__
  sum = sum + 1;
#endif
  return std::min(sum + low, high);
}
}  // namespace n
"""


def test_cpp_where_and_what():
    mutations = cpp.propose("f.h", CPP)
    assert {(m.function, m.line, m.kind) for m in mutations} == {
        ("clipped", 10, "shift edge"),
        ("clipped", 10, "drop term"),
        ("clipped", 11, "drop term"),
        ("clipped", 12, "drop term"),
        ("clipped", 13, "negate condition"),
        ("clipped", 13, "flip comparison"),
        ("clipped", 17, "drop term"),
        ("clipped", 17, "swap min/max"),
    }
    assert len({m.key for m in mutations}) == len(mutations) == 8


def test_cpp_functions():
    names = [
        name
        for name, _, _ in cpp.functions(cpp.Tokens(CPP + "struct s { int f() const { return 1; } s() : a{1} {} };"))
    ]
    assert names == ["clipped", "f", "s"]


PROGRAM = """\
extern "C" int drop(int a, int b, int c) { return a - b + c * 2; }
extern "C" int below(int a, int b) { return a < b ? 1 : 0; }
extern "C" int last(int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += i + 1;
  return sum;
}
extern "C" int smaller(int a, int b) {
  if (a == 7) return 0;
  return std::min(a, b);
}
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++, on Linux")
def test_cpp_mutants_compile_and_compute_something_else(tmp_path):
    mutations = cpp.propose("p.cpp", PROGRAM)
    numbered = dict(enumerate(mutations, 1))
    edits = [(b, e, t.replace("@ID@", str(n))) for n, m in numbered.items() for b, e, t in m.edits]
    source = tmp_path / "p.cpp"
    source.write_text(f'#include <algorithm>\n#include "{build.HEADER}"\n{apply(PROGRAM, edits)}')
    library = tmp_path / "p.so"
    subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Werror", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    switch = ctypes.c_int.in_dll(loaded, "fastlm_mutant")
    reached = (ctypes.c_ubyte * build.LIMIT).in_dll(loaded, "fastlm_mutants_reached")

    def results():
        return loaded.drop(5, 3, 4), loaded.below(2, 2), loaded.last(3), loaded.smaller(1, 2), loaded.smaller(7, 9)

    assert results() == (10, 0, 6, 1, 0)
    assert [n for n, mark in enumerate(bytes(reached)) if mark] == list(numbered)
    by_kind = {}
    for number, m in numbered.items():
        switch.value = number
        by_kind.setdefault(m.kind, []).append(results())
    switch.value = 0
    assert by_kind == {
        "drop term": [(13, 0, 6, 1, 0), (2, 0, 6, 1, 0), (10, 0, 0, 1, 0), (10, 0, 3, 1, 0)],
        "flip comparison": [(10, 1, 6, 1, 0), (10, 0, 6, 1, 7)],
        "shift edge": [(10, 0, 3, 1, 0)],
        "negate condition": [(10, 0, 6, 0, 7)],
        "swap min/max": [(10, 0, 6, 2, 0)],
    }


PYTHON = '''\
import math
SIZE = 4 + 4

def window(x, n, *, offset=1 + 1):
    """a + b < c"""
    if n < 0:
        raise ValueError(f"n: expected {n + 1} > 0")
    total = "é", x - n + 1
    for i in range(n):
        total += i
    return max(total, n) if n == 3 else "a" + "b"
'''


def test_python_where_and_what():
    mutations = python_source.propose("f.py", PYTHON)
    changed = []
    for m in mutations:
        new = python_source.mutated(PYTHON, m)
        ast.parse(new)
        lines = zip(PYTHON.split("\n"), new.split("\n"), strict=True)
        [(line, now)] = [(number, after) for number, (before, after) in enumerate(lines, 1) if before != after]
        changed.append((line, m.kind, now.strip()))
        assert m.line == line and m.function == "window"
    assert sorted(changed) == [
        (6, "flip comparison", "if n <= 0:"),
        (6, "negate condition", "if (not (n < 0)):"),
        (8, "drop term", 'total = "é", x + 1'),
        (8, "drop term", 'total = "é", x - n'),
        (9, "shift edge", "for i in range((n) - 1):"),
        (10, "drop term", "pass"),
        (11, "flip comparison", 'return max(total, n) if n != 3 else "a" + "b"'),
        (11, "negate condition", 'return max(total, n) if (not (n == 3)) else "a" + "b"'),
        (11, "swap min/max", 'return min(total, n) if n == 3 else "a" + "b"'),
    ]


@pytest.mark.parametrize("kind", ["triton", "python"])
def test_every_mutant_of_python_is_python(kind):
    for m in sample(run.proposed(kind), 10):
        ast.parse(python_source.mutated((run.ROOT / m.file).read_text(), m))


def test_the_sample_is_fixed_and_balanced():
    mutations = cpp.propose("f.h", CPP)
    drawn = sample(mutations, 4)
    assert drawn == sample(in_order(mutations)[::-1], 4)
    assert Counter(m.kind for m in drawn) == Counter(
        {"drop term", "flip comparison", "shift edge", "swap min/max", "negate condition"} & {m.kind for m in drawn}
    )


def test_patterns():
    tokens = cpp.Tokens("f(a, x.y [i+1] * g(2), a); f(a, b * c, d); total = total * s + w * v;")
    names = [kind in ("name", "number") for kind in tokens.kind]

    def hits(pattern):
        tokenized = by_hand.pattern_tokens(pattern)
        return [" ".join(tokens.string[p[0] : p[-1]]) for p, _ in by_hand.matches(tokens.string, names, tokenized)]

    assert hits("f($a, $x * $g, $a)") == ["f ( a , x . y [ i + 1 ] * g ( 2 ) , a )"]
    assert hits("f($a, $x * $g, $b)") == ["f ( a , x . y [ i + 1 ] * g ( 2 ) , a )", "f ( a , b * c , d )"]
    assert hits("$t = $t * $s + $w") == []  # which would tear w * v apart
    assert hits("$t = $t * $s + $w * $v") == ["total = total * s + w * v"]
