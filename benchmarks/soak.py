"""What a long run holds: memory, open files, sockets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import sub
from typing import NamedTuple

from beside import joined
from harness import Bench, BenchmarkError, Locust, Server, each
from table import Row, figure_of

SCRIPTS = "locustfile.py,plugins/delivery.py,benchmarks/soaked.py"
LOOKS = 11  # within three seconds, as connections come and go
MOMENTS = (0.1, 0.4, 0.7, 1.0)  # of the run, at which it is looked at


class Holdings(NamedTuple):
    """What a process holds."""

    megabytes: float
    files: float
    sockets: float


def holdings(locust: Locust) -> list[Holdings]:
    """Return some looks at what it holds."""
    (process,) = locust.processes()
    looks = []
    for _ in range(LOOKS):
        megabytes = process.memory_info().rss / 1e6
        sockets = len(process.net_connections("tcp"))
        looks.append(Holdings(megabytes, process.num_fds(), sockets))
        time.sleep(0.3)
    return looks


def soak(bench: Bench) -> list[Row]:
    """A long run in open loop, in a room with accounting, whose server closes connections."""
    users = bench.pick(50, 10)
    seconds = bench.pick(600, 10)
    server = Server(bench, "room=1", f"drop={bench.pick(50, 5)}")
    options = ("--chat-rate", "1", "SoakedClient")
    locust = Locust(bench, users, [server], *options, scripts=SCRIPTS, limit=seconds + 300)
    locust.wait_until_steady()
    begin = time.monotonic()
    course = {}
    for moment in MOMENTS:
        due = moment * seconds
        time.sleep(max(0, begin + due - time.monotonic()))
        course[due] = holdings(locust)
    beside = joined(memory_course(course), check_and_count(locust))
    return rows_of(course[MOMENTS[0] * seconds], course[MOMENTS[-1] * seconds], beside)


def check_and_count(locust: Locust) -> str:
    """End the run; return what there was in it.

    :raises BenchmarkError: where a delivery failed, or there were no heartbeats; other rows do
        fail, as the server hangs up
    """
    statistics = locust.finish_statistics()
    deliveries = statistics["delivery"]
    if deliveries["num_failures"]:
        raise BenchmarkError(f"{deliveries['num_failures']} deliveries failed")
    if "heartbeat" not in statistics:
        raise BenchmarkError("there were no heartbeats")
    lines = locust.counted("lines")
    accepted = locust.counted("accepted")
    heartbeats = statistics["heartbeat"]["num_requests"]
    return joined(
        f"{lines:,.0f} lines, {heartbeats:,} of them heartbeats",
        f"{accepted:,.0f} connections",
        f"{deliveries['num_requests']:,} deliveries",
    )


def memory_course(course: dict[float, list[Holdings]]) -> str:
    """Return the memory at each time, so that a line that flattens is seen.

    :param course: what was held, by the seconds since all users were there
    """
    texts = []
    for seconds, looks in course.items():
        megabytes = figure_of(each(looks, "megabytes"), "{:.1f}")
        texts.append(f"{megabytes} MB after {seconds / 60:.2g}")
    return f"{', '.join(texts)} minutes"


def growth_of(name: str, first: Sequence[Holdings], last: Sequence[Holdings]) -> list[float]:
    """Return by how much each look at the end is more than one at the beginning."""
    return list(map(sub, each(last, name), each(first, name)))


def rows_of(first: Sequence[Holdings], last: Sequence[Holdings], beside: str) -> list[Row]:
    """Say by how much the run holds more at its end than at its beginning."""
    return [
        Row(
            "growth of the resident memory, open loop, with reconnects, delivery and heartbeat",
            growth_of("megabytes", first, last),
            "{:+.1f} MB",
            most=1,
            beside=beside,
        ),
        Row("growth of the open files", growth_of("files", first, last), "{:+.0f}", most=0),
        Row("growth of the sockets", growth_of("sockets", first, last), "{:+.0f}", most=0),
    ]
