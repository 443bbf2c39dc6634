"""A small chat server that is ill on purpose, to see what an illness looks like. Only on 127.0.0.1.

    python docs/sick_server.py step 100

Lines come back to their sender 20 ms after they arrived, later where the mode says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
from functools import partial

# Seconds: a healthy answer; far above the noise of one machine, so that charts are calm.
ANSWER_TIME = 0.020
STALL_EVERY = 10.0  # seconds from one stall to the next
MODES = {  # what number N means
    "healthy": "no illness; N is not used",
    "step": "with more than N connections, answers take 200 ms more",
    "leak": "each message makes all later answers N microseconds slower",
    "limit": "a connection beyond N is closed at once",
    "queue": "one message at a time, each takes N ms",
    "stall": "every 10 seconds, nothing is answered for N ms",
    "room": "all lines go to everybody; each Nth of those to the others is lost (0: none)",
    "pieces": "at once, in two pieces, and without TCP_NODELAY; N is not used",
}


class Server:
    """The mode, its number, and what all connections share."""

    def __init__(self, mode: str, number: int) -> None:
        self.mode = mode
        self.number = number
        self.connections: set[Connection] = set()
        self.messages = 0
        self.deliveries = 0  # from one connection to another, in a room
        self.free_at = 0.0

    def due(self, now: float) -> float:
        """Return when to answer a message that arrives now, both in seconds of the loop's clock."""
        self.messages += 1
        match self.mode:
            case "step" if len(self.connections) > self.number:
                return now + ANSWER_TIME + 0.2
            case "leak":
                return now + ANSWER_TIME + self.messages * self.number / 1e6
            case "queue":
                self.free_at = max(now, self.free_at) + self.number / 1e3
                return self.free_at
            case "stall":
                return now + max(ANSWER_TIME, self.number / 1e3 - now % STALL_EVERY)
        return now + ANSWER_TIME

    def answer(self, line: bytes, sender: Connection) -> None:
        """Send a line to who is to have it."""
        sender.send(line)
        if self.mode != "room":
            return
        for other in self.connections - {sender}:
            self.deliveries += 1
            is_lost = self.number > 0 and self.deliveries % self.number == 0
            if not is_lost:
                other.send(line)


class Connection(asyncio.Protocol):
    """One connection: cuts what it receives into lines and answers each when it is due."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection in."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        server = self.server
        server.connections.add(self)
        if server.mode == "limit" and len(server.connections) > server.number:
            transport.close()
        if server.mode == "pieces":  # asyncio has set it
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)

    def connection_lost(self, _error: Exception | None) -> None:
        """Count the connection out."""
        self.server.connections.remove(self)

    def data_received(self, data: bytes) -> None:
        """Answer the lines that end in data."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        loop = asyncio.get_running_loop()
        for line in lines:
            if self.server.mode == "pieces":
                self.transport.write(line)
                self.transport.write(b"\n")
            else:
                due = self.server.due(loop.time())
                loop.call_at(due, self.server.answer, line + b"\n", self)

    def send(self, line: bytes) -> None:
        """Send a line, if somebody is still there to read it."""
        if not self.transport.is_closing():
            self.transport.write(line)


async def serve(server: Server, port: int) -> None:
    """Serve on that port of 127.0.0.1 for good; 0 means any that is free."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        partial(Connection, server), "127.0.0.1", port, backlog=1024
    )
    print(
        f"{server.mode} server on 127.0.0.1:{listener.sockets[0].getsockname()[1]}, Ctrl-C ends it",
        flush=True,
    )
    await listener.serve_forever()


def main() -> None:
    """Serve as the command line says."""
    modes = "\n".join(f"  {mode:8} {meaning}" for mode, meaning in MODES.items())
    parser = argparse.ArgumentParser(
        description=f"An echo chat server that is ill on purpose, on 127.0.0.1.\n\nmodes:\n{modes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mode", choices=MODES, help="the illness")
    parser.add_argument(
        "number",
        nargs="?",
        type=int,
        default=100,
        metavar="N",
        help="as the mode says (default 100)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=12345,
        help="where to listen (default 12345, 0: any that is free)",
    )
    options = parser.parse_args()
    try:
        asyncio.run(serve(Server(options.mode, options.number), options.port))
    except (OSError, OverflowError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
