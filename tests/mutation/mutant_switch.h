// Run-time switches for the mutants of one build. All mutants of a module are compiled into it once; fastlm_mutant
// selects the one that is active (0: none). fastlm_mutants_reached records which of them a test executed: 1, or 2 where
// the mutation has no meaning for the type at hand. tests/mutation/plugin.py reads and writes both by ctypes.
#pragma once
#include <type_traits>

extern "C" {
__attribute__((weak, used, visibility("default"))) int fastlm_mutant = 0;
__attribute__((weak, used, visibility("default"))) unsigned char fastlm_mutants_reached[16384] = {};
}

namespace fastlm_mutation {

// Not instrumented: for the CUDA emulator these are no accesses of a GPU thread.
__attribute__((noinline, no_sanitize("thread"))) inline bool switched(int id, unsigned char mark) {
  fastlm_mutants_reached[id] = mark;
  return fastlm_mutant == id;
}

// Constant expressions (tile sizes, array bounds, template arguments) are never mutated.
constexpr bool active(int id) {
  if (std::is_constant_evaluated()) return false;
  return switched(id, 1);
}

constexpr void not_applicable(int id) {
  if (!std::is_constant_evaluated()) switched(id, 2);
}

// term(id) * x is x, or zero where the mutant is active: the sum that x is a term of loses it.
struct term {
  int id;
  constexpr explicit term(int number) : id(number) {}
};

template <class T> constexpr T operator*(term t, T x) {
  if (!active(t.id)) return x;
  if constexpr (requires { T::zero(); }) return T::zero();
  else return T{};
}

// edge(id, by) + x is x, or x + by where the mutant is active. a < edge(id, 1) + b is a ≤ b for integers.
struct edge {
  int id, by;
  constexpr edge(int number, int distance) : id(number), by(distance) {}
};

template <class T> constexpr T operator+(edge e, T x) {
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    return active(e.id) ? T(x + T(e.by)) : x;
  } else {
    not_applicable(e.id);
    return x;
  }
}

// Calls the other of two functions where the mutant is active.
template <class F, class G, class... Arguments> constexpr auto either(int id, F f, G g, Arguments... arguments) {
  return active(id) ? g(arguments...) : f(arguments...);
}

}  // namespace fastlm_mutation
