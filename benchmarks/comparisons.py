"""What is measured: each comparison returns rows of the table, with aim, figure and spread."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from operator import sub
from statistics import mean, median
from typing import NamedTuple

from harness import (
    FOLDER,
    ROOT,
    Bench,
    BenchmarkError,
    Generator,
    Locust,
    Look,
    Server,
    free_port,
    watch,
    watch_in_turn,
)
from peers import Tcpkali, Tsung, installed_peers
from table import NO_LIMIT, Row

MISSING = "not on this machine"
DISTURBED = 0.2  # of a processor: a window in which other processes took more is named


def describe(windows: Sequence[Look]) -> str:
    """Return messages a second and processor time a message."""
    rate = median(each.rate for each in windows)
    cost = median(each.cost for each in windows)
    return f"{rate:,.0f}/s at {cost:.1f} µs"


def others(windows: Sequence[Look]) -> str:
    """Return what other processes did meanwhile, and whether that was too much."""
    taken = [window.others for window in windows]
    text = f"other processes up to {max(0, *taken):.0%} of a processor"
    disturbed = sum(each > DISTURBED for each in taken)
    if not disturbed:
        return text
    return f"disturbed: {text}, over {DISTURBED:.0%} in {disturbed} of {len(taken)} windows"


def event_cost(bench: Bench) -> float:
    """Return the processor microseconds of one event of Locust."""
    command = [sys.executable, "benchmarks/event.py"]
    times = range(bench.pick(3, 1))
    costs = [float(subprocess.check_output(command, text=True, cwd=ROOT)) for _ in times]
    return median(costs)


RATE = 10  # messages a second of each user, where they have a rate
CLOSED, OPEN = "closed loop", "open loop"
NAMES = {0: "minimum", 50: "median", 99: "99th percentile"}


def start(
    bench: Bench,
    name: str,
    users: int,
    *behaviour: str,
    pause: str = "0",
    paced_seconds: float = 0,
) -> Generator:
    """Return a generator under way against a server of its own.

    :param behaviour: of the server
    :param pause: seconds from echo to message, ``0.1`` or ``0.05-0.1``, for those in closed loop
    :param paced_seconds: how long it has the rate, and keeps its round trips; 0: without a rate
    """
    server = Server(bench, *behaviour)
    match name:
        case "textbook script":
            return Locust(bench, users, [server], scripts="benchmarks/textbook.py")
        case "bare gevent":
            program = "benchmarks/bare_gevent.py"
            command = [sys.executable, program, str(server.port), str(users)]
            return Generator(bench, users, [server], command, {})
        case "Tsung":
            return Tsung(bench, users, server, mean(map(float, pause.split("-"))))
        case "tcpkali" if paced_seconds:
            return Tcpkali(bench, users, server, RATE, paced_seconds)
        case "tcpkali":
            return Tcpkali(bench, users, server)
    options = ["--chat-rate", str(RATE)] if name == OPEN else ["--chat-wait", pause]
    options += ["--stop-timeout", "10"]  # what is in flight may finish first
    return Locust(bench, users, [server], *options, exact_seconds=paced_seconds)


# ------------------------------------------------------------------------------------ throughput


def run_in_turn(
    bench: Bench, names: list[str], users: int, seconds: float
) -> dict[str, list[Look]]:
    """Start "ours" and others three times anew; return what each did in each of its turns."""
    windows: dict[str, list[Look]] = {name: [] for name in ("ours", *names)}
    for _ in range(bench.pick(3, 1)):
        generators = {name: start(bench, name, users) for name in windows}
        for measured in watch_in_turn(generators, bench.pick(7, 2), seconds):
            for name, window in measured.items():
                windows[name].append(window)
        for generator in generators.values():
            generator.finish_clean()
    return windows


def throughput_row(
    bench: Bench, users: int, windows: dict[str, list[Look]], name: str, aim: float
) -> Row:
    """Compare messages a second, turn by turn."""
    own, other = windows["ours"], windows[name]
    ratios = [one.rate / another.rate for one, another in zip(own, other, strict=True)]
    busy = max(window.server / window.seconds for window in own)  # near 1, it is the bottleneck
    compared = f"{describe(own)} to {describe(other)}"
    beside = f"{compared}; server {busy:.0%} busy; {others(own + other)}"
    what = f"messages echoed a second, {users:,} users, over {name}"
    row = Row(what, ratios, "{:.2f} ×", aim, beside=beside)
    return with_what_it_takes(bench, row, own)


def with_what_it_takes(bench: Bench, row: Row, own: list[Look]) -> Row:
    """Return the row; where its aim is not reached, with what a message would have to cost."""
    if row.is_reached:
        return row
    cost = median([window.cost for window in own])
    kernel = median([window.system / window.lines * 1e6 for window in own])
    takes = cost * row.figure / row.least
    parts = f"the kernel has {kernel:.1f} and Locust's two events {2 * event_cost(bench):.1f}"
    return row._replace(
        beside=f"{row.beside}. The aim takes {takes:.1f} µs: of the {cost:.1f}, {parts}"
    )


def hundred(bench: Bench) -> list[Row]:
    """100 users without a pause: locustfile.py, the textbook script, bare gevent."""
    windows = run_in_turn(bench, ["textbook script", "bare gevent"], 100, seconds=0.8)
    return [
        throughput_row(bench, 100, windows, "textbook script", 2.0),
        throughput_row(bench, 100, windows, "bare gevent", 1.1),
    ]


def thousand(bench: Bench) -> list[Row]:
    """1,000 users without a pause: locustfile.py and the textbook script."""
    windows = run_in_turn(bench, ["textbook script"], 1000, seconds=1.5)
    return [throughput_row(bench, 1000, windows, "textbook script", 2.0)]


def peers(bench: Bench) -> list[Row]:
    """Processor time a message, 100 users without a pause: locustfile.py, Tsung, tcpkali."""
    if "Tsung" not in installed_peers():
        raise BenchmarkError("Tsung is not on this machine: apt install tsung")
    windows = run_in_turn(bench, installed_peers(), 100, seconds=0.8)
    own, other = windows["ours"], windows["Tsung"]
    ratios = [another.cost / one.cost for one, another in zip(own, other, strict=True)]
    in_c = describe(windows["tcpkali"]) if "tcpkali" in windows else MISSING
    beside = (
        f"{describe(own)} to {describe(other)}, on all processors; {others(own + other)}; "
        f"tcpkali, which neither waits for echoes nor checks them: {in_c}"
    )
    what = "messages for a second of processor time, 100 users, over Tsung"
    row = Row(what, ratios, "{:.2f} ×", 1.0, beside=beside)
    return [with_what_it_takes(bench, row, own)]


# ----------------------------------------------------------------------------------- round trips


class Paced(NamedTuple):
    """What came of a generator with a rate."""

    window: Look
    percentiles: dict[int, float]
    late_us: float
    """How late the server's own answers were."""


