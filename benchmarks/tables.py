"""Tables of the documentation from docs/results/tables: figures of earlier runs, with what produced them.

`python -m benchmarks.tables` writes a Markdown file beside each JSON file, and summary.md. A page shows a table by
--8<-- "results/tables/NAME.md:TABLE". A JSON file has

- "machine", as the summary names it, and "page", its page in docs/performance;
- "tables": by name, each with the "date" and the "commit" in which its figures were recorded, the "commands" that
  measured them, "columns" (title → one of FORMATS), "rows", with null where nothing was measured, and maybe a "note";
- "summary": the rows of the summary, each {"model", "from": [[table, index of a row], …]}. It takes the columns of
  SUMMARY from these rows.

`fastlm bench --json` records more: such files are docs/results/*.json, whose tables `fastlm bench --from` writes.
"""

import json
from pathlib import Path
from typing import Any

from fastlm.benchmarking.report import grid

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "tables"
FORMATS = {
    "text": "{}",  # or any value
    "code": "`{}`",
    "speedup": "{:.2f} [{:.2f}–{:.2f}]",  # median and quartiles
    "ratio": "{:.2f}",
    "percent": "{:.0%}",
    "permille": "{:.1%}",
    "tenths": "{:,.1f}",
    "loss": "{:.4f}",
    "range": "{}–{}",
    "share": "{} of {}",
}
# Medians, where the tables have speedups.
SUMMARY = {"dtype": "text", "eager": "ratio", "eager tuned": "ratio", "compiled tuned": "ratio", "memory": "ratio"}

Table = dict[str, Any]


def cell(kind: str, value: Any) -> str:
    if value is None:
        return "–"
    return FORMATS[kind].format(*value) if isinstance(value, list) else FORMATS[kind].format(value)


def formatted(columns: dict[str, str], rows: list[list[Any]]) -> list[str]:
    cells = ([cell(kind, value) for kind, value in zip(columns.values(), row, strict=True)] for row in rows)
    return grid([*columns], cells)


def section(name: str, table: Table) -> list[str]:
    """A table that a page includes by its name."""
    origin = f"Recorded on {table['date']}, commit {table['commit']}."
    return [
        f"<!-- --8<-- [start:{name}] -->",
        *["```", *table["commands"], "```", ""],
        *formatted(table["columns"], table["rows"]),
        *["", f"{table['note']} {origin}" if "note" in table else origin, ""],
        f"<!-- --8<-- [end:{name}] -->",
        "",
    ]


def markdown(stored: dict[str, Any]) -> str:
    return "\n".join(line for name, table in stored["tables"].items() for line in section(name, table))


def summary(files: list[dict[str, Any]]) -> str:
    """Whole training steps on every machine."""
    columns = {"CPU": "text", "model": "text", **SUMMARY}
    rows = []
    for stored in files:
        cpu = f"[{stored['machine']}]({stored['page']})"
        for wanted in stored.get("summary", []):
            found: dict[str, Any] = {}
            for name, index in wanted["from"]:
                table = stored["tables"][name]
                found |= dict(zip(table["columns"], table["rows"][index], strict=True))
            values = [found.get(name) for name in SUMMARY]
            medians = [value[0] if isinstance(value, list) else value for value in values]
            rows.append([cpu, wanted["model"], *medians])
    return "\n".join(formatted(columns, rows)) + "\n"


def written() -> dict[Path, str]:
    """The text of each Markdown file."""
    stored = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    texts = {path.with_suffix(".md"): markdown(one) for path, one in stored.items()}
    return {**texts, FOLDER / "summary.md": summary(list(stored.values()))}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
