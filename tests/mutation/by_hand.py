"""Mutants that matter and that the generator does not make: a factor of a product that is gone, another constant, an
edge that is shifted in several places.

Each is a pattern of tokens, in which $name stands for a name, a number or a member such as m.upper, with the indices
and calls behind it; a name that occurs twice is the same text. So neither formatting nor a rename breaks it. A pattern
is an expression (in Python any tokens), or has one between two @, which alone is replaced then; all of its matches in
the files are replaced at once.
"""

import dataclasses
import io
import tokenize
from pathlib import Path

from tests.mutation import cpp
from tests.mutation.mutation import Mutation


@dataclasses.dataclass(frozen=True)
class ByHand:
    files: str  # a glob from the root of the repository
    pattern: str
    replacement: str


CPU = [
    # the upper edge of the mask
    ByHand(
        "csrc/cpu/attention*.h",
        "$diagonal - std::min($upper, $diagonal + 1)",
        "$diagonal - std::min($upper + 1, $diagonal + 1)",
    ),
    # dropout: the scale of what is kept, and a key of Philox
    ByHand(
        "csrc/cpu/*.h",
        "select($words >= uvec::all($threshold), vec::all($scale), vec::zero())",
        "select($words >= uvec::all($threshold), vec::all(1.0f), vec::zero())",
    ),
    ByHand("csrc/cpu/philox.h", "0xBB67AE85u", "0xBB67AE84u"),
    # the online softmax rescales what it has when the maximum grows
    ByHand(
        "csrc/cpu/attention.h",
        "vec::load($acc + $d * $width + $i, full{}) * $factor",
        "vec::load($acc + $d * $width + $i, full{})",
    ),
    # where a packed sequence ends, but for the first
    ByHand("csrc/cpu/sequences.h", "$starts[$index + 1] - $first", "$starts[$index + 1] - $first - ($first > 0)"),
    # the variance divides by all elements
    ByHand(
        "csrc/cpu/layernorm_residual.h",
        "$squares / float($width) + $eps",
        "$squares / float($width - ($width > 1)) + $eps",
    ),
    # the slope of GELU, and the gradient of the gate without the other factor
    ByHand("csrc/cpu/gelu_mlp.h", "($value * $slope).store($out + $at, $span)", "$value.store($out + $at, $span)"),
    ByHand("csrc/cpu/glu_mlp.h", "$value * $up * $slope", "$value * $slope"),
    # the slope of the cap of scores, the gradient of an entropy
    ByHand("csrc/cpu/attention_backward.h", "$d * vec::load($slopes + $i, full{})", "$d"),
    ByHand("csrc/cpu/linear_log_prob.h", "$p * fma($of_entropy, $d, $constant)", "$p * $constant"),
    # AdamW: bias correction
    ByHand("csrc/cpu/adamw.h", "-std::expm1($t * $log_beta)", "-std::expm1(($t + 1) * $log_beta)"),
]

CUDA = [
    ByHand("csrc/cuda/attention.cu", "$sum = $sum * $decay + $part", "$sum = $sum + $part"),
    ByHand("csrc/cuda/philox.cuh", "0xBB67AE85u", "0xBB67AE84u"),
    # a barrier that is gone: the emulator notices the race
    ByHand("csrc/cuda/gemm.cuh", "__syncthreads()", "void()"),
]

TRITON = [
    ByHand("kernels/attention.py", "$sum * $decay + tl.sum($weights, 1)", "$sum + tl.sum($weights, 1)"),
    # the upper edge of the mask, in every place
    ByHand("kernels/attention*.py", "tl.minimum($i + $upper + 1, $len)", "tl.minimum($i + $upper, $len)"),
]

# Generated mutations that run with those by hand: the key, and the source from where the mutation begins. A key counts
# the mutations of its kind in a function, so it stands for another one if the function changes before it.
PICKED = {
    "adamw.h:4:drop term:3": "h.lr * h.weight_decay",  # the decoupled weight decay
    "attention_backward.h:3:drop term:15": "d[v]",  # the gradient of the softmax
    "attention_mask.h:9:flip comparison:8": "vec::all(last)",  # the lower edge of the mask
    "linear_cross_entropy.h:0:drop term:19": "share",  # the target and label smoothing
    "linear_cross_entropy.h:0:flip comparison:2": "ce.ignore_index",
    "residual_norm.h:4:drop term:1": "part * stride",  # the partial sums of all parts
    "rms_norm_residual.h:3:drop term:18": "n * share",  # the gradient of the root mean square
    "sequences.h:3:drop term:4": "queries",  # alignment at the last query and key
}

