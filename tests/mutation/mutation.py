"""One change to the source, and the fixed order in which a sample of all changes is drawn."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Mutation:
    file: str  # path relative to the root of the repository
    function: str  # name of the enclosing function, for reports and rules
    place: int  # ordinal of the function in its file
    kind: str  # "drop term", "shift edge", "flip comparison", "swap min/max", "negate condition" or "by hand"
    ordinal: int  # ordinal of this mutation among those of its kind in the function
    line: int  # for reports
    statement: str  # the line as it stands, for reports and rules
    edits: tuple[tuple[int, int, str], ...]  # (begin, end, text) in the original source

    @property
    def key(self) -> str:
        """Independent of identifiers and line numbers, so that a rename leaves the sample as it is."""
        return f"{self.file.rpartition('/')[2]}:{self.place}:{self.kind}:{self.ordinal}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function}): {self.kind}: {self.statement.strip()}"


def in_order(mutations: list[Mutation]) -> list[Mutation]:
    """Shuffled by the hash of each key: the first n are the sample of n."""
    return sorted(mutations, key=lambda m: hashlib.sha256(m.key.encode()).digest())


def sample(mutations: list[Mutation], per_file: int) -> list[Mutation]:
    """The first `per_file` mutations of each file. Kinds take turns, so that each is represented."""
    chosen: list[Mutation] = []
    for file in sorted({m.file for m in mutations}):
        of_file = in_order([m for m in mutations if m.file == file])
        seen: dict[str, int] = {}
        ranked = []
        for m in of_file:
            seen[m.kind] = seen.get(m.kind, 0) + 1
            ranked.append((seen[m.kind], m))
        ranked.sort(key=lambda pair: pair[0])
        chosen += [m for _, m in ranked[:per_file]]
    return chosen


def apply(text: str, edits: list[tuple[int, int, str]]) -> str:
    """The text with all edits made, in which insertions may nest: at one position those that close come first."""
    out, at = [], 0
    for begin, end, replacement in sorted(edits, key=lambda e: (e[0], not e[2].startswith(")"), e[1])):
        assert begin >= at, f"edits overlap at {begin}: {replacement}"
        out += [text[at:begin], replacement]
        at = end
    return "".join([*out, text[at:]])
