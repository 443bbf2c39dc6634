"""How many messages one core gives, where users send without a pause."""

from __future__ import annotations

from statistics import median

from beside import MISSING, busy, describe, event_costs, joined, others
from harness import Bench, BenchmarkError, Look, each, ratios, watch_in_turn
from loads import CLOSED, TEXTBOOK, Load, start
from peers import TCPKALI, TSUNG, installed_peers
from table import Row, figure_of

Windows = dict[str, list[Look]]  # by the names of the generators

OURS = CLOSED
TURNS = 7  # of each generator, before all are started again


def run_in_turn(bench: Bench, names: list[str], users: int, seconds: float) -> Windows:
    """Start ours and others three times; return what each did in each of its turns."""
    windows: Windows = {name: [] for name in (OURS, *names)}
    for _ in range(bench.pick(3, 1)):
        generators = {}
        for name in windows:
            generators[name] = start(bench, name, Load(users))
        for measured in watch_in_turn(generators, bench.pick(TURNS, 2), seconds):
            for name, window in measured.items():
                windows[name].append(window)
        for generator in generators.values():
            generator.finish_clean()
    return windows


def floor(bench: Bench, own: list[Look]) -> str:
    """Return what no generator that runs in Locust can save: kernel, and Locust's two events."""
    two_events = [2 * cost for cost in event_costs(bench)]
    kernel = figure_of(each(own, "kernel_cost"), "{:.1f} µs")
    events = figure_of(two_events, "{:.1f} µs")
    return f"the floor: the kernel has {kernel}, Locust's two events {events}"


def with_what_it_takes(row: Row, own: list[Look]) -> Row:
    """Return the row; where its aim is missed, with what a message would have to cost."""
    if row.is_reached:
        return row
    cost = median(each(own, "cost"))
    takes = cost * row.figure / row.least
    beside = joined(
        row.beside,
        f"the aim takes {takes:.1f} µs",
    )
    return row._replace(beside=beside)


def over_textbook(bench: Bench, users: int, seconds: float) -> list[Row]:
    """Compare the messages a second with those of the textbook script, turn by turn."""
    windows = run_in_turn(bench, [TEXTBOOK], users, seconds)
    own, other = windows[OURS], windows[TEXTBOOK]
    beside = joined(
        f"{describe(own)} to {describe(other)}",
        floor(bench, own),
        busy(own),
        others(own + other),
    )
    row = Row(
        f"messages echoed a second, {users:,} users, over the textbook script",
        ratios(each(own, "rate"), each(other, "rate")),
        "{:.2f} ×",
        least=1.5,
        beside=beside,
    )
    return [with_what_it_takes(row, own)]


def hundred(bench: Bench) -> list[Row]:
    """100 users without a pause: locustfile.py and the textbook script."""
    return over_textbook(bench, 100, seconds=0.8)


def thousand(bench: Bench) -> list[Row]:
    """1,000 users without a pause: locustfile.py and the textbook script."""
    return over_textbook(bench, 1000, seconds=1.5)


def peers(bench: Bench) -> list[Row]:
    """Processor time a message, 100 users without a pause: locustfile.py, Tsung, tcpkali."""
    if TSUNG not in installed_peers():
        raise BenchmarkError("Tsung is not on this machine: apt install tsung")
    windows = run_in_turn(bench, installed_peers(), 100, seconds=0.8)
    own, other = windows[OURS], windows[TSUNG]
    in_c = MISSING
    if TCPKALI in windows:
        in_c = describe(windows[TCPKALI])
    beside = joined(
        f"{describe(own)} to {describe(other)}, on all processors",
        floor(bench, own),
        others(own + other),
        f"tcpkali, which neither waits for echoes nor checks them: {in_c}",
    )
    row = Row(
        "messages for a second of processor time, 100 users, over Tsung",
        ratios(each(other, "cost"), each(own, "cost")),
        "{:.2f} ×",
        least=1.0,
        beside=beside,
    )
    return [with_what_it_takes(row, own)]
