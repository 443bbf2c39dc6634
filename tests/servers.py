"""Servers for the tests: a TCP server on a port of its own, and what most handlers do."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's, in the servers too

import itertools
import socket
import struct
from collections.abc import Callable, Iterator

import gevent
from gevent.server import StreamServer

Handler = Callable[[socket.socket], None]


def lines(connection: socket.socket) -> Iterator[bytes]:
    """Yield the lines that a connection receives, without their delimiter, until it ends."""
    rest = b""
    while data := connection.recv(65536):
        *complete, rest = (rest + data).split(b"\n")
        yield from complete


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


def echo(connection: socket.socket) -> None:
    """Send every byte back."""
    while data := connection.recv(65536):
        connection.sendall(data)


def echo_after(seconds: float) -> Handler:
    """Return a handler that sends every line back after a pause."""

    def handler(connection: socket.socket) -> None:
        for line in lines(connection):
            gevent.sleep(seconds)
            connection.sendall(line + b"\n")

    return handler


def silent(connection: socket.socket) -> None:
    """Read all that comes, and never answer."""
    while connection.recv(65536):
        pass


def deaf(connection: socket.socket) -> None:
    """Neither read nor answer, until the test ends."""
    gevent.sleep(600)


def answers(*texts: bytes) -> Handler:
    """Return a handler that answers each line with the next of the texts, over and over."""

    def handler(connection: socket.socket) -> None:
        for _, text in zip(lines(connection), itertools.cycle(texts), strict=False):
            connection.sendall(text)

    return handler


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