PYTHON = [
    # alignment at the bottom right
    ByHand("fastlm/ops/attention/api.py", "$offset if causal", "0 if causal"),
    ByHand("fastlm/ops/layernorm_residual/torch.py", "$ds.add_($dsummed)", "$ds"),
]


def matches(strings: list[str], names: list[bool], pattern: list[str]) -> list[tuple[list[int], dict[str, str]]]:
    """(where each token of the pattern begins, and where the last one ends; what each $name stands for) of every match
    that overlaps no earlier one.
    """
    found, at = [], 0
    while at < len(strings):
        hit = match(strings, names, at, pattern, 0, {})
        if hit is None or not whole(strings, at, hit[0][-1], pattern):
            at += 1
        else:
            found.append(hit)
            at = hit[0][-1]
    return found


def whole(strings: list[str], begin: int, end: int, pattern: list[str]) -> bool:
    """Whether the match is an operand of its own, and not torn out of a product or a longer difference."""
    sums = bool({"+", "-"} & set(pattern))
    before = {"*", "/", "%", "-"} if sums and pattern[0] not in ("-", "*") else set()
    after = ({"*", "/", "%"} if sums else set()) | (
        {"(", "[", ".", "->", "::"} if pattern[-1].startswith("$") else set()
    )
    return strings[begin - 1] not in before | {".", "->", "::"} and strings[end] not in after


def match(strings, names, at, pattern, i, bound):
    if i == len(pattern):
        return [at], bound
    if at >= len(strings):
        return None
    name = pattern[i]
    if not name.startswith("$"):
        ends = [at + 1] if strings[at] == name else []
    else:
        ends = operands(strings, names, at)[::-1]  # the longest first
    for end in ends:
        text = " ".join(strings[at:end])
        if name.startswith("$") and bound.get(name, text) != text:
            continue
        rest = match(strings, names, end, pattern, i + 1, bound | {name: text})
        if rest is not None:
            return [at, *rest[0]], rest[1]
    return None


def operands(strings, names, at) -> list[int]:
    """Where an operand that begins at a token can end: a name or number, and its members, indices and calls."""
    if not names[at]:
        return []
    ends = [at + 1]
    while ends[-1] < len(strings):
        end = ends[-1]
        if strings[end] in (".", "->", "::") and end + 1 < len(strings) and names[end + 1]:
            ends.append(end + 2)
        elif strings[end] in ("(", "[", "{"):
            depth, last = 0, end
            while last < len(strings):
                depth += strings[last] in ("(", "[", "{")
                depth -= strings[last] in (")", "]", "}")
                last += 1
                if depth == 0:
                    break
            ends.append(last)
        else:
            break
    return ends


def pattern_tokens(pattern: str) -> list[str]:
    tokens = cpp.Tokens(pattern.replace("$", " _wild_"))
    return [s.replace("_wild_", "$") for s in tokens.string]


def found(root: Path, wanted: ByHand, ordinal: int) -> list[Mutation]:
    """The mutation of a pattern, in each file that has it; there must be one."""
    per_file = []
    for path in sorted(root.glob(wanted.files)):
        text = path.read_text()
        if path.suffix == ".py":
            strings, names, spans = python_tokens(text)
        else:
            tokens = cpp.Tokens(text)
            strings, names = tokens.string, [k in ("name", "number") for k in tokens.kind]
            spans = list(zip(tokens.begin, tokens.end, strict=True))
        edits = []
        pattern = pattern_tokens(wanted.pattern)
        marks = [i - n for n, i in enumerate(j for j, s in enumerate(pattern) if s == "@")]
        pattern = [s for s in pattern if s != "@"]
        hits = matches(strings, names, pattern)
        for places, bound in hits:
            first, end = places[marks[0] if marks else 0], places[marks[1] if marks else -1]
            new = " ".join(bound.get(s, s) for s in pattern_tokens(wanted.replacement))
            begin, stop = spans[first][0], spans[end - 1][1]
            if path.suffix == ".py":
                edits.append((begin, stop, new))
            else:
                edits += [(begin, begin, f"({cpp.NAMESPACE}active(@ID@) ? ({new}) : ("), (stop, stop, "))")]
        if hits:
            line = text.count("\n", 0, spans[hits[0][0][0]][0]) + 1
            statement = text.splitlines()[line - 1].strip()
            file = str(path.relative_to(root))
            per_file.append(Mutation(file, "", -1, "by hand", ordinal, line, statement, tuple(edits)))
    assert per_file, f"nothing in {wanted.files} matches: {wanted.pattern}"
    return per_file


def python_tokens(text: str):
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    strings, names, spans = [], [], []
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            strings.append(token.string)
            names.append(token.type in (tokenize.NAME, tokenize.NUMBER))
            spans.append((starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]))
    return strings, names, spans
