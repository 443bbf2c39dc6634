"""For ``-f``, beside the users: fires three rows of known times at the start of a run."""

from __future__ import annotations

from locust import events
from locust.env import Environment


@events.test_start.add_listener
def fire(environment: Environment, **_: object) -> None:
    """Fire the rows."""
    for milliseconds in (0.123, 0.456, 0.789):
        environment.events.request.fire(
            request_type="TCP",
            name="fixed",
            response_time=milliseconds,
            response_length=1,
            exception=None,
            context={},
        )
