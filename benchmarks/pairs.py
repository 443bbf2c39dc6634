"""Compare two versions of locustfile.py: processor time a message, messages a second.

    git show HEAD:locustfile.py > /tmp/before.py
    .venv/bin/python benchmarks/pairs.py /tmp/before.py locustfile.py --users 100
    .venv/bin/python benchmarks/pairs.py /tmp/before.py locustfile.py --users 100 --tls
    .venv/bin/python benchmarks/pairs.py /tmp/before.py locustfile.py --users 500 --rate 10

Both run in this one process, each with an echo server of its own, in slices of 0.2 s in turn: so
whatever else the machine does meets both. A slice is longer where it takes longer until there are
as many messages as users. Printed are the medians of the ratios of neighbouring slices,
second file to first, with their quartiles.
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gevent
from gevent.event import Event
from harness import FOLDER, Bench, BenchmarkError, Server
from locust.env import Environment
from locust.event import Events
from locust.user import User

SLICE = 0.2  # seconds, at least
WARM_UP = 0.1  # seconds before each: users find into their schedule
SETTLING = 0.02  # seconds after each: what is still in flight comes home
SLICE_LIMIT = 30  # seconds until each user has sent a message
MIX = ("short_message",) * 5 + ("long_message",) * 2 + ("very_long_message",)


class Figures(NamedTuple):
    """What one slice gave."""

    microseconds: float
    """Of the processor, for a message."""
    rate: float
    """Messages a second."""


class Side:
    """The users of one version, who chat while they may.

    :param path: of the version
    :param host: where to
    :param rate: messages a second of each user, in open loop; None: without a pause
    """

    def __init__(self, path: Path, host: str, users: int, rate: float | None) -> None:
        self._rate = rate
        self._may_chat = Event()
        self._messages = 0
        self._environment = Environment(events=Events(), host=host)
        self._environment.create_local_runner()  # its statistics listen
        user_class = load_user_class(path, rate)
        self._users = [user_class(self._environment) for _ in range(users)]
        starting = [gevent.spawn(user.on_start) for user in self._users]
        gevent.joinall(starting, raise_error=True)
        for number, user in enumerate(self._users):
            gevent.spawn(self._chat, user, number)

    def _chat(self, user: User, start: int) -> None:
        """Send message after message; between two, sleep as Locust does between two tasks."""
        for number in itertools.count(start):
            if not self._may_chat.is_set():
                self._wait_for_slice(user)
            send = getattr(user, MIX[number % len(MIX)])
            send()
            self._messages += 1
            gevent.sleep(0 if self._rate is None else user.wait_time())

    def _wait_for_slice(self, user: User) -> None:
        """Return when the user may chat. In open loop, what fell due meanwhile is left out."""
        self._may_chat.wait()
        if self._rate is None:
            return
        pause = 0.0
        while not pause:
            pause = user.wait_time()
        gevent.sleep(pause)

    def run_a_slice(self) -> Figures:
        """Let the users chat for a slice."""
        self._may_chat.set()
        gevent.sleep(WARM_UP)
        messages = self._messages
        used = time.process_time()
        started = time.perf_counter()
        self._chat_for_a_slice()
        used = time.process_time() - used
        seconds = time.perf_counter() - started
        messages = self._messages - messages
        self._may_chat.clear()
        gevent.sleep(SETTLING)
        return Figures(used / messages * 1e6, messages / seconds)

    def _chat_for_a_slice(self) -> None:
        """Return after a slice, when as many messages were sent as there are users."""
        enough = self._messages + len(self._users)
        limit = time.perf_counter() + SLICE_LIMIT
        gevent.sleep(SLICE)
        while self._messages < enough:
            if time.perf_counter() > limit:
                raise BenchmarkError(f"not every user has sent a message in {SLICE_LIMIT} s")
            gevent.sleep(SLICE / 10)

    @property
    def errors(self) -> int:
        """How many requests have failed."""
        errors = self._environment.stats.errors.values()
        return sum(error.occurrences for error in errors)


def load_user_class(path: Path, rate: float | None) -> type[User]:
    """Return the ``ChatClient`` of a locustfile that may stand anywhere, with this rate."""
    name = f"version_{len(sys.modules)}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    user_class: type[User] = type("PairedClient", (module.ChatClient,), {"rate": rate})
    return user_class


# ------------------------------------------------------------------------------------ the servers


def make_certificate(bench: Bench) -> Path:
    """Return a file with a certificate for 127.0.0.1 and its key, trusted from now on."""
    path = bench.new_path()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", "-"]
    try:
        certificate = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        sys.exit("no certificate: install openssl, of version 1.1.1 or later")
    with path.open("ab") as file:
        file.write(certificate)
    os.environ["SSL_CERT_FILE"] = str(path)
    return path


def start_tls_server(bench: Bench, certificate: Path) -> str:
    """Start ``tls_server.py``; return where it listens."""
    command = [sys.executable, str(FOLDER / "tls_server.py"), str(certificate)]
    server = bench.start(command, {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    return f"tls://127.0.0.1:{int(server.stdout.readline())}"


def start_servers(bench: Bench, *, tls: bool) -> list[str]:
    """Start a server for each version; return where they listen."""
    if not tls:
        return [Server(bench).host for _ in range(2)]
    certificate = make_certificate(bench)
    return [start_tls_server(bench, certificate) for _ in range(2)]


# --------------------------------------------------------------------------------- the comparison


class Comparison(NamedTuple):
    """The slices of both versions, in pairs of neighbours."""

    first: list[Figures]
    second: list[Figures]

    def ratios(self, name: str) -> list[float]:
        """Return the ratios of neighbours, second to first, of one of the ``Figures``."""
        pairs = zip(self.first, self.second, strict=True)
        return [getattr(later, name) / getattr(earlier, name) for earlier, later in pairs]

    def microseconds(self) -> list[float]:
        """Return the median of each version."""
        sides = (self.first, self.second)
        return [statistics.median([each.microseconds for each in side]) for side in sides]


def compare(first: Side, second: Side, slices: int) -> Comparison:
    """Run both in turn."""
    comparison = Comparison([], [])
    for side in (first, second):
        side.run_a_slice()  # which warms up
    for number in range(slices):
        if number % 2:
            comparison.first.append(first.run_a_slice())
            comparison.second.append(second.run_a_slice())
        else:
            comparison.second.append(second.run_a_slice())
            comparison.first.append(first.run_a_slice())
    return comparison


def with_quartiles(ratios: Sequence[float]) -> str:
    """Return the median and the quartiles of some ratios."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} × ({low:.3f} to {high:.3f})"


