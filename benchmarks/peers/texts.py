"""Real texts that every machine has, in three length profiles: Python's language reference."""

import random
import re
from pydoc_data.topics import topics

from fastlm.integrations.bench import sentences


def queries(number: int) -> list[str]:
    """Short sentences, of up to 80 characters."""
    return [text for text in sentences(600) if len(text) <= 80][:number]


def passages(number: int) -> list[str]:
    """Paragraphs of 200 characters or more."""
    found = {" ".join(text.split()) for name in topics for text in re.split(r"\n\s*\n", topics[name])}
    return chosen({text for text in found if len(text) >= 200}, number)


def documents(number: int) -> list[str]:
    """Whole sections of 2000 characters or more."""
    return chosen({text for text in topics.values() if len(text) >= 2000}, number)


def pairs(number: int) -> list[str]:
    """Passages, each to be paired with QUERY."""
    return passages(number)


def chosen(texts: set[str], number: int) -> list[str]:
    return random.Random(0).sample(sorted(texts), min(number, len(texts)))


PROFILES = {"queries": (queries, 128), "passages": (passages, 64), "documents": (documents, 24)}
PAIRS = {"pairs": (pairs, 100)}
QUERY = "how is an exception that occurs in a finally clause handled"
