"""What users cost and measure in a chat room, where each hears all the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from operator import sub
from statistics import median
from typing import NamedTuple

from beside import busy, describe, event_costs, joined, others, to
from harness import (
    Bench,
    BenchmarkError,
    Locust,
    Look,
    Server,
    each,
    percentiles_of,
    ratios,
    watch,
)
from table import Row, figure_of

WITH, WITHOUT = "plugins/delivery.py", "locustfile.py"  # with ``on_message``, and without
NAMES = {50: "median", 95: "95th percentile"}
PLAIN_LIMIT = 120  # seconds until the plain socket has ended

# ---------------------------------------------------------------------------------- round trips


class RoomRun(NamedTuple):
    """What came of one run in a room."""

    window: Look
    own: dict[int, float]
    """Percentiles of the generator's echoes, in ms."""
    plain: dict[int, float]
    """Those of the plain socket in the same room."""


def run_room(bench: Bench, scripts: str) -> RoomRun:
    """Run a room with a plain socket in it, in a process of its own."""
    seconds = bench.pick(12, 3)
    server = Server(bench, "room=1")
    users = bench.pick(300, 30)
    pause = ("--chat-wait", "1-3")  # as ChatClient has it
    locust = Locust(bench, users, [server], *pause, scripts=scripts, exact_seconds=seconds + 1)
    locust.wait_until_steady()
    plain = start_plain_socket(bench, server, seconds)
    window = watch(locust, seconds)
    trips = finish_plain_socket(plain)
    locust.finish_clean()
    return RoomRun(window, locust.percentiles(), percentiles_of(trips))


def start_plain_socket(bench: Bench, server: Server, seconds: float) -> subprocess.Popen[str]:
    """Return a plain socket under way."""
    command = [sys.executable, "benchmarks/plain_socket.py", str(server.port), str(seconds)]
    return bench.start(command, {}, stdout=subprocess.PIPE)


def finish_plain_socket(plain: subprocess.Popen[str]) -> list[float]:
    """Return its round trips, in ms."""
    output, _ = plain.communicate(timeout=PLAIN_LIMIT)
    if plain.returncode:
        raise BenchmarkError("the plain socket has failed")
    trips: list[float] = json.loads(output)
    return trips


def room(bench: Bench) -> list[Row]:
    """A room of 300: an echo's time beside that of a plain socket, and without ``on_message``."""
    runs: dict[str, list[RoomRun]] = {WITH: [], WITHOUT: []}
    for _ in range(bench.pick(6, 1)):
        for scripts, ended in runs.items():
            ended.append(run_room(bench, scripts))
    return [
        plain_row(runs[WITH], 50),
        plain_row(runs[WITH], 95),
        handler_row(runs[WITH], runs[WITHOUT]),
    ]


def own_trips(runs: Sequence[RoomRun], share: int) -> list[float]:
    """Return a percentile of the generator's echoes in each run."""
    return [run.own[share] for run in runs]


def plain_trips(runs: Sequence[RoomRun], share: int) -> list[float]:
    """Return a percentile of the plain socket's echoes in each run."""
    return [run.plain[share] for run in runs]


def windows_of(runs: Sequence[RoomRun]) -> list[Look]:
    """Return the windows of some runs."""
    return [run.window for run in runs]


def plain_row(runs: Sequence[RoomRun], share: int) -> Row:
    """Compare a percentile of the echoes with that of the plain socket, run by run."""
    own = own_trips(runs, share)
    plain = plain_trips(runs, share)
    windows = windows_of(runs)
    beside = joined(
        to(own, plain, "{:.2f} ms"),
        describe(windows),
        busy(windows),
        others(windows),
    )
    return Row(
        f"room of 300 with plugins/delivery.py: echo, {NAMES[share]}, over a plain socket's",
        ratios(own, plain),
        "{:.2f} ×",
        most=1.3,
        beside=beside,
    )


def handler_row(handling: Sequence[RoomRun], without: Sequence[RoomRun]) -> Row:
    """Compare the median of the echoes with that of users who do not look at what others say."""
    own = own_trips(handling, 50)
    other = own_trips(without, 50)
    windows = windows_of(without)
    beside = joined(
        to(own, other, "{:.2f} ms"),
        f"without it {busy(windows)}",
        others(windows),
    )
    return Row(
        "room of 300: echo, median, with the on_message of plugins/delivery.py over that without",
        ratios(own, other),
        "{:.2f} ×",
        most=1.3,
        beside=beside,
    )


# ------------------------------------------------------------------------------- processor time

USERS = 50
HEARD = USERS - 1  # each message arrives at so many others


def delivery(bench: Bench) -> list[Row]:
    """What plugins/delivery.py adds for a message that arrives, in a room of 50.

    Without the plugin the others read a message, too, and drop it.
    """
    windows: dict[str, list[Look]] = {WITH: [], WITHOUT: []}
    for _ in range(bench.pick(6, 1)):
        for scripts, measured in windows.items():
            measured.append(watch_small_room(bench, scripts))
    whole = delivery_costs(windows[WITH])
    reading = delivery_costs(windows[WITHOUT])
    rate = median(each(windows[WITH], "rate")) * HEARD
    beside = joined(
        f"with it over without {to(whole, reading, '{:.1f} µs')}",
        f"one event of Locust {figure_of(event_costs(bench), '{:.1f} µs')}",
        f"{rate:,.0f} deliveries/s",
        others(windows[WITH] + windows[WITHOUT]),
    )
    return [
        Row(
            "processor time that plugins/delivery.py adds for a delivery, in a room of 50",
            list(map(sub, whole, reading)),
            "{:.1f} µs",
            most=10,
            beside=beside,
        )
    ]


def watch_small_room(bench: Bench, scripts: str) -> Look:
    """Return what users in a room of 50 do, who say some 200 messages a second."""
    server = Server(bench, "room=1")
    pause = ("--chat-wait", "0.15-0.35")
    locust = Locust(bench, USERS, [server], *pause, scripts=scripts)
    locust.wait_until_steady()
    window = watch(locust, bench.pick(8, 2))
    locust.finish_clean()
    return window


def delivery_costs(windows: Sequence[Look]) -> list[float]:
    """Return the processor microseconds for each message that arrives at another."""
    return [cost / HEARD for cost in each(windows, "cost")]
