"""Servers in a process of their own, which go on while the process of the test is busy.

They are plain threads, without gevent. A handler is one of the functions of this file; what it
notes of the time is on the clock of ``time.perf_counter()``, which all processes share.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class ServerProcess:
    """A process with a server on a port of its own on 127.0.0.1, until the context ends.

    :param handler: what serves a connection, one of the functions below
    :param arguments: its numbers and words, behind the connection
    :param certificate: with its key; connections begin with TLS then
    :param handshake_after: so many seconds
    """

    def __init__(
        self,
        handler: Callable[..., None],
        *arguments: float | str,
        certificate: Path | None = None,
        handshake_after: float = 0,
    ) -> None:
        settings = (certificate or "", handshake_after, handler.__name__, *arguments)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def address(self) -> str:
        """Where it listens, as ``--host`` takes it."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def lines(connection: socket.socket) -> Iterator[bytes]:
    """Yield the lines that a connection receives, without their delimiter, until it ends."""
    rest = b""
    while data := connection.recv(4096):
        *complete, rest = (rest + data).split(b"\n")
        yield from complete


def echo(connection: socket.socket, seconds: str = "0") -> None:
    """Send each line back after a pause."""
    for line in lines(connection):
        time.sleep(float(seconds))
        connection.sendall(line + b"\n")


def echo_with_news(connection: socket.socket, seconds: str) -> None:
    """Send each line back after a pause, behind a broadcast, and ``/times`` when the last was sent.

    That is two moments: just before it was sent, and just after.
    """
    before = after = 0.0
    for line in lines(connection):
        if line == b"/times":
            connection.sendall(f"{before!r} {after!r}\n".encode())
            continue
        time.sleep(float(seconds))
        before = time.perf_counter()
        connection.sendall(b"news\n" + line + b"\n")
        after = time.perf_counter()


def echo_and_talk(connection: socket.socket, seconds: str) -> None:
    """Send each line back at once, and a broadcast behind it after a pause."""
    for line in lines(connection):
        connection.sendall(line + b"\n")
        time.sleep(float(seconds))
        connection.sendall(b"news\n")


def kick(connection: socket.socket, count: str, ending: str) -> None:
    """Send so many lines back, then a reason, and end the connection.

    :param ending: ``close``, which is a reset where anything is unread, or ``reset``
    """
    arriving = lines(connection)
    echoes = b"".join(next(arriving) + b"\n" for _ in range(int(count)))
    connection.sendall(echoes + b"ERROR: flood\n")  # at once: a reset drops what is not sent yet
    if ending == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def burst(connection: socket.socket, count: str, line: str) -> None:
    """Answer the first line with another one so many times, and each later one with ``ok``."""
    arriving = lines(connection)
    next(arriving)
    connection.sendall(f"{line}\n".encode() * int(count))
    for _ in arriving:
        connection.sendall(b"ok\n")


def read_slowly(connection: socket.socket, bytes_a_second: str) -> None:
    """Read so much, and never answer."""
    size = int(bytes_a_second) // 50
    while connection.recv(size):
        time.sleep(0.02)


def leave_with_parent() -> None:
    """End this process when the one that has started it is gone."""
    sys.stdin.read()
    os._exit(0)


def main(certificate: str, handshake_after: str, name: str, *arguments: str) -> None:
    """Serve with the handler of that name; print the port first."""
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    def serve(connection: socket.socket) -> None:
        try:
            if context is not None:
                time.sleep(float(handshake_after))
                connection = context.wrap_socket(connection, server_side=True)
            globals()[name](connection, *arguments)
        except (OSError, StopIteration):
            pass
        finally:
            connection.close()

    listener = socket.socket()
    if name == read_slowly.__name__:  # what its connections inherit: no megabytes
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
