"""Keeps every round trip as it was reported, as Locust's own percentiles are rounded.

Loaded beside a script: ``locust -f locustfile.py,benchmarks/exact.py``. Those of the messages that
were sent in the EXACT_SECONDS from half a second after all users were there are written at the end
to the file EXACT_FILE, an array of doubles, in ms.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from time import perf_counter

from locust import events

SETTLING = 0.5  # seconds
TRIPS = array("d")


class Window:
    """From when to when a message counts."""

    begin = float("inf")
    end = float("inf")


@events.request.add_listener
def keep(name: str, response_time: float, exception: Exception | None, **_: object) -> None:
    """Keep the time of an echo."""
    sent = perf_counter() - response_time / 1000
    if name == "echo_response" and exception is None and Window.begin <= sent < Window.end:
        TRIPS.append(response_time)


@events.spawning_complete.add_listener
def begin(**_: object) -> None:
    """Count from now on."""
    Window.begin = perf_counter() + SETTLING
    Window.end = Window.begin + float(os.environ["EXACT_SECONDS"])


@events.quitting.add_listener
def write(**_: object) -> None:
    """Write the file."""
    Path(os.environ["EXACT_FILE"]).write_bytes(TRIPS.tobytes())
