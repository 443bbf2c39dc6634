"""Real servers, real clients and the real ``locust`` command for the tests."""

from __future__ import annotations

import locust  # isort: skip  # replaces blocking calls with gevent's, in the servers below too

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import gevent
import gevent.os
import pytest
from gevent.server import StreamServer
from locust.event import EventHook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from locustfile import TCPSocketClient  # noqa: E402

Handler = Callable[[socket.socket], None]
Started = TypeVar("Started")


def lines(connection: socket.socket) -> Iterator[bytes]:
    """Yield the lines that a connection receives, without their delimiter, until it ends."""
    rest = b""
    while data := connection.recv(65536):
        *complete, rest = (rest + data).split(b"\n")
        yield from complete


def wait_until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    """Return as soon as condition is true; fail the test if it is still false after so many seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition has not come true"
        gevent.sleep(0.01)


def free_port() -> int:
    """Return a port on 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """A TCP server on 127.0.0.1 that runs a handler for each connection, and counts connections."""

    def __init__(self, handler: Handler, port: int = 0) -> None:
        self.opened = self.open = 0
        self.received: list[bytes] = []
        self._connections: set[socket.socket] = set()

        def handle(connection: socket.socket, _address: object) -> None:
            self.opened += 1
            self.open += 1
            self._connections.add(connection)
            try:
                handler(connection)
            except OSError:
                pass
            finally:
                self.open -= 1
                self._connections.discard(connection)

        self._server = StreamServer(("127.0.0.1", port), handle, backlog=1024)
        self._server.start()
        self.port: int = self._server.server_port

    @property
    def address(self) -> str:
        """Where it listens, as ``--host`` takes it."""
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stop listening, and close every connection."""
        self._server.stop(timeout=0.1)
        for connection in list(self._connections):
            connection.close()


class Rows(list[dict[str, Any]]):
    """The request events that were fired."""

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of that name."""
        return [row for row in self if row["name"] == name]

    def counts(self) -> Counter[str]:
        """Count the events: a name for each success, ``name: ExceptionType`` for each failure."""
        return Counter(
            row["name"] + (f": {type(row['exception']).__name__}" if row["exception"] else "") for row in self
        )


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


def echo(connection: socket.socket) -> None:
    """Send every byte back."""
    while data := connection.recv(65536):
        connection.sendall(data)


def program(name: str) -> str:
    """Return where a program of the operating system is; skip the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def environment_variables(**variables: str) -> dict[str, str]:
    """Return the environment of this process without what could configure Locust, plus variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LOCUST_", "CHAT_", "TCP_PORT"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


class Program:
    """A program that runs beside the test, with all that it prints."""

    def __init__(self, *command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment_variables(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""
        self._reader = gevent.spawn(self._read)

    def _read(self) -> None:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while data := gevent.os.nb_read(descriptor, 65536):
            self.output += data.decode("utf-8", "replace")

    def prints(self, text: str, seconds: float = 20.0) -> None:
        """Wait until the program has printed text."""
        limit = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < limit and not self._reader.ready(), f"{text!r} is not in: {self.output}"
            gevent.sleep(0.02)

    def ends(self, seconds: float = 30.0) -> int:
        """Wait until the program has ended; return its exit code."""
        self._reader.join(seconds)
        assert self._reader.ready(), f"still running: {self.output}"
        return self.process.wait()

    def kill(self) -> None:
        """Kill the program and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self._reader.kill()


class Ahead(Generic[Started]):
    """What the parametrised tests of a module start in turn. The next two are started already while a test looks at
    one, as starting a program takes longer than the test itself.

    :param launch: starts what belongs to a parameter
    :param parameters: in the order of the tests
    """

    def __init__(self, launch: Callable[[Any], Started], parameters: Iterable[Any]) -> None:
        self._launch, self._parameters = launch, list(parameters)
        self.started: dict[int, Started] = {}

    def __getitem__(self, parameter: object) -> Started:
        """Return what was started for a parameter."""
        first = self._parameters.index(parameter)
        for number in range(first, min(first + 3, len(self._parameters))):
            if number not in self.started:
                self.started[number] = self._launch(self._parameters[number])
        return self.started[first]


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


LOCUST = (Path(sys.executable).with_name("locust"),)
PATH = f"{LOCUST[0].parent}{os.pathsep}{os.environ['PATH']}"  # for commands of the documents: "locust" is this one
STANDALONE = (sys.executable, ROOT / "locustfile.py")
VERSION = locust.__version__


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run the suite in two processes at once, if all of it is wanted: most of its time is waiting for programs."""
    if config.invocation_params.args or "TEST_HALF" in os.environ or (os.cpu_count() or 1) < 2:
        return None
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: path.stat().st_size)
    command = [sys.executable, "-m", "pytest", "--color=no", "-q", "-rs", "-p", "no:cacheprovider"]
    halves = [
        subprocess.Popen(
            [*command, *map(str, files[half::2])], cwd=ROOT, env={**os.environ, "TEST_HALF": str(half)}, stdout=output
        )
        for half, output in enumerate((None, subprocess.PIPE))
    ]
    assert halves[1].stdout is not None
    later = halves[1].stdout.read().decode()  # else both would write at once
    codes = [half.wait() for half in halves]
    print(later, end="")
    return max(codes)
