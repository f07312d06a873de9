"""Writes measured rows of the selection table: to the user's own table, or as an entry of measured.py."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from fastlm.backends import selection, table
from fastlm.backends.rule import Rule

LINE_LENGTH = 120


def write(path: pathlib.Path, text: str) -> None:
    """Atomically: a reader finds the old file or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def as_json(tables: Mapping[str, Sequence[Rule]]) -> str:
    """{CPU or GPU: rows}, the format of the user's table."""
    rows = {model: [dataclasses.asdict(rule) for rule in found] for model, found in tables.items()}
    return json.dumps(rows, indent=1) + "\n"


def as_python(model: str, found: Sequence[Rule], comment: str) -> str:
    """An entry of fastlm/backends/measured.py."""

    def line(rule: Rule) -> str:
        where = ", ".join(f"{json.dumps(name)}: ({low}, {high})" for name, (low, high) in rule.where.items())
        operator, dtype, first = (json.dumps(text) for text in (rule.operator, rule.dtype, rule.first))
        arguments = operator, dtype, f"{{{where}}}", first
        one_line = f"        Rule({', '.join(arguments)}),\n"
        if len(one_line) <= LINE_LENGTH:
            return one_line
        lines = "".join(f"            {argument},\n" for argument in arguments)
        return f"        Rule(\n{lines}        ),\n"

    name = json.dumps(model, ensure_ascii=False)
    rows = f"(\n{''.join(map(line, found))}    )" if found else "()"
    return f"    # {comment}\n    {name}: {rows},\n"


def save(tables: Mapping[str, Sequence[Rule]]) -> None:
    """Adds the rows to the user's table. They take effect in this process, too."""
    path = table.user_table()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    kept |= json.loads(as_json(tables))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(kept, indent=1) + "\n")
    table.forget()
    selection.forget()
