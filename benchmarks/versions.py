"""What a message costs, over the version before: two versions in one process, by pairs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import ROOT, Bench, BenchmarkError
from table import Row

# The last version that took the time of an echo when it read it, and not from the kernel.
BEFORE = "8c514c7"
LIMIT = 600  # seconds that a comparison takes at most


def source_before(bench: Bench) -> Path:
    """Return a file with the version before."""
    command = ["git", "show", f"{BEFORE}:locustfile.py"]
    shown = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    if shown.returncode:
        raise BenchmarkError(f"git has no version {BEFORE}: fetch the whole history")
    path = bench.new_path().with_suffix(".py")
    path.write_bytes(shown.stdout)
    return path


def compared(bench: Bench, before: Path, what: str, most: float, *options: str) -> Row:
    """Return the row of one way of comparing, as ``pairs.py`` says it."""
    command = [sys.executable, "benchmarks/pairs.py", str(before), "locustfile.py", "--json"]
    command += ["--slices", str(bench.pick(80, 3)), *options]
    process = bench.start(command, {}, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=LIMIT)
    if process.returncode:
        raise BenchmarkError(f"pairs.py has failed: {what}")
    result = json.loads(output)
    if any(result["errors"]):
        raise BenchmarkError(f"requests have failed: {what}")
    earlier, now = result["microseconds"]
    return Row(
        f"processor time a message, {what}, over the version before",
        result["ratios"],
        "{:.3f} ×",
        most=most,
        beside=f"{now:.1f} µs to {earlier:.1f} µs of {BEFORE}",
    )


def versions(bench: Bench) -> list[Row]:
    """Closed loop with few and many users, open loop, and TLS."""
    before = source_before(bench)
    return [
        compared(bench, before, "100 users", 1.06, "--users=100"),
        compared(bench, before, "1,000 users", 1.06, "--users=1000"),
        compared(bench, before, "open loop", 1.06, "--users=500", "--rate=10"),
        compared(bench, before, "TLS, 100 users", 1.1, "--users=100", "--tls"),
    ]
