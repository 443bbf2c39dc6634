r"""Hold many connections, or storm the server with new ones. Name the class of users that you want:

    locust -f examples/lurkers.py Lurker --headless --users=5000 --spawn-rate=100 --run-time=5m --host=127.0.0.1:12345
    locust -f examples/lurkers.py Visitor --headless --users=100 --spawn-rate=100 --run-time=1m --chat-wait=0 \
        --host=127.0.0.1:12345

A lurker connects and only listens: how many can the server hold? Rows: connect, received (a message came; without a
time, since nobody knows when it was sent), disconnect (a failure: the server hung up). It looks every 1 to 3 s, or as
``--chat-wait`` says, whether its connection still stands, and connects again if not.
A visitor connects, says one thing, waits for its echo, and leaves, with ``--chat-wait=0`` as fast as it can: how many
new connections a second does the server take? Rows: connect, send_chat, echo_response. A port that was used stays
blocked for a minute, so one address makes 28,000 visits a minute to a server on another machine.
"""

from __future__ import annotations

from locust import task  # isort: skip

import random
from collections.abc import Iterable

import gevent
from locust.env import Environment

from locustfile import SHORT_TEXTS, Framing, TCPChatUser


class Lurker(TCPChatUser):
    """Connects and counts what it hears."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        new_framing = self.client.new_framing
        self.client.new_framing = lambda: Counting(new_framing(), self)

    @task
    def stay(self) -> None:
        """Connect again where the server has hung up, after the client's back-off."""
        self.client.connect()

    def count(self, payloads: list[bytes]) -> None:
        """Report the messages that have come."""
        for payload in payloads:
            self.environment.events.request.fire(
                request_type="TCP",
                name="received",
                response_time=None,
                response_length=len(payload),
                exception=None,
                context={},
            )


class Counting(Framing):
    """A framing of which a lurker counts the messages."""

    def __init__(self, framing: Framing, lurker: Lurker) -> None:
        self.encode = framing.encode  # type: ignore[method-assign]
        self._feed, self._count = framing.feed, lurker.count

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Return the payloads that are complete now, and have them counted."""
        if payloads := list(self._feed(data)):
            gevent.spawn(self._count, payloads)  # this runs in the event loop, and a listener may block
        return payloads


class Visitor(TCPChatUser):
    """Connects, says one thing, and leaves."""

    @task
    def visit(self) -> None:
        """Say it on a connection of its own."""
        self.client.send_chat(random.choice(SHORT_TEXTS))
        self.client.close()
