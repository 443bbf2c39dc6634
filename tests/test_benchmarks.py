"""The benchmarks run and print their table. What they measure is not judged: machines are noisy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from programs import ROOT, Program

Start = Callable[..., Program]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read Linux's own figures")
def test_a_quick_comparison_prints_a_row_for_each_figure(start: Start) -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert ".venv/bin/python benchmarks/run.py --quick" in readme
    running = start(sys.executable, "benchmarks/run.py", "--quick", "--only", "share")
    assert running.ends(280) == 0
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", running.output, re.MULTILINE)
    assert len(rows) == 3
    assert 1 <= int(rows[2][1].removesuffix("%")) <= 100  # Locust's share of the processor time
