"""What of a model computes on fastlm, and why the rest does not."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    module: str  # its name in the model
    operator: str  # what computes it, or would
    backend: str  # who serves it; "" where it is left alone
    reason: str  # why it is left alone; ""


@dataclasses.dataclass(frozen=True)
class Report:
    """str() of it is a table; `replaced` and `left_alone` are its two halves."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.reason)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason)

    def __str__(self) -> str:
        if not self.entries:
            return "nothing here is of a family that fastlm knows"
        rows = [
            (entry.module, entry.operator, entry.backend or f"left alone: {entry.reason}") for entry in self.entries
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {operator:{widths[1]}}  {who}" for name, operator, who in rows)
