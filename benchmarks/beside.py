"""Texts of the column "beside": what a generator did, and what else the machine did meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from harness import ROOT, Bench, Look, each
from table import figure_of

MISSING = "not on this machine"
DISTURBED = 0.2  # of a processor: a window in which other processes took more is named


def figure(windows: Sequence[Look], name: str, form: str) -> str:
    """Return a figure of some windows, by its name."""
    return figure_of(each(windows, name), form)


def describe(windows: Sequence[Look]) -> str:
    """Return messages a second and processor time a message."""
    rate = figure(windows, "rate", "{:,.0f}/s")
    cost = figure(windows, "cost", "{:.1f} µs")
    return f"{rate} at {cost}"


def busy(windows: Sequence[Look]) -> str:
    """Return how busy generator and server were."""
    own = figure(windows, "busy", "{:.0%}")
    server = figure(windows, "server_busy", "{:.0%}")
    return f"generator {own} busy, server {server}"


def others(windows: Sequence[Look]) -> str:
    """Return what other processes did meanwhile, and whether that was too much."""
    taken = each(windows, "others")
    most = max(0, *taken)
    text = f"other processes up to {most:.0%} of a processor"
    disturbed = [share for share in taken if share > DISTURBED]
    if not disturbed:
        return text
    count = f"{len(disturbed)} of {len(taken)}"
    return f"disturbed: {text}, over {DISTURBED:.0%} in {count} windows"


def joined(*texts: str) -> str:
    """Return those texts that are not empty as one."""
    return "; ".join(filter(None, texts))


def to(values: Sequence[float], compared: Sequence[float], form: str) -> str:
    """Return the figures that a ratio compares."""
    own = figure_of(values, form)
    other = figure_of(compared, form)
    return f"{own} to {other}"


def event_costs(bench: Bench) -> list[float]:
    """Return the processor microseconds of one event of Locust, measured some times."""
    command = [sys.executable, "benchmarks/event.py"]
    costs = []
    for _ in range(bench.pick(3, 1)):
        output = subprocess.check_output(command, cwd=ROOT)
        costs.append(float(output))
    return costs
