"""The request events that a test has seen, and runs of users within a test."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

from locust import User
from locust.env import Environment
from locust.event import Events
from locust.stats import StatsEntry

import locustfile


class Rows(list[dict[str, Any]]):
    """The request events that were fired."""

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of that name."""
        return [row for row in self if row["name"] == name]

    def names(self) -> list[str]:
        """Return the names of the events, in their order."""
        return [row["name"] for row in self]

    def times(self, name: str) -> list[float]:
        """Return how long each event of that name took, in milliseconds."""
        return [row["response_time"] for row in self.named(name)]

    def failures(self) -> list[str]:
        """Return the failures in their order, as ``name: ExceptionType``."""
        return [outcome(row) for row in self if row["exception"] is not None]

    def error_texts(self) -> set[str]:
        """Return the texts of the failures, each once, as Locust counts them."""
        return {repr(row["exception"]) for row in self if row["exception"] is not None}

    def counts(self) -> Counter[str]:
        """Count the events: a name for each success, ``name: ExceptionType`` for each failure."""
        return Counter(map(outcome, self))


def outcome(row: dict[str, Any]) -> str:
    """Return the name of a successful row, or ``name: ExceptionType``."""
    name = str(row["name"])
    if row["exception"] is None:
        return name
    return f"{name}: {type(row['exception']).__name__}"


def fire(
    environment: Environment, name: str, milliseconds: float, error: Exception | None = None
) -> None:
    """Fire a row that took so long, and failed where there is an error, as a client does."""
    environment.events.request.fire(
        request_type="TCP",
        name=name,
        response_time=milliseconds,
        response_length=1,
        exception=error,
        context={},
    )


class Run:
    """A Locust run of one user class, in the process of the test.

    :param is_recorded: the generator watches itself in it, and its result is logged at its end
    :param options: of ``locustfile.py``, as text, as the command line has them
    """

    def __init__(
        self,
        user_class: type[User],
        host: str,
        users: int = 1,
        stop_timeout: float | None = None,
        is_recorded: bool = False,
        **options: str,
    ) -> None:
        # A class of its own, as Locust writes the host into it.
        copied_class = type(user_class.__name__, (user_class,), {})
        self.environment = Environment(
            user_classes=[copied_class],
            host=host,
            events=Events(),
            parsed_options=Namespace(stop_timeout=0.0, **options),
            stop_timeout=stop_timeout,
        )
        self.rows = Rows()
        self.environment.events.request.add_listener(lambda **row: self.rows.append(row))
        if is_recorded:
            self.environment.events.test_start.add_listener(locustfile.begin_run)
            self.environment.events.test_stop.add_listener(locustfile.end_run)
        self.runner = self.environment.create_local_runner()
        self.runner.start(users, spawn_rate=users)

    def row(self, name: str) -> StatsEntry:
        """Return the statistics of the request events of that name."""
        return self.environment.stats.get(name, "TCP")

    def count(self, name: str) -> int:
        """Return the number of request events of that name."""
        return self.row(name).num_requests

    @property
    def errors(self) -> set[str]:
        """The failures, each once, as ``name: error``."""
        return {
            f"{error.name}: {error.error!r}" for error in self.environment.stats.errors.values()
        }


RunUsers = Callable[..., Run]  # what the fixture ``run_users`` returns