def report(comparison: Comparison, errors: list[int]) -> str:
    """Return what there is to print."""
    first, second = comparison.microseconds()
    lines = [
        f"processor time a message: {with_quartiles(comparison.ratios('microseconds'))}",
        f"microseconds: {first:.1f}, {second:.1f}",
        f"messages a second: {with_quartiles(comparison.ratios('rate'))}",
        f"failed requests: {errors[0]}, {errors[1]}",
    ]
    return "\n".join(lines)


def report_for_programs(comparison: Comparison, errors: list[int]) -> str:
    """Return the same as JSON, with all ratios of the processor time."""
    return json.dumps(
        {
            "ratios": comparison.ratios("microseconds"),
            "microseconds": comparison.microseconds(),
            "errors": errors,
        }
    )


def main() -> None:
    """Compare as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare two versions of locustfile.py.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--slices", type=int, choices=range(2, 10_000), default=60, metavar="N")
    parser.add_argument("--rate", type=float, help="messages a second of each user, in open loop")
    parser.add_argument("--tls", action="store_true", help="over TLS; needs openssl")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with Bench() as bench:
        hosts = start_servers(bench, tls=options.tls)
        first = Side(options.first, hosts[0], options.users, options.rate)
        second = Side(options.second, hosts[1], options.users, options.rate)
        comparison = compare(first, second, options.slices)
        errors = [first.errors, second.errors]
    text = report_for_programs if options.json else report
    print(text(comparison, errors))


if __name__ == "__main__":
    main()
