"""The result of `fastlm.report`: which operators compute a model, and why they do not compute the rest."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    module: str  # its name in the model
    operator: str  # the operator that replaces it, or would
    backend: str  # the selected backend; "" if the module is not replaced
    reason: str  # why it is not replaced; ""


@dataclasses.dataclass(frozen=True)
class Report:
    """str() of it is a table. `replaced` and `left_alone` are its two parts."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.reason)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason)

    def __str__(self) -> str:
        if not self.entries:
            return "no layer of a supported family"
        rows = [
            (entry.module, entry.operator, entry.backend or f"left alone: {entry.reason}") for entry in self.entries
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {operator:{widths[1]}}  {result}" for name, operator, result in rows)
