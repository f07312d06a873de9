"""Results read back from a file that `fastlm bench --json` wrote."""

import json
from pathlib import Path
from typing import Any

from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Ratio
from fastlm.core.errors import mismatch


def read(argument: str, file: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, the machine and the versions)."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return [row_of(row) for row in stored["rows"]], stored["machine"]
    except (KeyError, TypeError, ValueError) as error:
        raise mismatch(argument, "a file written by `fastlm bench --json`", f"{file} ({error!r})") from None


def row_of(stored: dict[str, Any]) -> Row:
    fields = {name: value for name, value in stored.items() if name != "best_baseline"}
    fields["baselines"] = {
        name: Baseline(**{**baseline, "ratio": Ratio(**baseline["ratio"])})
        for name, baseline in stored["baselines"].items()
    }
    if fields.get("work") is not None:
        fields["work"] = Work(**fields["work"])
    return Row(**fields)
