"""The code blocks of README.md, CONTRIBUTING.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def commands(page: Path, word: str) -> list[str]:
    """The lines of a page's shell blocks that run a command, without environment variables and comments."""
    whole = (re.sub(r" *\\\n *", " ", block) for block in blocks(page, "sh", ""))
    lines = (line.split(" #")[0].strip() for block in whole for line in block.splitlines())
    stripped = (re.sub(r"^([A-Z_0-9]+=\S+ +)*", "", line) for line in lines)
    return sorted({line for line in stripped if line.split()[:1] == [word]})
