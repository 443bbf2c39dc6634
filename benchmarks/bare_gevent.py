"""A closed loop of gevent sockets without Locust, statistics or checks: the limit that one expects
of gevent.

    python bare_gevent.py PORT GREENLETS SECONDS

Each greenlet sends a random line, reads until a newline, and starts again. Prints JSON: the
messages echoed, the seconds they took, and the processor seconds (user and system). SIGTERM ends it
early."""

from __future__ import annotations

import json
import random
import signal
import sys
import time

import gevent
from gevent import socket
from texts import mixed_lines

LINES = mixed_lines()


def main(port: int, greenlets: int, seconds: float) -> None:
    """Run the loop and print the JSON."""
    messages = 0

    def chat() -> None:
        nonlocal messages
        sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        while True:
            sock.sendall(random.choice(LINES))
            received = b""
            while b"\n" not in received:
                chunk = sock.recv(4096)
                if not chunk:
                    raise ConnectionError("closed by the server")
                received += chunk
            messages += 1

    started = time.perf_counter()
    users = [gevent.spawn(chat) for _ in range(greenlets)]
    gevent.signal_handler(signal.SIGTERM, gevent.killall, users, block=False)
    gevent.joinall(users, timeout=seconds)
    used = time.perf_counter() - started
    print(
        json.dumps(
            {"messages": messages, "seconds": used, "processor_seconds": time.process_time()}
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
