"""Measure locustfile.py beside other load generators and print one table; ``README.md`` explains
it.

    python benchmarks/run.py                        everything: 10 minutes, and 10 more of soak
    python benchmarks/run.py --quick                short runs with few users, to see that
    everything works python benchmarks/run.py --only room latency    single comparisons

A full run of everything writes the table into ``RESULTS.md``, any other only where ``--output``
says."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from harness import (
    FOLDER,
    Bench,
    BenchmarkError,
    Generator,
    Locust,
    Server,
    Window,
    disturbance,
    exact_figures,
    free_port,
    holdings,
    processor_seconds,
    watch,
    watch_in_turn,
)
from texts import mixed_lines
from tsung import Tsung, tsung_is_installed


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figure: str
    least: str = ""
    """The goal."""
    aim: str = ""
    """What would be better than the goal."""
    details: str = ""


def ours(
    bench: Bench,
    users: int,
    server: Server,
    wait: str = "0",
    rate: float = 0,
    scripts: str = "locustfile.py",
    **more: Any,
) -> Locust:
    """Return locustfile.py under way.

    :param wait: seconds between two messages of a user, ``2`` or ``0.5-2``
    :param rate: users to start a second, if not all at once, up to 1,000
    :param scripts: what to run instead of locustfile.py
    :param more: ``limit`` of ``Locust``; the variable EXACT_FILE asks for exact round trips
    """
    if "EXACT_FILE" in more:
        scripts += ",benchmarks/exact.py"
    options = ("--host", server.host, "--chat-wait", wait)
    return Locust(bench, users, [server], scripts, *options, rate=rate or min(users, 1000), **more)


def textbook(
    bench: Bench, users: int, server: Server, wait: str = "0", rate: float = 0, **more: Any
) -> Locust:
    """Return the textbook script under way; the parameters are those of ``ours``."""
    scripts = (
        "benchmarks/textbook.py,benchmarks/exact.py"
        if "EXACT_FILE" in more
        else "benchmarks/textbook.py"
    )
    more |= {"rate": rate or min(users, 1000), "TEXTBOOK_WAIT": wait}
    return Locust(bench, users, [server], scripts, "--host", server.host, **more)


def median(values: Iterable[float]) -> float:
    """Return the median, also of an iterator."""
    return statistics.median(values)


def ratios(
    ones: list[Window], others: list[Window], quantity: Callable[[Window], float]
) -> tuple[str, str]:
    """Return the median of the pairwise ratios of a quantity; and their number and range, and what
    disturbed them."""
    sizes = sorted(quantity(one) / quantity(other) for one, other in zip(ones, others, strict=True))
    disturbed = f"other processes used up to {max(0, disturbance(ones + others)):.0%}"
    return (
        f"{median(sizes):.2f} ×",
        f"{len(sizes)} pairs, {sizes[0]:.2f} to {sizes[-1]:.2f} ×; {disturbed}",
    )


def rates(windows: list[Window]) -> list[float]:
    """Return the messages a second of each window."""
    return [window.rate for window in windows]


def costs(windows: list[Window]) -> list[float]:
    """Return the processor microseconds a message of each window."""
    return [window.cost for window in windows]


def compared(own: list[Window], others: list[Window]) -> tuple[str, str]:
    """Return how the messages a second compare, and what that is made of."""
    figure, pairs = ratios(own, others, lambda window: window.rate)
    # Near 100 %, the server would be the bottleneck.
    busy = max(median(each.server / each.seconds for each in windows) for windows in (own, others))
    return (
        figure,
        f"{median(rates(own)):,.0f}/s to {median(rates(others)):,.0f}/s; {pairs}; "
        f"server {busy:.0%} busy",
    )


STARTERS: dict[str, Callable[..., Locust]] = {"ours": ours, "textbook": textbook}


def hundred(bench: Bench) -> list[Row]:
    """Messages a second, 100 users without a pause: locustfile.py, the textbook script, bare
    gevent."""
    windows: dict[str, list[Window]] = {"ours": [], "textbook": [], "bare": []}
    for _ in range(bench.rounds):
        mine, theirs = (
            ours(bench, 100, Server(bench, "echo")),
            textbook(bench, 100, Server(bench, "echo")),
        )
        server = Server(bench, "echo")
        command = [sys.executable, "benchmarks/bare_gevent.py", str(server.port), "100", "300"]
        bare = Generator(bench, 100, [server], command)
        measured = watch_in_turn({"ours": mine, "textbook": theirs, "bare": bare}, bench.turns, 0.8)
        for name in windows:
            windows[name] += measured[name]
        mine.finish_clean()
        theirs.finish_clean()
        bare.check(json.loads(bare.finish())["messages"])
    what = "messages echoed a second, 100 users, over the textbook script"
    figure, details = compared(windows["ours"], windows["textbook"])
    bare_figure, bare_details = compared(windows["ours"], windows["bare"])
    return [
        Row(what, figure, "1.5 ×", "2 ×", details),
        Row(
            "the same, over bare gevent with its time-out",
            bare_figure,
            "0.75 ×",
            "1 ×",
            bare_details,
        ),
    ]


def thousand(bench: Bench) -> list[Row]:
    """Messages a second, 1,000 users without a pause."""
    windows: dict[str, list[Window]] = {"ours": [], "textbook": []}
    for _ in range(bench.rounds):
        generators = {
            name: start(bench, 1000, Server(bench, "echo")) for name, start in STARTERS.items()
        }
        measured = watch_in_turn(generators, bench.turns, 1.5)
        for name, generator in generators.items():
            windows[name] += measured[name]
            generator.finish_clean()
    figure, details = compared(windows["ours"], windows["textbook"])
    return [
        Row(
            "messages echoed a second, 1,000 users, over the textbook script",
            figure,
            "1.3 ×",
            "1.8 ×",
            details,
        )
    ]


def peers(bench: Bench) -> list[Row]:
    """Messages for a second of processor time, 100 users without a pause: locustfile.py, and Tsung
    on all cores."""
    what, least, aim = (
        "messages for a second of processor time, 100 users, over Tsung",
        "1.2 ×",
        "1.5 ×",
    )
    if not tsung_is_installed():
        return [Row(what, "left out: not installed", least, aim)]
    windows: dict[str, list[Window]] = {"ours": [], "tsung": []}
    for _ in range(bench.rounds):
        mine, tsung = (
            ours(bench, 100, Server(bench, "echo")),
            Tsung(bench, 100, Server(bench, "echo")),
        )
        measured = watch_in_turn({"ours": mine, "tsung": tsung}, bench.turns, 0.8)
        for name in windows:
            windows[name] += measured[name]
        mine.finish_clean()
        tsung.finish()
    figure, pairs = ratios(windows["tsung"], windows["ours"], lambda window: window.cost)
    absolute = " to ".join(f"{1e6 / median(costs(each)):,.0f}" for each in windows.values())
    return [Row(what, figure, least, aim, f"{absolute}; {pairs}")]


def share(bench: Bench) -> list[Row]:
    """What Locust itself takes of a message's processor time, for its tasks and two events: users
    that send nothing, beside those of locustfile.py; 100 of them, without a pause."""
    locust_costs, own = [], []
    for _ in range(bench.rounds):
        mine, file = ours(bench, 100, Server(bench, "echo")), bench.new_file()
        mine.wait_until_steady()
        seconds = bench.scaled(40) / 10
        own.append(watch({"ours": mine}, seconds)["ours"])
        mine.finish_clean()
        hollow = Locust(bench, 100, [], "benchmarks/hollow.py", rate=100, HOLLOW_FILE=str(file))
        time.sleep(seconds + 2)  # two of them to start
        hollow.finish()
        locust_costs.append(Window(**json.loads(file.read_text()), server=0).cost)
    locust, whole, kernel = (
        median(locust_costs),
        median(costs(own)),
        median(each.system / each.lines for each in own),
    )
    details = (
        f"{locust:.1f} of {whole:.1f} µs a message; the kernel, with sockets: {kernel * 1e6:.1f} µs"
    )
    return [
        Row(
            "Locust's own share of the processor time, 100 users",
            f"{locust / whole:.0%}",
            details=details,
        )
    ]


def memory(bench: Bench) -> list[Row]:
    """Resident memory (RSS) of users that have sent a message and wait: the growth from 1 user to
    4,000, a user."""
    users = bench.scaled(4000)
    per_user: dict[str, list[float]] = {"ours": [], "textbook": []}
    for _ in range(bench.rounds):
        pairs = {
            name: [start(bench, count, Server(bench, "echo"), "1000") for count in (1, users)]
            for name, start in STARTERS.items()
        }
        for generator in (*pairs["ours"], *pairs["textbook"]):
            generator.wait_until_steady()
        time.sleep(2)
        for name, pair in pairs.items():
            one, many = (
                psutil.Process(generator.process.pid).memory_info().rss for generator in pair
            )
            per_user[name].append((many - one) / (users - 1) / 1024)
            for generator in pair:
                generator.finish_clean()
    what = f"resident memory a user, {users:,} users waiting"
    details = f"textbook {median(per_user['textbook']):.1f} KB"
    return [Row(what, f"{median(per_user['ours']):.1f} KB", "22 KB", "16 KB", details)]


def idle(bench: Bench) -> list[Row]:
    """Processor time at 4,000 users that send every 5 s. One script runs after the other: side by
    side they would drive each other's data out of the processor's caches. They cannot be paused
    either, as all users would be late then."""
    users = bench.scaled(4000)
    windows: dict[str, list[Window]] = {"ours": [], "textbook": []}
    for _ in range(bench.rounds):
        for name, start in STARTERS.items():
            # Users are started all through the first five seconds, and so go on sending all the
            # time, not in one burst.
            generator = start(bench, users, Server(bench, "echo"), "5", rate=users / 5)
            generator.wait_until_steady()
            time.sleep(5)
            windows[name] += [watch({name: generator}, 8)[name] for _ in range(2)]
            generator.finish_clean()
    figure, pairs = ratios(windows["ours"], windows["textbook"], lambda window: window.cost)
    absolute = " to ".join(
        f"{median(window.share for window in measured):.1%}" for measured in windows.values()
    )
    what = f"processor time, {users:,} users sending every 5 s, over the textbook script"
    rate = f"{median(rates(windows['ours'])):,.0f} messages/s each"
    return [Row(what, figure, "not more", "0.7 ×", f"{absolute} of a processor; {rate}; {pairs}")]


def capacity(bench: Bench) -> list[Row]:
    """Users of one run with two worker processes, each sending every 10 s: as many as wanted, or
    else fewer."""
    problems: list[str] = []
    for users in map(bench.scaled, (25_000, 15_000)):
        try:
            details = "; ".join([hold(bench, users), *problems])
            return [
                Row("users in one run of two processes", f"{users:,}", "15,000", "25,000", details)
            ]
        except BenchmarkError as error:
            problems.append(f"not {users:,}: {error}")
            bench.end_all()
    raise BenchmarkError("; ".join(problems))


def hold(bench: Bench, users: int) -> str:
    """Hold so many users and say how it went; raise BenchmarkError unless all are echoed and no
    request fails."""
    servers = [Server(bench, "echo"), Server(bench, "echo")]
    port = free_port()  # not 5557, where the workers of another test could join in
    options = (
        "--processes",
        "2",
        "--master-bind-port",
        port,
        "--master-port",
        port,
        "--chat-wait",
        "10",
    )
    hosts = " ".join(server.host for server in servers)
    locust = Locust(
        bench, users, servers, "benchmarks/spread.py", *options, rate=1000, SPREAD_HOSTS=hosts
    )
    locust.wait_until_steady()
    seconds = 12  # everyone's turn comes within the 10 s of the pause and the time of an echo
    before = locust.look()
    time.sleep(seconds)
    counted = [server.counters() for server in servers]
    active, accepted = (
        sum(counters[name] for counters in counted) for name in ("active", "accepted")
    )
    share = (sum(processor_seconds(locust.process.pid)) - sum(before[2:4])) / seconds
    resident = (
        sum(child.memory_info().rss for child in psutil.Process(locust.process.pid).children())
        / 1e6
    )
    if active != users or accepted != users:
        raise locust.error(
            f"{active:.0f} of {users} users sent within {seconds} s, {accepted:.0f} connections"
        )
    lines = sum(counters["lines"] for counters in counted) - before[1]
    locust.finish_clean()
    return (
        f"{lines / seconds:,.0f} messages/s, {share:.0%} of a processor, "
        f"workers {resident:,.0f} MB, no failures"
    )


def latency(bench: Bench) -> list[Row]:
    """Reported round trips with a server that answers after 20 ms: 500 users, about 5,000 messages
    a second. The C client shows what machine and server add, and how far a generator is from it."""
    users, rate, seconds = bench.scaled(500), bench.scaled(5000), 7
    figures: dict[str, list[dict[str, float]]] = {"ours": [], "textbook": [], "C client": []}
    windows = []
    for _ in range(bench.rounds):
        for name, start in STARTERS.items():
            server, file = Server(bench, "delay", 20), bench.new_file()
            # 80 ms on the average; with a pause always the same, users would stay in step, and send
            # at once.
            locust = start(bench, users, server, "0.03-0.13", rate=users / 4, EXACT_FILE=str(file))
            locust.wait_until_steady()
            windows.append(watch({name: locust}, seconds)[name])
            locust.finish_clean()
            figures[name].append(exact_figures(file))
        if bench.client is not None:
            server = Server(bench, "delay", 20)
            command = [bench.client, str(server.port), str(users), str(rate), str(seconds + 1)]
            result = subprocess.run(
                command, input=b"".join(mixed_lines()), stdout=subprocess.PIPE, timeout=60
            )
            figures["C client"].append(json.loads(result.stdout))
            if server.counters()["lines"] != figures["C client"][-1]["sent"]:
                raise BenchmarkError(
                    "the C client has sent other messages than the server received"
                )
    texts = {
        name: " / ".join(
            f"{median(each[key] for each in measured):.1f}"
            for key in ("min", "median", "p95", "p99")
        )
        for name, measured in figures.items()
        if measured
    }
    what = (
        f"reported round trip where 20 ms is true, {users} users: "
        "minimum / median / 95th / 99th percentile"
    )
    beside = "; ".join(f"{name} {text}" for name, text in texts.items() if name != "ours")
    details = (
        f"{beside}; {median(rates(windows)):,.0f} messages/s; "
        f"medians of runs in turn, {bench.rounds} each"
    )
    return [
        Row(
            what,
            f"{texts['ours']} ms",
            "20.0 / under 20.5 / – / under 25 ms",
            "99th under 22 ms",
            details,
        )
    ]


def room(bench: Bench) -> list[Row]:
    """A room of 50 users that send about one message a second, each of them delivered to all, to
    its sender last and 50 ms later: the processor share of the generator, and how far the reported
    round trip is from those 50 ms."""
    users, delay = 50, 50
    figures: dict[str, list[dict[str, float]]] = {"ours": [], "textbook": []}
    windows: dict[str, list[Window]] = {"ours": [], "textbook": []}
    for _ in range(bench.rounds):
        for name, start in STARTERS.items():
            file = bench.new_file()
            # With the 50 ms of the echo, a second between two messages.
            locust = start(
                bench, users, Server(bench, "room", delay), "0.45-1.45", EXACT_FILE=str(file)
            )
            locust.wait_until_steady()
            windows[name].append(watch({name: locust}, 8)[name])
            locust.finish_clean()
            figures[name].append(exact_figures(file))

    def error(name: str, key: str) -> str:
        return f"{median(each[key] for each in figures[name]) - delay:+.1f} ms"

    def used(name: str) -> str:
        return f"{median(window.share for window in windows[name]):.1%}"

    beside = (
        f"99th percentile {error('ours', 'p99')}; "
        f"textbook {error('textbook', 'median')}, its 99th percentile "
    )
    deliveries = (
        f"{users * median(rates(windows['ours'])):,.0f} deliveries/s; textbook {used('textbook')}"
    )
    return [
        Row(
            f"error of the reported median round trip in a room of {users} users, "
            f"where {delay} ms is true",
            error("ours", "median"),
            details=beside + error("textbook", "p99"),
        ),
        Row("the same room, share of a processor", used("ours"), details=deliveries),
    ]


def tls(bench: Bench) -> list[Row]:
    """Messages for a second of the generator's processor time with TLS, over those without; 100
    users without a pause, both against the Python server, as the other has no TLS."""
    what, openssl = (
        "messages for a second of processor time with TLS, over those without",
        shutil.which("openssl"),
    )
    if openssl is None:
        return [Row(what, "left out: no openssl to make a certificate with")]
    file = bench.new_file()
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
        "-nodes -days 2 -subj /CN=benchmark"
    )
    names = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "keyUsage=critical,digitalSignature,keyCertSign",
        "-keyout",
        "-",
        "-out",
        "-",
    ]
    file.write_bytes(
        subprocess.run([*command.split(), *names], capture_output=True, check=True).stdout
    )
    windows: dict[str, list[Window]] = {"with": [], "without": []}
    for _ in range(bench.rounds):
        server = Server(bench, "tls", python=True, CERTIFICATE=str(file))
        server.host = f"tls://{server.host}"
        secure = ours(bench, 100, server, SSL_CERT_FILE=str(file))
        plain = ours(bench, 100, Server(bench, "echo", python=True))
        measured = watch_in_turn({"with": secure, "without": plain}, bench.turns, 0.8)
        for name in windows:
            windows[name] += measured[name]
        secure.finish_clean()
        plain.finish_clean()
    figure, pairs = ratios(windows["without"], windows["with"], lambda window: window.cost)
    absolute = " to ".join(f"{median(costs(each)):.1f}" for each in windows.values())
    return [Row(what, figure, details=f"{absolute} µs a message; {pairs}")]


def delivery(bench: Bench) -> list[Row]:
    """What plugins/delivery.py adds to the generator's processor time for a message that arrives.

    That is in a room of 50 users, with the plugin and without; and Locust's share of it, that is,
    what one event costs.
    """
    users, windows = 50, dict[str, list[Window]](with_it=[], without=[])
    for _ in range(bench.rounds):
        for name, scripts in {
            "with_it": "plugins/delivery.py",
            "without": "locustfile.py",
        }.items():
            locust = ours(bench, users, Server(bench, "room"), "0.15-0.35", scripts=scripts)
            locust.wait_until_steady()
            windows[name].append(watch({name: locust}, 8)[name])
            locust.finish_clean()
    whole, reading = (
        median(each.cost for each in measured) / (users - 1) for measured in windows.values()
    )
    events = [
        subprocess.check_output([sys.executable, "benchmarks/event.py"], text=True)
        for _ in range(bench.rounds)
    ]
    event = median(map(float, events))
    deliveries = f"{median(rates(windows['with_it'])) * (users - 1):,.0f} deliveries/s"
    parts = (
        f"with it {whole:.1f} µs, without {reading:.1f} µs; "
        f"one event of Locust {event:.1f} µs ({event / whole:.0%})"
    )
    what = "processor time that plugins/delivery.py adds for a message that arrives"
    return [Row(what, f"{whole - reading:.1f} µs", details=f"{deliveries}; {parts}")]


def soak(bench: Bench, minutes: float) -> list[Row]:
    """What a long run holds at the beginning and at the end of its steady part: resident memory,
    open files, sockets; and the same where the server closes each connection after 20 messages.
    Both run at the same time."""
    users, seconds = 200, minutes * 60
    steady, limit = min(60, seconds / 5), seconds + 300
    generators = {
        "soak": ours(bench, users, Server(bench, "echo"), "0.05-0.15", limit=limit),
        "soak, the server closes connections": ours(
            bench, users, Server(bench, "drop", 20), "0.05-0.15", limit=limit
        ),
    }
    started = time.monotonic()
    for generator in generators.values():
        generator.wait_until_steady()
    time.sleep(steady)
    before = {name: holdings(generator) for name, generator in generators.items()}
    time.sleep(max(0, started + seconds - time.monotonic()))
    after = {name: holdings(generator) for name, generator in generators.items()}
    rows = []
    for name, locust in generators.items():
        (memory_then, *files_then), (memory_now, *files_now) = before[name], after[name]
        files, sockets = (
            f"{now - then:+.0f}" for now, then in zip(files_now, files_then, strict=True)
        )
        figure = f"{memory_now - memory_then:+.1f} MB, {files} files, {sockets} sockets"
        entries = locust.finish_statistics()
        locust.check(
            entries["echo_response"]["num_requests"] - entries["echo_response"]["num_failures"]
        )
        failures = sum(entry["num_failures"] for entry in entries.values())
        details = (
            f"from {memory_then:.1f} MB, {files_then[0]:.0f} files, {files_then[1]:.0f} sockets; "
            f"{minutes:g} minutes, {users} users, {locust.counted('lines'):,.0f} messages, "
            f"{locust.counted('accepted'):,.0f} connections, "
            f"{failures:,} failures"
        )
        rows.append(Row(name, figure, "no growth", "", details))
    return rows


COMPARISONS: dict[str, Callable[[Bench], list[Row]]] = {
    "hundred": hundred,
    "thousand": thousand,
    "peers": peers,
    "share": share,
    "memory": memory,
    "idle": idle,
    "capacity": capacity,
    "latency": latency,
    "room": room,
    "delivery": delivery,
    "tls": tls,
}


def conditions(bench: Bench) -> str:
    """Return date, versions and machine: without them, the figures say little."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), model
        )
    versions = ", ".join(f"{name} {version(name.lower())}" for name in ("Locust", "gevent"))
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC · "
        f"{platform.python_implementation()} {platform.python_version()}, {versions} · "
        f"{os.cpu_count()} processors ({model}), {platform.system()} "
        f"{platform.release()} · load before: {load} · server: {bench.server_name}"
    )


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    heads = Row("what", "measured", "at least", "aim", "details")
    lines = [heads, Row(*["---"] * 5), *rows]
    return "".join(
        f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |\n"
        for line in lines
    )


