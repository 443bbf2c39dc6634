"""Prints the processor microseconds of one request event, with Locust's statistics listening."""

from __future__ import annotations

from locust.env import Environment  # isort: skip

import time

EVENTS = 200_000

environment = Environment()
environment.create_local_runner()
fire = environment.events.request.fire
started = time.process_time()
for _ in range(EVENTS):
    fire(
        request_type="TCP",
        name="delivery",
        response_time=1.0,
        response_length=100,
        exception=None,
        context={},
    )
print(f"{(time.process_time() - started) / EVENTS * 1e6:.2f}")
