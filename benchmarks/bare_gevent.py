"""A closed loop of gevent sockets without Locust: the limit that one expects of gevent.

    python bare_gevent.py PORT GREENLETS

Each greenlet sends a random line, reads until a newline, and starts again, with a time-out on the
socket and nothing else: no statistics, no checks.
"""

from __future__ import annotations

import random
import sys

import gevent
from gevent import socket
from texts import mixed_lines

LINES = mixed_lines()
LIMIT = 300  # seconds after which it ends by itself


def chat(port: int) -> None:
    """Send line after line, and wait for the echo of each."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    while True:
        sock.sendall(random.choice(LINES))
        received = b""
        while b"\n" not in received:
            chunk = sock.recv(4096)
            if not chunk:
                raise ConnectionError("closed by the server")
            received += chunk


if __name__ == "__main__":
    port, greenlets = map(int, sys.argv[1:])
    gevent.joinall([gevent.spawn(chat, port) for _ in range(greenlets)], timeout=LIMIT)
