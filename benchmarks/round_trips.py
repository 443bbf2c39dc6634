"""Whether the round trips that are reported are the server's, where they are known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from beside import MISSING, describe, joined, others
from harness import Bench, Generator, Locust, Look, Server, each, watch
from loads import CLOSED, OPEN, TEXTBOOK, Load, start
from peers import TCPKALI, TSUNG, installed_peers
from table import NO_LIMIT, Row, figure_of

NAMES = {0: "minimum", 50: "median", 99: "99th percentile"}


class Run(NamedTuple):
    """What came of one run of a generator."""

    window: Look
    percentiles: dict[int, float]
    late_us: float
    """How late the server's own answers were."""


Runs = dict[str, list[Run]]  # by the names of the generators
Figures = dict[str, list[float]]


def measure(generator: Generator, seconds: float) -> Run:
    """Look at a generator for so many seconds, and end it."""
    generator.wait_until_steady()
    window = watch(generator, seconds)
    late_us = generator.servers[0].counters()["late_us"]
    generator.finish_clean()
    return Run(window, generator.percentiles(), late_us)


def repeat(bench: Bench, names: Iterable[str], load: Load) -> Runs:
    """Run generators in turn, five times each, where the server answers after 20 ms."""
    runs: Runs = {name: [] for name in names}
    seconds = bench.pick(8, 2)
    load = load._replace(kept_seconds=seconds + 3)
    for _ in range(bench.pick(5, 1)):
        for name, ended in runs.items():
            generator = start(bench, name, load, "delay=20")
            ended.append(measure(generator, seconds))
    return runs


def windows_of(runs: Sequence[Run]) -> list[Look]:
    """Return the windows of some runs."""
    return [run.window for run in runs]


def trips_of(runs: Sequence[Run], share: int) -> list[float]:
    """Return a percentile of the round trips of each run."""
    return [run.percentiles[share] for run in runs]


def trips_by_name(runs: Runs, share: int) -> Figures:
    """Return a percentile of the round trips of each run of each generator."""
    figures = {}
    for name, ended in runs.items():
        figures[name] = trips_of(ended, share)
    return figures


def server_late(runs: Sequence[Run]) -> str:
    """Return how late the server itself was."""
    late_us = [run.late_us for run in runs]
    return f"the server is {figure_of(late_us, '{:.0f} µs')} late"


def calmest(row: Row, runs: Sequence[Run]) -> str:
    """Return nothing; where the aim is missed, what the machine and the server had to do with it.

    :param runs: that gave the values of the row, in their order
    """
    if row.is_reached:
        return ""
    taken = [max(0, share) for share in each(windows_of(runs), "others")]
    least, most = min(taken), max(taken)
    value = row.values[taken.index(least)]
    meanwhile = f"other processes took up to {most:.0%} of a processor, and {server_late(runs)}"
    calm = f"in the run in which they took least, {least:.0%}, it is {row.form.format(value)}"
    return f"missed while {meanwhile}: {calm}"


def of_others(values: Figures, names: Iterable[str], form: str) -> str:
    """Return the figures of the generators that stand beside ours."""
    texts = []
    for name in names:
        text = MISSING
        if name in values:
            text = figure_of(values[name], form)
        texts.append(f"{name} {text}")
    return ", ".join(texts)


# ------------------------------------------------------------------------- at full load


FULL_RATE = 15  # messages a second of each user of tcpkali: with 2,000, about what ours reach


def saturated(bench: Bench) -> list[Row]:
    """Round trips where 20 ms is true, and each generator has all that it can do.

    But for tcpkali: as it does not wait for echoes, it would only overwhelm the server.
    """
    users = bench.pick(2000, 1000)
    load = Load(users, rate=FULL_RATE)
    runs = repeat(bench, (CLOSED, TEXTBOOK, *installed_peers()), load)
    return [
        saturated_row(runs, users, 50, 20.6),
        saturated_row(runs, users, 99, 22),
    ]


def saturated_row(runs: Runs, users: int, share: int, most: float) -> Row:
    """Compare the round trips that are reported with those that are true."""
    own = runs[CLOSED]
    row = Row(
        f"round trip where 20 ms is true, {users:,} users without a pause, {NAMES[share]}",
        trips_of(own, share),
        "{:.2f} ms",
        most=most,
    )
    values = trips_by_name(runs, share)
    loads = {}
    for name, ended in runs.items():
        loads[name] = each(windows_of(ended), "busy")
    beside = joined(
        of_others(values, (TEXTBOOK, TSUNG, TCPKALI), "{:.1f} ms"),
        calmest(row, own),
        f"busy: {of_others(loads, runs, '{:.0%}')}",
        describe(windows_of(own)),
        server_late(own),
        others(windows_of(own)),
    )
    return row._replace(beside=beside)


# ----------------------------------------------------------------------------- at a rate

RATE = 10  # messages a second of each user
PAUSE = "0.03-0.13"  # 80 ms on the average; were it always the same, users would keep in step


def latency(bench: Bench) -> list[Row]:
    """Round trips and messages sent where 20 ms is true, 500 users with 5,000 messages a second."""
    users = bench.pick(500, 50)
    load = Load(users, pause=PAUSE, rate=RATE)
    runs = repeat(bench, (CLOSED, OPEN, *installed_peers()), load)
    rows = []
    for loop in (CLOSED, OPEN):
        rows.append(true_row(loop, runs[loop], 0, 20.05, least=19.95))
        rows.append(true_row(loop, runs[loop], 50, 20.4))
        rows.append(true_row(loop, runs[loop], 99, 22))
    if installed_peers():
        rows += [no_worse_row(runs, share) for share in (50, 99)]
    return [*rows, sent_row(users * RATE, runs)]


