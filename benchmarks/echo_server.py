"""The server of the benchmarks where no C compiler is: the modes, questions and answers of
``echo_server.c``.

    python echo_server.py echo | delay MS | room MS | drop N python echo_server.py tls
    as echo, with the certificate and key in the file CERTIFICATE

It costs more processor time than the generators it serves, so that throughputs against it show its
own limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import sys
from functools import partial


class Server:
    """The mode, the connections, and the counters that the harness asks for."""

    def __init__(self, mode: str, argument: int) -> None:
        self.mode, self.argument = mode, argument
        self.connections: set[Connection] = set()
        self.accepted = self.active = self.lines = self.answers = 0
        self.question, self.late = 1, 0.0

    def answer_at(self, due: float, connection: Connection, line: bytes) -> None:
        """Send a delayed answer and note its lateness, in seconds."""
        self.late += asyncio.get_running_loop().time() - due
        self.answers += 1
        connection.transport.write(line)

    def counters(self) -> str:
        """Return a line of JSON, and count the active connections anew."""
        late_us = round(self.late / self.answers * 1e6, 1) if self.answers else 0.0
        counted = {"accepted": self.accepted, "open": len(self.connections), "active": self.active}
        self.active, self.question = 0, self.question + 1
        return json.dumps(counted | {"lines": self.lines, "late_us": late_us})


class Connection(asyncio.Protocol):
    """One connection: cuts what it receives into lines and answers each as the mode says."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server, self.rest, self.lines, self.question = server, b"", 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection in."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.accepted += 1
        self.server.connections.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        """Count the connection out."""
        self.server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer the lines that end in data."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if not self.transport.is_closing():
                self.answer(line + b"\n")

    def answer(self, line: bytes) -> None:
        """Count one line and answer it."""
        server, self.lines = self.server, self.lines + 1
        server.lines += 1
        server.active += self.question != server.question
        self.question = server.question
        if server.mode == "room":
            for other in server.connections - {self}:
                other.transport.write(line)
        if server.mode in ("delay", "room") and server.argument:
            loop = asyncio.get_running_loop()
            due = loop.time() + server.argument / 1000
            loop.call_at(due, server.answer_at, due, self, line)
        else:
            self.transport.write(line)
        if server.mode == "drop" and self.lines == server.argument:
            self.transport.close()


async def serve(mode: str, argument: int) -> None:
    """Listen on a free port of 127.0.0.1, print it, and answer questions until the end of the
    standard input."""
    loop, server = asyncio.get_running_loop(), Server(mode, argument)
    context = None
    if mode == "tls":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(os.environ["CERTIFICATE"])
    listener = await loop.create_server(
        partial(Connection, server), "127.0.0.1", 0, backlog=4096, ssl=context
    )
    print(listener.sockets[0].getsockname()[1], flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(server.counters(), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # no such limit to raise, or not by us
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
