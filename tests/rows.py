"""The request events that a test has seen."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Rows(list[dict[str, Any]]):
    """The request events that were fired."""

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of that name."""
        return [row for row in self if row["name"] == name]

    def counts(self) -> Counter[str]:
        """Count the events: a name for each success, ``name: ExceptionType`` for each failure."""
        return Counter(map(outcome, self))


def outcome(row: dict[str, Any]) -> str:
    """Return the name of a successful row, or ``name: ExceptionType``."""
    name = str(row["name"])
    if row["exception"] is None:
        return name
    return f"{name}: {type(row['exception']).__name__}"
