"""Load a STOMP server (RabbitMQ, ActiveMQ, Artemis): frames end with a NUL byte, with a heartbeat.

    locust -f examples/stomp.py --host=localhost:61613 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

All users subscribe to one topic, so each hears all. The echo of a ``SEND`` is the ``MESSAGE`` with
the same body.

To change: ``TOPIC``, the account in ``CONNECT``, ``heartbeat``. Another NUL-terminated protocol
(XMLSocket) needs ``framing = "nul"`` and no class for it; another heartbeat, what ``on_heartbeat``
sends: bytes, with ``echo="none"``.

An ``ERROR`` of the server is a refusal. In the login it is one failed row ``login``.
"""

from __future__ import annotations

from collections.abc import Iterator

import locustfile

TOPIC = "/topic/load"
CONNECT = "CONNECT\naccept-version:1.2\nhost:/\nlogin:guest\npasscode:guest\nheart-beat:20000,0\n\n"
SUBSCRIBE = f"SUBSCRIBE\nid:0\ndestination:{TOPIC}\nreceipt:0\n\n"
HEARTBEAT = b"\n"


class FrameFraming(locustfile.NulFraming):
    """Frames end with a NUL byte. A heartbeat, a newline between them, does not."""

    def encode(self, payload: bytes) -> bytes:
        """Return what to send for a frame, or for a heartbeat."""
        return payload if payload == HEARTBEAT else super().encode(payload)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the frames that data completes, without the newlines between them."""
        for frame in super().feed(data):
            yield frame.lstrip(b"\r\n")


class StompUser(locustfile.ChatClient):
    """Subscribes to a topic, and sends to it."""

    framing = FrameFraming
    heartbeat = 10.0  # half of what CONNECT says

    def on_connect(self) -> None:
        """Log in, and subscribe."""
        self.await_frame(CONNECT, b"CONNECTED\n")
        self.await_frame(SUBSCRIBE, b"RECEIPT\n")

    def await_frame(self, frame: str, answer: bytes) -> None:
        """Send a frame, and wait for the one that answers it, or a refusal."""

        def is_answer(payload: bytes) -> bool:
            return payload.startswith((answer, b"ERROR\n"))

        if self.client.send_chat(frame, echo=is_answer) is None:
            raise PermissionError("refused")

    def on_heartbeat(self) -> None:
        """Say that the client is alive."""
        self.client.send_chat(HEARTBEAT, echo="none")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(b"ERROR\n")

    def compose(self, tag: str, message: str) -> str:
        """Return what to send for a text."""
        return f"SEND\ndestination:{TOPIC}\n\n{self.expected(tag, message)}"

    def expected(self, tag: str, message: str) -> str:
        """Return what comes back unchanged: the body."""
        return f"[{tag}] {message}"
