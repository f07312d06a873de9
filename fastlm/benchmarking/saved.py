"""Results read back from a file that `fastlm bench --json` wrote."""

import json
from pathlib import Path
from typing import Any

from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Ratio
from fastlm.core.errors import mismatch


def read(argument: str, file: Path) -> tuple[list[Row], dict[str, Any], dict[str, list[str]]]:
    """(rows, the machine and the versions, what failed and what was left out on a GPU)."""

    def other(reason: object) -> ValueError:
        return mismatch(argument, "a file written by `fastlm bench --json`", f"{str(file)!r} ({reason})")

    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise other(error.strerror) from None
    except ValueError as error:  # also of bytes that are not UTF-8
        raise other(f"no JSON: {error}") from None
    if not isinstance(stored, dict):
        raise other("no JSON object")
    if missing := [name for name in ("rows", "machine") if name not in stored]:
        raise other(f"without {missing[0]!r}")
    try:
        rows, described = [row_of(row) for row in stored["rows"]], stored["machine"]
        if not {"cpu", "card"} & {*described}:
            raise other("machine without a name")
        return rows, described, {name: list(stored.get(name, [])) for name in ("failed", "left_out")}
    except (KeyError, TypeError, AttributeError):
        raise other("rows with other fields") from None


def row_of(stored: dict[str, Any]) -> Row:
    fields = {name: value for name, value in stored.items() if name != "best_baseline"}
    for others in {"baselines", "backends"} & {*stored, "baselines"}:
        fields[others] = {
            name: Baseline(**{**baseline, "ratio": Ratio(**baseline["ratio"])})
            for name, baseline in stored[others].items()
        }
    if fields.get("work") is not None:
        fields["work"] = Work(**fields["work"])
    return Row(**fields)