def latency(bench: Bench) -> list[Row]:
    """Round trips and messages sent where 20 ms is true, 500 users with 5,000 messages a second."""
    users = bench.pick(500, 50)
    seconds = bench.pick(8, 2)
    runs: dict[str, list[Paced]] = {name: [] for name in (CLOSED, OPEN, *installed_peers())}
    for _ in range(bench.pick(5, 1)):
        for name, ended in runs.items():
            # The pause is 80 ms on the average; were it always the same, users would keep in step.
            generator = start(
                bench, name, users, "delay=20", pause="0.03-0.13", paced_seconds=seconds + 3
            )
            generator.wait_until_steady()
            window = watch(generator, seconds)
            late_us = generator.servers[0].counters()["late_us"]
            generator.finish_clean()
            ended.append(Paced(window, generator.percentiles(), late_us))
    rows = true_rows(CLOSED, runs[CLOSED])
    rows += true_rows(OPEN, runs[OPEN])
    if installed_peers():
        rows += beside_rows(runs)
    return [*rows, sent_row(users * RATE, runs)]


def true_rows(loop: str, runs: Sequence[Paced]) -> list[Row]:
    """Compare the round trips that are reported with those that are true."""
    rows = []
    for share, least, most in ((0, 19.95, 20.05), (50, -NO_LIMIT, 20.4), (99, -NO_LIMIT, 22)):
        values = [run.percentiles[share] for run in runs]
        what = f"round trip where 20 ms is true, {loop}, {NAMES[share]}"
        row = Row(what, values, "{:.2f} ms", least, most)
        rows.append(row._replace(beside=calmest(row, runs)))
    windows = [run.window for run in runs]
    beside = f"{describe(windows)}; {server_late(runs)}; {others(windows)}"
    rows[0] = rows[0]._replace(beside=joined(beside, rows[0].beside))
    return rows


def server_late(runs: Sequence[Paced]) -> str:
    """Return how late the server itself was."""
    late_us = median([run.late_us for run in runs])
    return f"the server is {late_us:.0f} µs late"


def joined(*texts: str) -> str:
    """Return those texts that are not empty as one."""
    return "; ".join(filter(None, texts))


