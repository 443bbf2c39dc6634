"""A member of a chat room with a plain blocking socket and nothing else: what an echo takes.

    python plain_socket.py PORT SECONDS

Twenty times a second it sends a line and reads what all say, until its own line comes back. The
round trips are printed at the end, in ms, as a JSON list.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PAUSE = 0.05  # seconds between two lines
TEXT = "x" * 60
LIMIT = 60  # seconds for an echo


def wait_for(sock: socket.socket, tag: bytes) -> None:
    """Read until a line with the tag has come."""
    received = b""
    while tag not in received:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("closed by the server")
        received = received[-len(tag) :] + data


def drop_what_comes(sock: socket.socket, until: float) -> None:
    """Read and drop what others say, until that time of ``time.perf_counter``."""
    while (left := until - time.perf_counter()) > 0:
        sock.settimeout(left)
        try:
            sock.recv(65536)
        except TimeoutError:
            break
    sock.settimeout(LIMIT)


def round_trips(sock: socket.socket, seconds: float) -> list[float]:
    """Return the round trips of so many seconds, in ms."""
    trips: list[float] = []
    end = time.perf_counter() + seconds
    while (sent := time.perf_counter()) < end:
        tag = f"plain.{len(trips)}.".encode()
        sock.sendall(tag + TEXT.encode() + b"\n")
        wait_for(sock, tag)
        trips.append((time.perf_counter() - sent) * 1000)
        drop_what_comes(sock, sent + PAUSE)
    return trips


if __name__ == "__main__":
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(json.dumps(round_trips(sock, seconds)))
