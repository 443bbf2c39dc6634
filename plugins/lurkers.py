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

The last line says how many connections were made, and on how many the server said anything: a good
or wrong echo, an answer to a login, a message (rows echo_response, login, received). A server's
kernel completes a handshake that the server itself never accepts: on a silent connection nothing
shows whether it has.

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

from locust import env, events, runners  # isort: skip

import random
import sys
from collections import Counter

import locustfile  # as a module: Locust would run a ChatClient that is imported by its name, too

ANSWER_ROWS = ("echo_response", "login", "received")  # the server has said something
WRONG_ANSWERS = (locustfile.EchoAltered, locustfile.EchoRefused, locustfile.EchoTruncated)

COUNTS: Counter[str] = Counter()  # connections of this process: "made" and "answered"
COUNTS_OF_WORKERS: dict[str, Counter[str]] = {}  # as their latest reports say
SILENT: set[str] = set()  # identities of the clients on whose connection nothing has come yet


class Counted(locustfile.TCPChatUser):
    """Mixin: its rows tell which client they are of."""

    abstract = True

    def context(self) -> dict[str, object]:
        """Return Locust's context of a request, with this client's identity."""
        return {**super().context(), "lurker": self.client.identity}


class Lurking(Counted):
    """Mixin: connects, counts what it hears, and does nothing else.

    ``stay`` is its only task; a user that has to say something now and then overrides it. An answer
    that a login awaits is a row ``login``, not ``received``.
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
            context=self.context(),
        )
        super().on_message(payload, arrived)


class Visiting(Counted):
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


@events.request.add_listener
def count(
    name: str,
    exception: Exception | None = None,
    context: dict[str, str] | None = None,
    **_: object,
) -> None:
    """Count connections, and those on which the server has said something."""
    lurker = context.get("lurker") if context else None
    if lurker is None:  # a user of another file
        return
    if name == "connect" and exception is None:
        COUNTS["made"] += 1
        SILENT.add(lurker)
    is_answer = exception is None or isinstance(exception, WRONG_ANSWERS)
    if name in ANSWER_ROWS and is_answer and lurker in SILENT:
        COUNTS["answered"] += 1
        SILENT.discard(lurker)


@events.report_to_master.add_listener
def send_counts(data: dict[str, object], **_: object) -> None:
    """Let a worker's report hold its counts."""
    data["lurkers"] = dict(COUNTS)


@events.worker_report.add_listener
def keep_counts(client_id: str, data: dict[str, dict[str, int]], **_: object) -> None:
    """Keep the counts of a worker."""
    COUNTS_OF_WORKERS[client_id] = Counter(data.get("lurkers", {}))


@events.test_start.add_listener
def reset_counts(**_: object) -> None:
    """Begin new counts with each run."""
    COUNTS.clear()
    COUNTS_OF_WORKERS.clear()
    SILENT.clear()


@events.init.add_listener
def say_counts_at_the_end(environment: env.Environment, **_: object) -> None:
    """Let the process that is no worker say the counts of all in its last line."""
    if not isinstance(environment.runner, runners.WorkerRunner):
        environment.events.quit.add_listener(lambda **_: print(last_line(), file=sys.stderr))


def last_line() -> str:
    """Return what there is to say at the end."""
    counts = sum(COUNTS_OF_WORKERS.values(), COUNTS)
    made, answered = counts["made"], counts["answered"]
    return f"lurkers: {made:,} connections made, {answered:,} of them answered or heard something"