def calmest(row: Row, runs: Sequence[Paced]) -> str:
    """Return nothing; where the aim is missed, what the machine and the server had to do with it.

    :param runs: that gave the values of the row, in their order
    """
    if row.is_reached:
        return ""
    taken = [max(0, run.window.others) for run in runs]
    least = min(taken)
    value = row.form.format(row.values[taken.index(least)])
    return (
        f"missed while other processes took up to {max(taken):.0%} of a processor, and "
        f"{server_late(runs)}: in the run in which they took least, {least:.0%}, it is {value}"
    )


def sent_row(due: int, runs: dict[str, list[Paced]]) -> Row:
    """Compare the messages that are sent with those that are due, in messages a second."""
    shares = {name: [run.window.rate / due * 100 for run in ended] for name, ended in runs.items()}
    what = f"open loop, sent of the {due:,} messages/s due"
    return Row(what, shares[OPEN], "{:.2f} %", 99.5, beside=of_peers(shares, "{:.2f} %"))


def beside_rows(runs: dict[str, list[Paced]]) -> list[Row]:
    """Compare the round trips of the open loop with those of the others at the same rate."""
    rows = []
    for share in (50, 99):
        values = {name: [run.percentiles[share] for run in ended] for name, ended in runs.items()}
        medians = {name: median(values[name]) for name in installed_peers()}
        best = min(medians, key=medians.__getitem__)
        what = f"open loop, {NAMES[share]}, no worse than {' and '.join(medians)}"
        row = Row(what, values[OPEN], "{:.1f} ms", most=medians[best])
        parts = [of_peers(values, "{:.1f} ms"), calmest(row, runs[OPEN])]
        if best == "tcpkali" and not row.is_reached:
            parts.append("tcpkali is in C and keeps no account of single messages")
        rows.append(row._replace(beside=joined(*parts)))
    return rows


def of_peers(values: dict[str, list[float]], form: str) -> str:
    """Return what the others make of it, those that do not wait for an echo and those that do."""
    texts = []
    for name in (CLOSED, "Tsung", "tcpkali"):
        known = name in values
        text = form.format(median(values[name])) if known else MISSING
        texts.append(f"{name} {text}")
    return ", ".join(texts)


def stall(bench: Bench) -> list[Row]:
    """A server that stands still 2 s of every 4, seen by all at the same time.

    Half of the messages fall due while it stands still and wait up to two seconds: so a quarter of
    all wait for more than one second.
    """
    seconds = bench.pick(24, 4)  # whole periods
    seen: dict[str, list[float]] = {name: [] for name in (OPEN, CLOSED, *installed_peers())}
    for _ in range(bench.pick(3, 1)):
        generators = {
            name: start(bench, name, 50, "stall=2000", pause="0.1", paced_seconds=seconds)
            for name in seen
        }
        for loop in (OPEN, CLOSED):
            generators[loop].wait_until_steady()
        time.sleep(seconds + 4)  # what was sent last is answered
        for name, generator in generators.items():
            generator.finish_clean()
            seen[name].append(generator.percentiles()[75] / 1000)
    what = "round trip where the server stands still 2 s of every 4, open loop, 75th percentile"
    beside = of_peers(seen, "{:.3f} s")
    return [Row(what, seen[OPEN], "{:.3f} s", 0.95, 1.05, beside)]


# -------------------------------------------------------------------------------------- delivery


def delivery(bench: Bench) -> list[Row]:
    """What plugins/delivery.py adds for a message that arrives, in a room of 50.

    Each message arrives at 49 others. Without the plugin they read it, too, and drop it.
    """
    users = 50
    windows: list[Look] = []
    whole: list[float] = []
    reading: list[float] = []
    for _ in range(bench.pick(6, 1)):
        for scripts, costs in (("plugins/delivery.py", whole), ("locustfile.py", reading)):
            server = Server(bench, "room=1")
            pause = ("--chat-wait", "0.15-0.35")
            locust = Locust(bench, users, [server], *pause, scripts=scripts)
            locust.wait_until_steady()
            windows.append(watch(locust, bench.pick(8, 2)))
            costs.append(windows[-1].cost / (users - 1))
            locust.finish_clean()
    added = [one - other for one, other in zip(whole, reading, strict=True)]
    rate = median([window.rate * (users - 1) for window in windows])
    beside = (
        f"with it {median(whole):.1f} µs, without {median(reading):.1f} µs; "
        f"one event of Locust {event_cost(bench):.1f} µs; {rate:,.0f} deliveries/s; "
        f"{others(windows)}"
    )
    return [
        Row(
            "processor time that plugins/delivery.py adds for a delivery, in a room of 50",
            added,
            "{:.1f} µs",
            most=10,
            beside=beside,
        )
    ]


