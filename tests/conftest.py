"""Fixtures: servers, clients and programs that end with the test."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from locust.event import EventHook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from programs import Program
from rows import Rows, Run
from servers import Handler, Server

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
def serve() -> Iterator[Callable[..., Server]]:
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
def connect(rows: Rows, request_event: EventHook) -> Iterator[Callable[..., TCPSocketClient]]:
    """Return a function that makes a client of a port; it is closed after the test."""
    clients: list[TCPSocketClient] = []
    request_event.add_listener(lambda **row: rows.append(row))

    def make(port: int, host: str = "127.0.0.1", **settings: Any) -> TCPSocketClient:
        clients.append(TCPSocketClient(host, port, request_event, **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def run_users() -> Iterator[Callable[..., Run]]:
    """Return a function that starts users of a class; they are stopped after the test."""
    runs: list[Run] = []

    def begin(*arguments: Any, **keywords: Any) -> Run:
        runs.append(Run(*arguments, **keywords))
        return runs[-1]

    yield begin
    for run in runs:
        run.runner.quit()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Return a function that starts a program; it is killed after the test."""
    programs: list[Program] = []

    def run(*command: str | Path, **keywords: Any) -> Program:
        programs.append(Program(*command, **keywords))
        return programs[-1]

    yield run
    for running in programs:
        running.kill()