def true_row(
    loop: str, runs: Sequence[Run], share: int, most: float, least: float = -NO_LIMIT
) -> Row:
    """Compare the round trips that are reported with those that are true."""
    row = Row(
        f"round trip where 20 ms is true, {loop}, {NAMES[share]}",
        trips_of(runs, share),
        "{:.2f} ms",
        least,
        most,
    )
    windows = windows_of(runs)
    beside = joined(
        describe(windows),
        server_late(runs),
        others(windows),
        calmest(row, runs),
    )
    return row._replace(beside=beside)


def no_worse_row(runs: Runs, share: int) -> Row:
    """Compare the round trips of the open loop with those of the others at the same rate."""
    values = trips_by_name(runs, share)
    medians = {name: median(values[name]) for name in installed_peers()}
    best = min(medians, key=medians.__getitem__)
    row = Row(
        f"open loop, {NAMES[share]}, no worse than {' and '.join(medians)}",
        values[OPEN],
        "{:.2f} ms",
        most=medians[best],
    )
    in_c = ""
    if best == TCPKALI and not row.is_reached:
        in_c = "tcpkali is in C and keeps no account of single messages"
    beside = joined(
        of_others(values, (CLOSED, TSUNG, TCPKALI), "{:.2f} ms"),
        calmest(row, runs[OPEN]),
        in_c,
    )
    return row._replace(beside=beside)


def sent_row(due: int, runs: Runs) -> Row:
    """Compare the messages that are sent with those that are due, in messages a second."""
    shares: Figures = {}
    for name, ended in runs.items():
        rates = each(windows_of(ended), "rate")
        shares[name] = [rate / due * 100 for rate in rates]
    return Row(
        f"open loop, sent of the {due:,} messages/s due",
        shares[OPEN],
        "{:.2f} %",
        least=99.5,
        beside=of_others(shares, (CLOSED, TSUNG, TCPKALI), "{:.2f} %"),
    )


# ------------------------------------------------- where the server or the generator stands still


def stall(bench: Bench) -> list[Row]:
    """A server that stands still 2 s of every 4, seen by all at the same time.

    Half of the messages fall due while it stands still and wait up to two seconds: so a quarter of
    all wait for more than one second.
    """
    names = (OPEN, CLOSED, *installed_peers())
    seen: Figures = {name: [] for name in names}
    for _ in range(bench.pick(3, 1)):
        for name, milliseconds in meet_stalls(bench, names).items():
            seen[name].append(milliseconds / 1000)
    row = Row(
        "round trip where the server stands still 2 s of every 4, open loop, 75th percentile",
        seen[OPEN],
        "{:.3f} s",
        least=0.95,
        most=1.05,
        beside=of_others(seen, (CLOSED, TSUNG, TCPKALI), "{:.3f} s"),
    )
    return [row]


def meet_stalls(bench: Bench, names: Iterable[str]) -> dict[str, float]:
    """Run generators at the same time; return the 75th percentile of each one's round trips."""
    seconds = bench.pick(24, 4)  # whole periods
    load = Load(50, pause="0.1", rate=RATE, kept_seconds=seconds)
    generators = {name: start(bench, name, load, "stall=2000") for name in names}
    for loop in (OPEN, CLOSED):
        generators[loop].wait_until_steady()
    time.sleep(seconds + 4)  # what was sent last is answered
    percentiles = {}
    for name, generator in generators.items():
        generator.finish_clean()
        percentiles[name] = generator.percentiles()[75]
    return percentiles


STOPPED = 2.0  # seconds
TIMEOUT = 1  # seconds


class PausedRun(NamedTuple):
    """What came of a run in which the generator was stopped."""

    failures: float
    median: float
    """Of the round trips, in ms."""
    longest: float


def paused(bench: Bench) -> list[Row]:
    """A generator that is stopped for longer than its time-out, and a server that answers soon."""
    runs = [stop_and_go_on(bench) for _ in range(bench.pick(5, 1))]
    what = f"generator stopped for {STOPPED:g} s, time-out {TIMEOUT} s, 50 users, 5 ms are true"
    medians = figure_of(each(runs, "median"), "{:.2f} ms")
    return [
        Row(
            f"{what}: failed requests",
            each(runs, "failures"),
            "{:.0f}",
            most=0,
        ),
        Row(
            f"{what}: longest round trip",
            each(runs, "longest"),
            "{:.1f} ms",
            most=30,
            beside=f"median {medians}",
        ),
    ]


def stop_and_go_on(bench: Bench) -> PausedRun:
    """Stop a generator, and let it go on."""
    server = Server(bench, "delay=5")
    options = ("--chat-wait", "0", "--chat-timeout", str(TIMEOUT))
    locust = Locust(bench, 50, [server], *options, exact_seconds=60)
    locust.wait_until_steady()
    time.sleep(1)
    locust.pause()
    time.sleep(STOPPED)
    locust.resume()
    time.sleep(2)
    entries = locust.finish_statistics().values()
    failures = sum(entry["num_failures"] for entry in entries)
    percentiles = locust.percentiles()
    return PausedRun(failures, percentiles[50], percentiles[100])