def main() -> int:
    """Run what is asked for; return 1 if a comparison failed, else 0."""
    parser = argparse.ArgumentParser(
        description="Measure locustfile.py beside other load generators."
    )
    parser.add_argument(
        "--quick", action="store_true", help="short runs with few users: no figures, only a trial"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*COMPARISONS, "soak"], metavar="NAME", help="%(choices)s"
    )
    parser.add_argument(
        "--soak-minutes", type=float, default=10, help="length of the soak (default 10)"
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (default RESULTS.md, for a full run only)"
    )
    options = parser.parse_args()
    output = options.output or (None if options.quick or options.only else FOLDER / "RESULTS.md")
    for number in (signal.SIGINT, signal.SIGTERM):  # so that what was started is ended
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower one that it does not tell
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (hard_limit, hard_limit)
        )  # for the generators to inherit
    rows, failed = [], False
    with Bench(options.quick) as bench:
        text = f"# Results\n\n{conditions(bench)}\n\n"
        minutes = 0.5 if options.quick else options.soak_minutes
        comparisons = COMPARISONS | {"soak": lambda bench: soak(bench, minutes)}
        for name in options.only or comparisons:
            print(f"{name} …", file=sys.stderr)
            try:
                rows += comparisons[name](bench)
            except Exception as error:  # whatever it is, the other comparisons can still be made
                traceback.print_exc()
                rows.append(Row(name, "failed", details=f"{type(error).__name__}: {error}"))
                failed = True
            bench.end_all()
            if output is not None:  # after each, as a later one may take long
                output.write_text(text + table(rows), "utf-8")
    print(text + table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
