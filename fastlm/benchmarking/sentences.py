"""Real sentences of mixed length that every machine has: the prose of Python's language reference."""

import random
import re
from pydoc_data.topics import topics

NOT_PROSE = re.compile(r"^(?: {3,}|[*=+|-])", re.MULTILINE)  # code, grammar, lists, headings
END = re.compile(r"(?<=[.?!]) (?=[A-Z])")
SENTENCE = re.compile(r"[A-Z].{,198}[.?!]")  # longer ones are rare, and would make most of every batch padding


def sentences(number: int, seed: int = 0) -> list[str]:
    """Distinct sentences in a random order."""
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if not NOT_PROSE.search(paragraph):
                found |= dict.fromkeys(filter(SENTENCE.fullmatch, END.split(" ".join(paragraph.split()))))
    return random.Random(seed).sample(list(found), number)
