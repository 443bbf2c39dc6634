"""How cost and memory grow with the users, who send 2,000 messages a second in all."""

from __future__ import annotations

import importlib
import math
import time
from statistics import median
from typing import Any, NamedTuple

from beside import describe, joined
from harness import FOLDER, Bench, Locust, Look, Server, each, free_port, ratios
from table import Row, figure_of

TOTAL_RATE = 2000  # messages a second, however many users share them
MOST_USERS = 50_000
DIVISORS = (1, 5, 50, 500)  # what most users are divided by, for the other numbers of users
SOURCES = "127.0.0.2,127.0.0.3,127.0.0.4,127.0.0.5"  # each has 28,000 ports

Figures = dict[int, list[float]]  # by the number of users


def start_crowd(bench: Bench, users: int, processes: int) -> Locust:
    """Return a run of so many users in so many processes, when all of them have sent a message.

    There are as many servers, which share a port, as they have the same limit of open files.
    """
    servers = [Server(bench)]
    while len(servers) < processes:
        servers.append(Server(bench, f"port={servers[0].port}"))
    pause = users / TOTAL_RATE
    port = free_port()  # not 5557, where the workers of another run could join in
    options = ["--processes", str(processes)]
    options += ["--master-bind-port", port, "--master-port", port]
    options += ["--chat-source", SOURCES]
    options += ["--chat-wait", f"{0.8 * pause:.4f}-{1.2 * pause:.4f}"]
    locust = Locust(bench, users, servers, *options, limit=600)
    locust.wait_until_steady()
    return locust


def check_all_active(locust: Locust) -> None:
    """Raise BenchmarkError unless each user sends in time, on its first connection."""
    locust.counted("active")
    time.sleep(1.2 * locust.users / TOTAL_RATE + 2)
    active = locust.counted("active")
    accepted = locust.counted("accepted")
    if not active == accepted == locust.users:
        raise locust.error(f"{active:.0f} of {locust.users} users sent, {accepted:.0f} connected")


def resident(locust: Locust) -> float:
    """Return the resident kilobytes of all its processes."""
    sizes = [process.memory_info().rss for process in locust.processes()]
    return float(sum(sizes) / 1024)


def resident_without_users(bench: Bench, processes: int) -> float:
    """Return the resident kilobytes of a run with one user in each process."""
    empty = start_crowd(bench, processes, processes)
    time.sleep(bench.pick(10, 1))
    size = resident(empty)
    empty.finish_clean()
    return size


class Course(NamedTuple):
    """What was seen of the crowds, by their numbers of users."""

    windows: dict[int, list[Look]]
    memory: Figures
    """Kilobytes a user."""


def growth(bench: Bench) -> list[Row]:
    """Cost and memory of four numbers of users.

    All run at the same time: so whatever the machine does meets all alike.
    """
    most = bench.pick(MOST_USERS, 1000)
    processes = max(2, math.ceil(most / (bench.most_files - 1000)))
    base = resident_without_users(bench, processes)
    crowds = {}
    for divisor in DIVISORS:
        users = most // divisor
        crowds[users] = start_crowd(bench, users, processes)
    course = watch_crowds(bench, crowds, base)
    check_all_active(crowds[most])
    for locust in crowds.values():
        locust.finish_clean()
    costs = {}
    for users, windows in course.windows.items():
        costs[users] = each(windows, "cost")
    picture = "not drawn, as it is not written"
    if bench.writes:
        picture = draw(costs, course.memory)
    return [
        capacity_row(bench, most, processes, course.windows[most]),
        cost_row(costs),
        *memory_rows(course.memory, picture),
    ]


def watch_crowds(bench: Bench, crowds: dict[int, Locust], base: float) -> Course:
    """Look at all crowds again and again.

    :param base: kilobytes that a run takes without its users
    """
    numbers = sorted(crowds)
    course = Course({users: [] for users in numbers}, {users: [] for users in numbers})
    for _ in range(bench.pick(10, 2)):
        before = {users: locust.look() for users, locust in crowds.items()}
        time.sleep(bench.pick(4, 1))
        for users, locust in crowds.items():
            window = locust.look().since(before[users])
            course.windows[users].append(window)
            kilobytes = resident(locust) - base
            course.memory[users].append(kilobytes / users)
    return course


def capacity_row(bench: Bench, users: int, processes: int, windows: list[Look]) -> Row:
    """Say how many processes held the users; that each of them was echoed, was checked."""
    beside = f"{describe(windows)}; each user echoed, no failure"
    if processes > 2:
        needed = users // 2 + 1000
        beside = joined(
            beside,
            f"a process may open {bench.most_files:,} files, which could not be raised",
            f"two processes take a `ulimit -Hn` of {needed:,}",
        )
    return Row(
        f"processes of one run that hold {users:,} users, with --chat-source",
        [processes],
        "{:.0f}",
        most=2,
        beside=beside,
    )


def flat_row(what: str, figures: Figures, beside: str) -> Row:
    """Compare the figures of most users with the smallest, whatever number of users has it."""
    most = max(figures)
    smallest = min(figures, key=lambda users: median(figures[users]))
    return Row(
        f"{what}, {most:,} users over {smallest:,}, where it is smallest",
        ratios(figures[most], figures[smallest]),
        "{:.2f} ×",
        most=1.5,
        beside=beside,
    )


def by_users(figures: Figures, form: str) -> str:
    """Return the figures of each number of users."""
    texts = []
    for users, values in figures.items():
        texts.append(f"{users:,} users {figure_of(values, form)}")
    return ", ".join(texts)


def cost_row(costs: Figures) -> Row:
    """Compare the processor time a message."""
    each = by_users(costs, "{:.0f}")
    beside = f"{each} µs: all that the run uses, Locust's master and its waiting included"
    return flat_row("processor time a message", costs, beside)


def memory_rows(memory: Figures, picture: str) -> list[Row]:
    """Say how much memory a user takes, and compare: few find room in what an empty run holds."""
    most = max(memory)
    of_many = {}
    for users, values in memory.items():
        if users >= most // 5:
            of_many[users] = values
    each_number = by_users(memory, "{:.1f}")
    return [
        Row(
            f"resident memory a user, {most:,} users",
            memory[most],
            "{:.1f} KB",
            most=13,
            beside=f"{each_number} KB over a run with a user in each process",
        ),
        flat_row("resident memory a user", of_many, picture),
    ]


def draw(costs: Figures, memory: Figures) -> str:
    """Draw growth.png; return that it is drawn, or what it takes."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return "to draw it: pip install -r benchmarks/requirements.txt"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    fill(left, costs, f"Processor time a message, {TOTAL_RATE:,} messages/s in all", "µs")
    fill(right, memory, "Resident memory a user", "KB")
    figure.savefig(FOLDER / "growth.png", dpi=100)
    pyplot.close(figure)
    return "drawn below"


def fill(panel: Any, figures: Figures, title: str, unit: str) -> None:
    """Draw a box for each number of users.

    :param panel: of matplotlib, which need not be there
    """
    users = sorted(figures)
    labels = [f"{count:,}" for count in users]
    boxes = [figures[count] for count in users]
    panel.boxplot(boxes, tick_labels=labels)
    panel.set_title(title)
    panel.set_ylabel(unit)
    panel.set_xlabel("users")
    _, top = panel.get_ylim()
    panel.set_ylim(0, 1.2 * top)
    panel.grid(alpha=0.3)
