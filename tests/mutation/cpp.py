"""Mutations of C++ and CUDA sources, as expressions that are switched on at run time (mutant_switch.h).

Works on tokens and relies on clang-format: a binary operator has a space on both sides, a bracket of a template has
none. The places that are skipped, and why, stand in `propose`.
"""

import bisect
import re
from collections import Counter

from tests.mutation.mutation import Mutation

TOKEN = re.compile(
    r"""
    (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<directive>^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*)
  | (?P<string>(?:u8|[uUL])?R"(?P<delimiter>[^(\s]*)\(.*?\)(?P=delimiter)"
             | (?:u8|[uUL])?"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+')
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.']|)*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<punctuation><=>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>>|[<>=!+\-*/%&|^]=|&&|\|\||[^\s\w])
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
NAMESPACE = "::fastlm_mutation::"
# a < b becomes a < b + 1, which is a <= b for integers, and so on.
SHIFTS = {"<": 1, "<=": -1, ">": -1, ">=": 1, "==": 1, "!=": 1}
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Tokens:
    """The tokens of a source without comments and preprocessor lines."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [match.end() for match in re.finditer("\n", text)]
        self.kind: list[str] = []
        self.string: list[str] = []
        self.begin: list[int] = []
        self.end: list[int] = []
        self.conditional: list[bool] = []  # inside #if … #endif
        depth = 0
        for match in TOKEN.finditer(text):
            kind = match.lastgroup if match.lastgroup != "delimiter" else "string"
            if kind == "directive":
                word = match.group().strip(" \t#").split(None, 1)[0] if match.group().strip(" \t#") else ""
                depth += word.startswith("if")
                depth -= word == "endif"
            elif kind != "comment":
                self.kind.append(str(kind))
                self.string.append(match.group())
                self.begin.append(match.start())
                self.end.append(match.end())
                self.conditional.append(depth > 0)
        self.partner = self._partners()

    def _partners(self) -> dict[int, int]:
        partner, stack = {}, []
        for i, s in enumerate(self.string):
            if self.kind[i] != "punctuation":
                continue
            if s in CLOSING:
                stack.append(i)
            elif stack and s == CLOSING[self.string[stack[-1]]]:
                opening = stack.pop()
                partner[opening], partner[i] = i, opening
        return partner

    def line(self, i: int) -> int:
        return bisect.bisect_right(self.lines, self.begin[i]) + 1

    def statement(self, i: int) -> str:
        """The statement around a token, as far as the braces around it, on one line."""
        around = [j for j in range(max(0, i - 60), i) if self.string[j] == "for" and self.partner.get(j + 1, 0) > i]
        if around:  # in the header of a loop: the header and the statement that begins its body
            first, i = around[-1], self.partner[around[-1] + 1]
        else:
            first = next((j + 1 for j in range(i - 1, -1, -1) if self.string[j] in (";", "{", "}")), 0)
        last = next((j for j in range(i, len(self.string)) if self.string[j] in (";", "{")), i)
        return " ".join(self.text[self.begin[first] : self.end[last]].split())

    def spaced(self, i: int) -> bool:
        """A binary operator, as clang-format writes it."""
        return self.text[self.begin[i] - 1].isspace() and self.text[self.end[i] : self.end[i] + 1].isspace()


def functions(tokens: Tokens) -> list[tuple[str, int, int]]:
    """(name, first token of the body, its last) of every function that is no part of another."""
    found, i, start = [], 0, 0
    string = tokens.string
    while i < len(string):
        if string[i] in (";", "}"):
            start = i + 1
        elif string[i] == "(" and i in tokens.partner:
            i = tokens.partner[i]
        elif string[i] == "{":
            head = string[start:i]
            names = [
                j
                for j in range(start, i)
                if string[j] == "("
                and tokens.kind[j - 1] == "name"
                and string[j - 1] not in ("alignas", "__launch_bounds__", "__attribute__", "requires", "decltype")
                and not any(j > k and j < tokens.partner.get(k, k) for k in range(start, j) if string[k] == "(")
            ]
            is_type = any(word in head for word in ("struct", "class", "enum", "union")) and not names
            if "namespace" in head or is_type or (head[:1] == ["extern"] and len(head) == 2):
                start = i + 1
            elif names and i in tokens.partner:
                found.append((string[names[0] - 1], i, tokens.partner[i]))
                i = start = tokens.partner[i]
                start += 1
            elif i in tokens.partner:
                i = tokens.partner[i]
        i += 1
    return found


def propose(file: str, text: str) -> list[Mutation]:
    tokens = Tokens(text)
    string, kind, partner = tokens.string, tokens.kind, tokens.partner
    out: list[Mutation] = []
    for place, (name, first, last) in enumerate(functions(tokens)):
        count: Counter[str] = Counter()

        def add(what, at, *edits, count=count, name=name, place=place):
            out.append(
                Mutation(file, name, place, what, count[what], tokens.line(at), tokens.statement(at), tuple(edits))
            )
            count[what] += 1

        skipped_until = first
        for i in range(first + 1, last):
            if i <= skipped_until:
                continue
            s = string[i]
            if tokens.conditional[i]:  # other instruction sets' or the GPU's own: this build does not compile them
                continue
            if s in ("throw", "static_assert", "using", "case", "asm", "goto"):  # messages and declarations
                skipped_until = next(j for j in range(i, last + 1) if string[j] in (";", ":", "}"))
            elif s == "constexpr" and string[i - 1] != "if":  # tile sizes: results do not depend on them
                skipped_until = next(j for j in range(i, last + 1) if string[j] == ";")
            elif s == "constexpr" and string[i + 1] == "(":
                skipped_until = partner[i + 1]
            elif s == "while" and string[i + 1] == "(":  # could run forever
                skipped_until = partner[i + 1]
            elif s == "for" and string[i + 1] == "(":
                close = partner[i + 1]
                semicolons = [j for j in range(i + 2, close) if string[j] == ";"]
                if len(semicolons) != 2:
                    continue
                steps = string[semicolons[1] + 1 : close]
                bound = [j for j in range(semicolons[0], semicolons[1]) if string[j] in SHIFTS and tokens.spaced(j)]
                counted = len(bound) == 1 and steps == ["++", string[bound[0] - 1]]
                if counted and string[bound[0]] in ("<", "<="):  # it loses its last iteration
                    add("shift edge", bound[0], insertion(tokens, bound[0] + 1, f"{NAMESPACE}edge(@ID@, -1) + "))
                skipped_until = close  # its start and its step could make it endless
            elif s == "if" and string[i + 1] == "(":
                condition = string[i + 2 : partner[i + 1]]
                if ";" not in condition and "=" not in condition:
                    add(
                        "negate condition",
                        i,
                        insertion(tokens, i + 2, f"{NAMESPACE}active(@ID@) != bool("),
                        (tokens.begin[partner[i + 1]], tokens.begin[partner[i + 1]], ")"),
                    )
            elif kind[i] == "punctuation" and s in SHIFTS and tokens.spaced(i):
                # Two ways to one result: a size of one in the general path, a threshold (a constant, in capitals), the
                # larger one of two equals (a < b ? b : a).
                same = (s in (">", "<=") and string[i + 1] == "1") or string[i + 1][0].isupper()
                same |= string[i + 2] == "?" and {string[i + 3], string[i + 5]} == {string[i - 1], string[i + 1]}
                if string[i + 1] != "nullptr" and string[i - 1] != "operator" and not same:
                    add("flip comparison", i, insertion(tokens, i + 1, f"{NAMESPACE}edge(@ID@, {SHIFTS[s]}) + "))
            elif s in ("+", "-") and tokens.spaced(i) and "string" not in (kind[i - 1], kind[i + 1]):
                add("drop term", i, insertion(tokens, i + 1, f"{NAMESPACE}term(@ID@) * "))
            elif s in ("+=", "-=") and tokens.spaced(i) and kind[i + 1] != "string":
                end = end_of_expression(tokens, i + 1)
                add(
                    "drop term",
                    i,
                    insertion(tokens, i + 1, f"{NAMESPACE}term(@ID@) * ("),
                    (tokens.begin[end], tokens.begin[end], ")"),
                )
            elif s in ("min", "max") and string[i + 1] == "(" and string[i + 2] != "{":
                other = {"min": "max", "max": "min"}[s]
                scope = "std::" if string[i - 1] == "::" and string[i - 2] == "std" else ""
                if string[i + 2][0].isupper():  # the tail of a block: what lies beyond it is padding and never stored
                    continue
                if string[i - 1] in (".", "->") or (string[i - 1] == "::" and not scope):
                    continue
                begin = tokens.begin[i - 2] if scope else tokens.begin[i]
                calls = [f"[](auto... x) {{ return {scope}{f}(x...); }}" for f in (s, other)]
                add("swap min/max", i, (begin, tokens.end[i + 1], f"{NAMESPACE}either(@ID@, {', '.join(calls)}, "))
    return out


def insertion(tokens: Tokens, i: int, text: str) -> tuple[int, int, str]:
    return (tokens.begin[i], tokens.begin[i], text)


def end_of_expression(tokens: Tokens, i: int) -> int:
    """The token after the expression that begins at token i."""
    while tokens.string[i] not in (";", ",", ")", "}", "]"):
        i = tokens.partner.get(i, i) + 1 if tokens.string[i] in CLOSING else i + 1
    return i
