"""For ``-f``, beside the users: a worker with ``BUSY`` in its environment holds its event loop up.

It does so again and again: it reads late, and cannot keep the schedule.
"""

from __future__ import annotations

from locust import events  # isort: skip  # first: it replaces blocking calls with gevent's

import os

import gevent
import gevent.monkey


def hold_up() -> None:
    """Let nothing else run for 0.2 s, again and again."""
    while True:
        gevent.sleep(0.005)
        gevent.monkey.get_original("time", "sleep")(0.2)


@events.spawning_complete.add_listener
def begin(**_: object) -> None:
    """Begin as soon as all users are there."""
    if os.environ.get("BUSY"):
        gevent.spawn(hold_up)
