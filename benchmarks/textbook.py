"""The Locust script for TCP as it is pasted from documentation and forums, without a pause.

It is what locustfile.py is compared with, and sends the same texts in the same mix.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from pathlib import Path

from locust import User, constant, task

sys.path.insert(0, str(Path(__file__).parent))
from texts import read_texts

SHORT_TEXTS, LONG_TEXTS, VERY_LONG_TEXTS = read_texts().values()


class TextbookUser(User):
    """A user with a blocking socket."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Connect."""
        assert self.host is not None
        host, port = self.host.split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=5)

    def on_stop(self) -> None:
        """Close the connection."""
        self.sock.close()

    def fire(self, name: str, start: float, length: int, error: Exception | None = None) -> None:
        """Report one request."""
        self.environment.events.request.fire(
            request_type="TCP",
            name=name,
            response_time=(time.perf_counter() - start) * 1000,
            response_length=length,
            exception=error,
            context={},
        )

    def send_chat(self, message: str) -> None:
        """Send a line and take the next line for its echo."""
        data = message.encode() + b"\n"
        start = time.perf_counter()
        try:
            self.sock.sendall(data)
        except OSError as error:
            self.fire("send_chat", start, 0, error)
            return
        self.fire("send_chat", start, len(data))
        response = b""
        try:
            while b"\n" not in response:
                received = self.sock.recv(4096)
                if not received:
                    raise ConnectionError("closed by the server")
                response += received
        except OSError as error:
            self.fire("echo_response", start, 0, error)
            return
        self.fire("echo_response", start, len(response))

    @task(5)
    def short_message(self) -> None:
        """At most 60 bytes."""
        self.send_chat(random.choice(SHORT_TEXTS))

    @task(2)
    def long_message(self) -> None:
        """100 to 400 bytes."""
        self.send_chat(random.choice(LONG_TEXTS))

    @task(1)
    def very_long_message(self) -> None:
        """513 to 1,000 bytes."""
        self.send_chat(random.choice(VERY_LONG_TEXTS))
