"""The table of figures: its rows, and RESULTS.md, which keeps it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from harness import FOLDER

NO_LIMIT = float("inf")
RESULTS = FOLDER / "RESULTS.md"
HEADS = ["name", "what", "aim", "measured", "reached", "spread, number", "beside", "when; load"]
INTRODUCTION = """\
# Results

Written by `benchmarks/run.py`; [README.md](README.md) says how each figure is measured. A figure is
a median. Its spread, which stands in brackets in the column "beside", is where the middle half of
the measurements lies, or all of them where they are fewer than five. µs are of processor time. The
time is UTC, the load that of the minute before. Measured on {conditions}.

"""
PICTURE = "\n![How cost grows with the users](growth.png)\n"


def limits_of(values: Sequence[float]) -> tuple[float, float]:
    """Return where the middle half of the values lies, or all of them where they are few."""
    if len(values) < 5:
        return min(values), max(values)
    low, _, high = quantiles(values, n=4)
    return low, high


def figure_of(values: Sequence[float], form: str) -> str:
    """Return the median of some values with their spread, for the column "beside"."""
    figure = form.format(median(values))
    if len(values) == 1:
        return figure
    low, high = (form.format(value) for value in limits_of(values))
    return f"{figure} ({low} to {high})"


class Row(NamedTuple):
    """A line of the table: a figure, which is the median of some values, and its aim."""

    what: str
    values: Sequence[float]
    form: str
    """How to write a value, such as ``{:.1f} ms``."""
    least: float = -NO_LIMIT
    """What the figure is at least to be."""
    most: float = NO_LIMIT
    """What the figure is at most to be."""
    beside: str = ""
    """What else there is to know: other tools, processor time, what else the machine did."""

    @property
    def figure(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def is_reached(self) -> bool:
        """Whether the figure is as it is to be."""
        return self.least <= self.figure <= self.most

    @property
    def aim(self) -> str:
        """What the figure is to be."""
        least, most = self.form.format(self.least), self.form.format(self.most)
        if self.most == NO_LIMIT:
            return f"at least {least}"
        if self.least == -NO_LIMIT:
            return f"at most {most}"
        return f"{least} to {most}"

    @property
    def spread(self) -> str:
        """Where the values lie, and how many there are."""
        if len(self.values) == 1:
            return "1"
        low, high = (self.form.format(value) for value in limits_of(self.values))
        return f"{low} to {high}, {len(self.values)}"

    def cells(self) -> list[str]:
        """Return the cells of the line."""
        reached = "yes" if self.is_reached else "no"
        figure = f"**{self.form.format(self.figure)}**"
        return [self.what, self.aim, figure, reached, self.spread, self.beside]


def conditions() -> str:
    """Return machine and versions: without them, the figures say little."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    processor = model[1] if model else platform.machine()
    return ", ".join(
        [
            f"{os.cpu_count()} processors ({processor})",
            f"{platform.system()} {platform.release()}",
            f"{platform.python_implementation()} {platform.python_version()}",
            f"Locust {version('locust')}",
            f"gevent {version('gevent')}",
        ]
    )


def line(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    tidy = []
    for cell in cells:
        words = cell.replace("|", "/").split()
        tidy.append(" ".join(words))
    return f"| {' | '.join(tidy)} |"


def table(lines: dict[str, list[str]], names: Iterable[str]) -> str:
    """Return the table of the lines that there are, in the order of the names."""
    rows = [line(HEADS), line(["---"] * len(HEADS))]
    for name in names:
        rows += lines.get(name, [])
    return "\n".join(rows) + "\n"


def written_lines(introduction: str) -> dict[str, list[str]]:
    """Return the lines of RESULTS.md by the comparison that made them.

    There are none where it begins in another way: they were measured in other conditions.
    """
    lines: dict[str, list[str]] = {}
    text = RESULTS.read_text("utf-8") if RESULTS.exists() else ""
    if not text.startswith(introduction):
        return lines
    for each in text.splitlines():
        if match := re.match(r"\| `(\w+)` \|", each):
            lines.setdefault(match[1], []).append(each)
    return lines


def write(lines: dict[str, list[str]], names: Iterable[str]) -> None:
    """Write RESULTS.md anew, with these lines instead of older ones of the same names.

    Other lines stay if they were measured in the same conditions.
    """
    introduction = INTRODUCTION.format(conditions=conditions())
    text = introduction + table(written_lines(introduction) | lines, names)
    if (FOLDER / "growth.png").exists():
        text += PICTURE
    RESULTS.write_text(text, "utf-8")