# ---------------------------------------------------------------------------------------- growth

TOTAL_RATE = 2000  # messages a second, however many users share them
MOST_USERS = 50_000
SOURCES = "127.0.0.2,127.0.0.3,127.0.0.4,127.0.0.5"  # each has 28,000 ports


def start_crowd(bench: Bench, users: int, processes: int) -> Locust:
    """Return a run of so many users in so many processes, when all of them have sent a message.

    There are as many servers, which share a port, as they have the same limit of open files.
    """
    servers = [Server(bench)]
    while len(servers) < processes:
        servers.append(Server(bench, f"port={servers[0].port}"))
    pause = users / TOTAL_RATE
    port = free_port()  # not 5557, where the workers of another run could join in
    options = ["--processes", str(processes), "--master-bind-port", port, "--master-port", port]
    options += ["--chat-source", SOURCES, "--chat-wait", f"{0.8 * pause:.4f}-{1.2 * pause:.4f}"]
    locust = Locust(bench, users, servers, *options, limit=600)
    locust.wait_until_steady()
    return locust


def check_all_active(locust: Locust) -> None:
    """Raise BenchmarkError unless each user sends in time, on its first connection."""
    locust.counted("active")
    time.sleep(1.2 * locust.users / TOTAL_RATE + 2)
    active, accepted = locust.counted("active"), locust.counted("accepted")
    if not active == accepted == locust.users:
        raise locust.error(f"{active:.0f} of {locust.users} users sent, {accepted:.0f} connected")


def resident(locust: Locust) -> float:
    """Return the resident kilobytes of all its processes."""
    return float(sum(process.memory_info().rss for process in locust.processes()) / 1024)


