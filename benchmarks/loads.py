"""Starts a load generator by its name: those that are compared, against a server of their own."""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

from harness import Bench, Generator, Locust, Server
from peers import TCPKALI, TSUNG, Tcpkali, Tsung

CLOSED, OPEN = "closed loop", "open loop"  # of locustfile.py
TEXTBOOK = "textbook script"
STOP_TIMEOUT = ("--stop-timeout", "10")  # what is in flight may finish first


class Load(NamedTuple):
    """How many users there are, and what each of them does."""

    users: int
    pause: str = "0"
    """Seconds from an echo to the next message, ``0.1`` or ``0.05-0.1``: those in closed loop."""
    rate: float = 0
    """Messages a second: those that do not wait for an echo; 0: as many as possible."""
    kept_seconds: float = 0
    """How long round trips are kept, once all users are there."""


def start(bench: Bench, name: str, load: Load, *behaviour: str) -> Generator:
    """Return a generator under way against a server of its own.

    :param behaviour: of the server
    """
    server = Server(bench, *behaviour)
    if name == TSUNG:
        pause = mean(map(float, load.pause.split("-")))
        return Tsung(bench, load.users, server, pause, keeps_trips=load.kept_seconds > 0)
    if name == TCPKALI:
        return Tcpkali(bench, load.users, server, load.rate, load.kept_seconds)
    options: list[str] = []
    scripts = "benchmarks/textbook.py"
    if name != TEXTBOOK:
        scripts = "locustfile.py"
        options += STOP_TIMEOUT
        options += ["--chat-rate", str(load.rate)] if name == OPEN else ["--chat-wait", load.pause]
    return Locust(
        bench, load.users, [server], *options, scripts=scripts, exact_seconds=load.kept_seconds
    )
