"""The tables of the documentation that benchmarks/tables.py writes from docs/results/tables."""

import re

from benchmarks import tables
from tests.snippets import ROOT

PAGES = ROOT / "docs" / "performance"


def test_committed_tables_are_those_of_the_results():
    for path, text in tables.written().items():
        assert path.read_text() == text, path.name


def test_every_table_is_on_a_page_and_every_included_one_exists():
    included = {
        name for page in PAGES.glob("*.md") for name in re.findall(r'--8<-- "results/tables/(.+)"', page.read_text())
    }
    written = {
        f"{path.name}:{name}" for path, text in tables.written().items() for name in re.findall(r"start:(\w+)", text)
    }
    assert included == written | {"summary.md"}


def test_a_table_states_its_origin_and_shows_what_was_not_measured():
    table = {
        "date": "2026-01-02",
        "commit": "abc1234",
        "commands": ["fastlm bench"],
        "note": "On a loaded machine.",
        "columns": {"operator": "code", "forward": "speedup", "of peak": "percent"},
        "rows": [["linear", [1.5, 1.4, 1.6], None]],
    }
    text = tables.markdown({"tables": {"operators": table}})
    assert "```\nfastlm bench\n```" in text
    assert "| `linear` | 1.50 [1.40–1.60] | – |" in text
    assert "On a loaded machine. Recorded on 2026-01-02, commit abc1234." in text


def test_the_summary_takes_medians_of_the_rows_that_it_names():
    steps = {"columns": {"dtype": "text", "eager": "speedup"}, "rows": [["float32", [2.0, 1.9, 2.1]]]}
    compiled = {"columns": {"compiled tuned": "speedup"}, "rows": [[[1.5, 1.4, 1.6]]]}
    machine = {
        "machine": "A CPU",
        "page": "cpu.md",
        "tables": {"steps": steps, "compiled": compiled},
        "summary": [{"model": "GPT-2", "from": [["steps", 0], ["compiled", 0]]}],
    }
    assert "| [A CPU](cpu.md) | GPT-2 | float32 | 2.00 | – | 1.50 | – |" in tables.summary([machine])