def growth(bench: Bench) -> list[Row]:
    """How cost grows with the users, who send 2,000 messages a second in all.

    All numbers of users run at the same time: so whatever the machine does meets all alike.
    """
    most = bench.pick(MOST_USERS, 1000)
    processes = max(2, math.ceil(most / (bench.most_files - 1000)))
    empty = start_crowd(bench, processes, processes)
    time.sleep(bench.pick(10, 1))
    base = resident(empty)
    empty.finish_clean()
    crowds = {}
    for users in (most, most // 5, most // 50, most // 500):
        crowds[users] = start_crowd(bench, users, processes)
    windows: dict[int, list[Look]] = {users: [] for users in sorted(crowds)}
    memory: dict[int, list[float]] = {users: [] for users in windows}
    for _ in range(bench.pick(10, 2)):
        before = {users: locust.look() for users, locust in crowds.items()}
        time.sleep(bench.pick(4, 1))
        for users, locust in crowds.items():
            windows[users].append(locust.look().since(before[users]))
            memory[users].append((resident(locust) - base) / users)
    check_all_active(crowds[most])
    for locust in crowds.values():
        locust.finish_clean()
    costs = {users: [window.cost for window in windows[users]] for users in windows}
    picture = draw(costs, memory) if bench.writes else "not drawn, as it is not written"
    return [
        capacity_row(bench, most, processes, windows[most]),
        cost_row(costs),
        memory_row(memory, picture),
    ]


def capacity_row(bench: Bench, users: int, processes: int, windows: list[Look]) -> Row:
    """Say how many processes held the users; that each of them was echoed, was checked."""
    beside = f"{describe(windows)}; each user echoed, no failure"
    if processes > 2:
        beside += (
            f". A process may open {bench.most_files:,} files, which could not be raised: two "
            f"processes take a `ulimit -Hn` of {users // 2 + 1000:,}"
        )
    what = f"processes of one run that hold {users:,} users, with --chat-source"
    return Row(what, [processes], "{:.0f}", most=2, beside=beside)


def flat_row(what: str, figures: dict[int, list[float]], beside: str) -> Row:
    """Compare the figures of most users with the smallest, whatever number of users has it."""
    medians = {users: median(values) for users, values in figures.items()}
    most = max(medians)
    smallest = min(medians, key=medians.__getitem__)
    ratios = [many / few for many, few in zip(figures[most], figures[smallest], strict=True)]
    what = f"{what}, {most:,} users over {smallest:,}, where it is smallest"
    return Row(what, ratios, "{:.2f} ×", most=1.5, beside=beside)


def cost_row(costs: dict[int, list[float]]) -> Row:
    """Compare the processor time a message."""
    each = ", ".join(f"{users:,} users {median(costs[users]):.0f}" for users in costs)
    beside = f"{each} µs: all that the run uses, Locust's master and its waiting included"
    return flat_row("processor time a message", costs, beside)


def memory_row(memory: dict[int, list[float]], picture: str) -> Row:
    """Compare the memory a user."""
    each = ", ".join(f"{users:,} users {median(memory[users]):.1f}" for users in memory)
    beside = f"{each} KB over a run with a user in each process; {picture}"
    return flat_row("resident memory a user", memory, beside)


def draw(costs: dict[int, list[float]], memory: dict[int, list[float]]) -> str:
    """Draw growth.png; return that it is drawn, or what it takes."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return "to draw it: pip install -r benchmarks/requirements.txt"
    users = sorted(costs)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    labels = [f"{count:,}" for count in users]
    left.boxplot([costs[count] for count in users], tick_labels=labels)
    left.set_title(f"Processor time a message, {TOTAL_RATE:,} messages/s in all")
    left.set_ylabel("µs")
    right.boxplot([memory[count] for count in users], tick_labels=labels)
    right.set_title("Resident memory a user")
    right.set_ylabel("KB")
    for panel in (left, right):
        panel.set_ylim(0, 1.2 * panel.get_ylim()[1])
        panel.set_xlabel("users")
        panel.grid(alpha=0.3)
    figure.savefig(FOLDER / "growth.png", dpi=100)
    pyplot.close(figure)
    return "drawn below"


# ------------------------------------------------------------------------------------------ soak


class Holdings(NamedTuple):
    """What a process holds."""

    megabytes: float
    files: float
    sockets: float


def holdings(locust: Locust) -> list[Holdings]:
    """Return some looks within three seconds, as connections come and go."""
    (process,) = locust.processes()
    looks = []
    for _ in range(11):
        megabytes = process.memory_info().rss / 1e6
        sockets = len(process.net_connections("tcp"))
        looks.append(Holdings(megabytes, process.num_fds(), sockets))
        time.sleep(0.3)
    return looks


def memory_course(course: dict[float, list[Holdings]]) -> str:
    """Return the memory at each time, so that a line that flattens is seen.

    :param course: what was held, by the seconds since all users were there
    """
    megabytes = [median([look.megabytes for look in looks]) for looks in course.values()]
    memory = ", ".join(f"{each:.1f}" for each in megabytes)
    times = ", ".join(f"{seconds / 60:.2g}" for seconds in course)
    return f"{memory} MB at {times} minutes"


def soak(bench: Bench) -> list[Row]:
    """A long run in open loop, in a room with accounting, whose server closes connections."""
    users = bench.pick(50, 10)
    seconds = bench.pick(600, 10)
    server = Server(bench, "room=1", f"drop={bench.pick(50, 5)}")
    scripts = "plugins/delivery.py"
    limit = seconds + 300
    locust = Locust(bench, users, [server], "--chat-rate", "1", scripts=scripts, limit=limit)
    locust.wait_until_steady()
    begin = time.monotonic()
    course = {}
    for due in (0.1 * seconds, 0.4 * seconds, 0.7 * seconds, 1.0 * seconds):
        time.sleep(max(0, begin + due - time.monotonic()))
        course[due] = holdings(locust)
    deliveries = locust.finish_statistics()["delivery"]
    if deliveries["num_failures"]:
        raise BenchmarkError(f"{deliveries['num_failures']} deliveries failed")
    counted = server.counters()
    beside = (
        f"{memory_course(course)}; {counted['lines']:,.0f} messages, "
        f"{counted['accepted']:,.0f} connections, {deliveries['num_requests']:,} deliveries"
    )
    what = "growth of the resident memory, open loop, with reconnects and delivery"
    first, *_, last = course.values()
    grown = [Holdings(*map(sub, now, then)) for now, then in zip(last, first, strict=True)]
    return [
        Row(what, [each.megabytes for each in grown], "{:+.1f} MB", most=1, beside=beside),
        Row("growth of the open files", [each.files for each in grown], "{:+.0f}", most=0),
        Row("growth of the sockets", [each.sockets for each in grown], "{:+.0f}", most=0),
    ]


COMPARISONS: dict[str, Callable[[Bench], list[Row]]] = {
    "hundred": hundred,
    "thousand": thousand,
    "peers": peers,
    "latency": latency,
    "stall": stall,
    "delivery": delivery,
    "growth": growth,
    "soak": soak,
}
