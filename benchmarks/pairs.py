"""Compare two versions of locustfile.py: processor time a message, messages a second.

    git show HEAD:locustfile.py > /tmp/before.py
    .venv/bin/python benchmarks/pairs.py /tmp/before.py locustfile.py --users 100

Both run in this one process, each with an echo server of its own, in slices of 0.2 s in turn: so
whatever else the machine does meets both. Printed are the medians of the ratios of neighbouring
slices, second file to first, with their quartiles.
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gevent
from gevent.event import Event
from harness import Bench, Server
from locust.env import Environment
from locust.event import Events
from locust.user import User

SLICE = 0.2  # seconds
MIX = ("short_message",) * 5 + ("long_message",) * 2 + ("very_long_message",)


class Figures(NamedTuple):
    """What one slice gave."""

    microseconds: float
    """Of the processor, for a message."""
    rate: float
    """Messages a second."""


class Side:
    """The users of one version, who chat while they may."""

    def __init__(self, path: Path, host: str, users: int) -> None:
        self._may_chat = Event()
        self._messages = 0
        self._environment = Environment(events=Events(), host=host)
        self._environment.create_local_runner()  # its statistics listen
        user_class = load_user_class(path)
        self._users = [user_class(self._environment) for _ in range(users)]
        for number, user in enumerate(self._users):
            user.on_start()
            gevent.spawn(self._chat, user, number)

    def _chat(self, user: User, number: int) -> None:
        """Send message after message; ``sleep(0)`` is what Locust does between two tasks."""
        while True:
            self._may_chat.wait()
            getattr(user, MIX[number % len(MIX)])()
            number += 1
            self._messages += 1
            gevent.sleep(0)

    def run_a_slice(self) -> Figures:
        """Let the users chat for a slice."""
        messages = self._messages
        used = time.process_time()
        started = time.perf_counter()
        self._may_chat.set()
        gevent.sleep(SLICE)
        self._may_chat.clear()
        used = time.process_time() - used
        seconds = time.perf_counter() - started
        gevent.sleep(SLICE / 10)  # what is still in flight comes home
        messages = self._messages - messages
        return Figures(used / messages * 1e6, messages / seconds)

    @property
    def errors(self) -> int:
        """How many requests have failed."""
        return sum(error.occurrences for error in self._environment.stats.errors.values())


def load_user_class(path: Path) -> type[User]:
    """Return the ``ChatClient`` of a locustfile that may stand anywhere."""
    name = f"version_{len(sys.modules)}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    user_class: type[User] = module.ChatClient
    return user_class


def ratios(first: list[float], second: list[float]) -> str:
    """Return the median of the ratios of neighbours, second to first, and their quartiles."""
    pairs = [later / earlier for earlier, later in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return f"{middle:.3f} × ({low:.3f} to {high:.3f})"


def compare(first: Side, second: Side, slices: int) -> None:
    """Run both in turn, and print how the second compares with the first."""
    figures: dict[Side, list[Figures]] = {first: [], second: []}
    for side in figures:
        side.run_a_slice()  # which warms up
    for number in range(slices):
        order = (first, second) if number % 2 else (second, first)
        for side in order:
            figures[side].append(side.run_a_slice())
    costs = [[each.microseconds for each in figures[side]] for side in (first, second)]
    rates = [[each.rate for each in figures[side]] for side in (first, second)]
    print(f"processor time a message: {ratios(*costs)}")
    print(f"microseconds: {statistics.median(costs[0]):.1f}, {statistics.median(costs[1]):.1f}")
    print(f"messages a second: {ratios(*rates)}")
    print(f"failed requests: {first.errors}, {second.errors}")


def main() -> None:
    """Compare as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare two versions of locustfile.py.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--slices", type=int, default=60)
    options = parser.parse_args()
    with Bench() as bench:
        first, second = (
            Side(path, Server(bench).host, options.users)
            for path in (options.first, options.second)
        )
        compare(first, second, options.slices)


if __name__ == "__main__":
    main()
