"""Fixtures: servers, clients and programs that end with the test."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from locust.event import EventHook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients import HOOKS, Connect, hooks_with
from programs import Program, Start
from rows import Rows, Run, RunUsers
from servers import Handler, Serve, Server

from locustfile import TCPSocketClient

TIME_LIMIT = 300  # seconds for one test, far above what any takes on a busy machine


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-timeout end a test that hangs, unless the command line sets a limit.

    A pytest that a shell has started in the background ignores Ctrl-C, and so would the programs
    that it starts: some tests end them in this way.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("timeout", None) is None:
        config.option.timeout = TIME_LIMIT


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server with a handler; it is stopped after the test."""
    servers: list[Server] = []

    def start(handler: Handler, port: int = 0) -> Server:
        servers.append(Server(handler, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def rows() -> Rows:
    """Return the list that the clients of the test report to."""
    return Rows()


@pytest.fixture
def request_event() -> EventHook:
    """Return the hook that the clients of the test report to."""
    return EventHook()


@pytest.fixture
def connect(rows: Rows, request_event: EventHook) -> Iterator[Connect]:
    """Return a function that makes a client of a port; it is shut down after the test.

    Beside what a client takes, the function takes its hooks: ``on_message=``, ``compose=``, …
    """
    clients: list[TCPSocketClient] = []
    request_event.add_listener(lambda **row: rows.append(row))

    def make(port: int, host: str = "127.0.0.1", **keywords: Any) -> TCPSocketClient:
        hooks = hooks_with(**{name: keywords.pop(name) for name in HOOKS & keywords.keys()})
        clients.append(TCPSocketClient(host, port, request_event, hooks=hooks, **keywords))
        return clients[-1]

    yield make
    for client in clients:
        client.shut_down()


@pytest.fixture
def run_users() -> Iterator[RunUsers]:
    """Return a function that starts users of a class; they are stopped after the test."""
    runs: list[Run] = []

    def begin(*arguments: Any, **keywords: Any) -> Run:
        runs.append(Run(*arguments, **keywords))
        return runs[-1]

    yield begin
    for run in runs:
        run.runner.quit()


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a program; it is killed after the test."""
    programs: list[Program] = []

    def run(*command: str | Path, **keywords: Any) -> Program:
        programs.append(Program(*command, **keywords))
        return programs[-1]

    yield run
    for running in programs:
        running.kill()
