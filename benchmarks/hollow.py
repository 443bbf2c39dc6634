"""Users that send nothing and report two requests a message: what Locust itself costs, which no
locustfile can avoid.

Writes at the end to the file HOLLOW_FILE, as JSON: the messages since all users are there, the
seconds that they took, and the processor seconds spent as user and as system."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from locust import User, constant, events, task

messages = 0
began = (0.0, 0.0, 0.0)


class HollowUser(User):
    """Tasks weighted as those of ``ChatClient``, and the same two events."""

    wait_time = constant(0)

    def report(self) -> None:
        """Report a sending and an echo that there were not."""
        global messages
        messages += 1
        fire = self.environment.events.request.fire
        for name in ("send_chat", "echo_response"):
            fire(
                request_type="TCP",
                name=name,
                response_time=1.0,
                response_length=100,
                exception=None,
                context={},
            )

    @task(5)
    def short_message(self) -> None:
        """Send nothing."""
        self.report()

    @task(2)
    def long_message(self) -> None:
        """Send nothing."""
        self.report()

    @task(1)
    def very_long_message(self) -> None:
        """Send nothing."""
        self.report()


def clocks() -> tuple[float, float, float]:
    """Return the seconds of the clock, and of the processor as user and as system."""
    used = os.times()
    return time.perf_counter(), used.user, used.system


@events.spawning_complete.add_listener
def on_spawning_complete(**_: Any) -> None:
    """Begin to count."""
    global messages, began
    messages, began = 0, clocks()


@events.test_stop.add_listener
def on_test_stop(**_: Any) -> None:
    """Write the file."""
    seconds, user, system = (now - then for now, then in zip(clocks(), began, strict=True))
    figures = {"lines": messages, "seconds": seconds, "user": user, "system": system}
    Path(os.environ["HOLLOW_FILE"]).write_text(json.dumps(figures), "utf-8")
