"""Fixtures: servers, clients and programs that end with the test."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import signal
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from locust.env import Environment
from locust.event import EventHook, Events

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "plugins"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from certificates import Context, context_that_trusts, server_context, write_certificates
from clients import HOOKS, Connect, hooks_with
from programs import Start, programs
from rows import Rows, Run, RunUsers
from servers import Serve, servers
from together import pytest_pyfunc_call

import locustfile
from locustfile import TCPSocketClient

__all__ = ["pytest_pyfunc_call"]  # a hook, for pytest to find

TIME_LIMIT = 300  # seconds for one test, far above what any takes on a busy machine


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-timeout end a test that hangs, unless the command line sets a limit.

    A pytest that a shell has started in the background ignores Ctrl-C, and so would the programs
    that it starts: some tests end them in this way.
    """
    config.addinivalue_line("markers", "together: runs beside others of its file, see together.py")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("timeout", None) is None:
        config.option.timeout = TIME_LIMIT


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server with a handler; it is stopped after the test."""
    with servers() as serve:
        yield serve


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


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what ``write_certificates`` writes."""
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    return folder


@pytest.fixture
def trusting(certificates: Path) -> Context:
    """Return a factory of contexts that trust the authority."""
    return lambda: context_that_trusts(certificates / "ca.pem")


@pytest.fixture
def identity(certificates: Path) -> ssl.SSLContext:
    """Return the context of a server with the good certificate."""
    return server_context(certificates / "good.pem")


@pytest.fixture
def begun_run() -> Iterator[Environment]:
    """Return the environment of a run without users: this process is watched, and counts for it."""
    environment = Environment(events=Events())
    locustfile.begin_run(environment)
    yield environment
    locustfile.end_run(environment)


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
    with programs() as start:
        yield start
