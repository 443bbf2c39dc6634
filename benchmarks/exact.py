"""Keeps every round trip as it was reported, as Locust's own percentiles are rounded to whole and
tens of ms.

Loaded beside a script (``locust -f locustfile.py,benchmarks/exact.py``). It counts
``echo_response`` from the moment that all users are there, and writes at the end to the file
EXACT_FILE: the number of successes, and their minimum, median, 95th and 99th percentile in ms."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

from locust import events

round_trips = array("d")


@events.request.add_listener
def on_request(name: str, response_time: float, exception: Exception | None, **_: Any) -> None:
    """Keep the time of an echo."""
    if name == "echo_response" and exception is None:
        round_trips.append(response_time)


@events.spawning_complete.add_listener
def on_spawning_complete(**_: Any) -> None:
    """Forget what was measured while users were still connecting."""
    del round_trips[:]


@events.quitting.add_listener
def on_quitting(**_: Any) -> None:
    """Write the file."""
    times, count = sorted(round_trips), len(round_trips)
    ranks = {"min": 0, "median": count // 2, "p95": count * 95 // 100, "p99": count * 99 // 100}
    figures = {name: times[rank] for name, rank in ranks.items()} if times else {}
    Path(os.environ["EXACT_FILE"]).write_text(json.dumps({"count": count, **figures}), "utf-8")
