"""What is measured: each comparison returns rows of the table, with aim, figure and spread."""

from __future__ import annotations

from collections.abc import Callable

from connecting import look_up
from crowds import growth
from harness import Bench
from rooms import delivery, room
from round_trips import latency, paused, saturated, stall
from soak import soak
from table import Row
from throughput import hundred, peers, thousand
from versions import versions

COMPARISONS: dict[str, Callable[[Bench], list[Row]]] = {
    "saturated": saturated,
    "latency": latency,
    "room": room,
    "paused": paused,
    "stall": stall,
    "hundred": hundred,
    "thousand": thousand,
    "peers": peers,
    "versions": versions,
    "delivery": delivery,
    "look_up": look_up,
    "growth": growth,
    "soak": soak,
}
