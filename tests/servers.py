"""Servers for the tests: a TCP server on a port of its own, and what most handlers do."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's, in the servers too

import contextlib
import itertools
import socket
import struct
import time
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


def port_of(listener: socket.socket) -> int:
    """Return the port that a socket listens on."""
    return int(listener.getsockname()[1])


def free_port() -> int:
    """Return a port on 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return port_of(listener)


def family_of(address: str) -> socket.AddressFamily:
    """Return which of the two families of IP an address is of."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def black_hole(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Listen with a full queue, so that the kernel drops who wants to connect; give the port."""
    family = family_of(address)
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket(family))
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(8):
            waiting = sockets.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex((address, port_of(listener)))
        gevent.sleep(0.1)
        yield port_of(listener)


class Server:
    """A TCP server on 127.0.0.1 that runs a handler for each connection, and counts connections."""

    def __init__(self, handler: Handler, port: int = 0) -> None:
        self.opened = self.open = 0
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


Serve = Callable[..., Server]  # what the fixture ``serve`` returns


@contextlib.contextmanager
def servers() -> Iterator[Serve]:
    """Give a function that starts a server with a handler; all stop when the context ends."""
    started: list[Server] = []

    def serve(handler: Handler, port: int = 0) -> Server:
        started.append(Server(handler, port))
        return started[-1]

    try:
        yield serve
    finally:
        for server in started:
            server.stop()


def echo(connection: socket.socket) -> None:
    """Send every byte back."""
    while data := connection.recv(65536):
        connection.sendall(data)


class Answers:
    """A handler that keeps the lines that it receives, and answers each as a function says."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self.received: list[bytes] = []
        self._answer = answer

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection until its client is gone."""
        for line in lines(connection):
            self.received.append(line)
            connection.sendall(self._answer(line))


def with_the_line(line: bytes) -> bytes:
    """Answer a line with itself."""
    return line + b"\n"


def with_nothing(line: bytes) -> bytes:
    """Do not answer a line."""
    return b""


def in_turn(*texts: bytes) -> Callable[[bytes], bytes]:
    """Return a function that answers each line with the next of the texts, over and over."""
    coming = itertools.cycle(texts)
    return lambda line: next(coming)


def greets(text: bytes) -> Handler:
    """Return a handler that says something first, and then sends every byte back."""

    def handler(connection: socket.socket) -> None:
        connection.sendall(text)
        echo(connection)

    return handler


def says(text: bytes) -> Handler:
    """Return a handler that says something, and hangs up."""
    return lambda connection: connection.sendall(text)


def after(count: int, ending: Handler) -> Handler:
    """Return a handler that reads so many lines, and then does what another one does."""

    def handler(connection: socket.socket) -> None:
        arriving = lines(connection)
        for _ in range(count):
            next(arriving)
        ending(connection)

    return handler


def echo_bytewise(pause: float) -> Handler:
    """Return a handler that sends every line back, a byte at a time, with a pause after each."""

    def handler(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for line in lines(connection):
            for byte in line + b"\n":
                connection.sendall(bytes([byte]))
                gevent.sleep(pause)

    return handler


def echo_and_hold_up(seconds: float) -> Handler:
    """Return a handler that sends each line back, and then lets nobody else run for so long."""

    def handler(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(line + b"\n")
            hold_up(seconds)

    return handler


def hold_up(seconds: float) -> None:
    """Keep the processor, and so the event loop, for so long."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def echo_once(connection: socket.socket) -> None:
    """Send one line back, and hang up."""
    connection.sendall(next(lines(connection)) + b"\n")


def hang_up(connection: socket.socket) -> None:
    """Close the connection at once."""


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


def send_garbage(connection: socket.socket) -> None:
    """Say what is no TLS, with what must not get into an error text; then read all that comes."""
    connection.sendall(b"\x1b[31mHTTP/1.1 400 Bad Request secret\r\n\r\n")
    silent(connection)


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
