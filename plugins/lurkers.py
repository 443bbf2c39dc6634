"""Hold many silent connections, or storm the server with new ones. Name the class that you want:

    locust -f plugins/lurkers.py Lurker --headless --host=localhost:12345 --users=5000 \\
        --spawn-rate=100 --run-time=5m
    locust -f plugins/lurkers.py Visitor --headless --host=localhost:12345 --users=100 \\
        --spawn-rate=100 --run-time=1m --chat-wait=0

A lurker connects and only listens: how many can the server hold? Rows: connect; received, a message
that came, counted without a time, as nobody knows when it was sent; disconnect, a failure: the
server hung up. Every 1 to 3 s it looks whether its connection still stands, and connects again if
not.

A visitor connects, says one thing, waits for its echo and leaves: how many new connections a second
does the server take? Rows: connect, send_chat, echo_response. A port that was used stays blocked
for a minute, so one address makes 28,000 visits a minute to a server on another machine;
``--chat-source`` adds addresses.

Options: those of ``locustfile.py``. ``--chat-wait`` is the time between two looks, and between two
visits; ``--chat-rate`` does not fit visitors, as its schedule begins anew with each connection.

Exit code: 0, or 1 where a request failed.

A user class that has to log in lurks with the mixin before it. What it does in ``on_connect`` and
``on_message`` stays, and the tasks of its base classes are left out::

    class QuietKim(lurkers.Lurking, KimUser):
        pass

    class VisitingKim(lurkers.Visiting, KimUser):
        pass
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # first: it replaces blocking calls with gevent's

import random

import locustfile  # as a module: Locust would run a ChatClient that is imported by its name, too


class Lurking(locustfile.TCPChatUser):
    """Mixin: connects, counts what it hears, and does nothing else.

    ``stay`` is its only task; a user that has to say something now and then overrides it. Answers
    that a login awaits are not counted.
    """

    abstract = True

    def __init_subclass__(cls) -> None:
        # Locust has just gathered the tasks of all base classes, and those of the class itself.
        super().__init_subclass__()
        cls.tasks = [cls.stay]

    def stay(self) -> None:
        """Connect again where the server has hung up, after the client's pause."""
        self.client.connect()

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Count a message, then let the user's own class see it."""
        self.environment.events.request.fire(
            request_type="TCP",
            name="received",
            response_time=None,
            response_length=len(payload),
            exception=None,
            context={},
        )
        super().on_message(payload, arrived)


class Visiting(locustfile.TCPChatUser):
    """Mixin: connects, says one thing and leaves.

    ``visit`` is its only task; a user that has more to say overrides it.
    """

    abstract = True

    def __init_subclass__(cls) -> None:
        # Locust has just gathered the tasks of all base classes, and those of the class itself.
        super().__init_subclass__()
        cls.tasks = [cls.visit]

    def visit(self) -> None:
        """Say it on a connection of its own."""
        self.client.send_chat(random.choice(locustfile.SHORT_TEXTS), wait=True)
        self.client.close()


class Lurker(Lurking, locustfile.TCPChatUser):
    """Connects and counts what it hears."""


class Visitor(Visiting, locustfile.TCPChatUser):
    """Connects, says one thing and leaves."""
