"""For ``-f``, beside the users: a master sees a lost worker after 1.5 s, in place of 3."""

from __future__ import annotations

from locust import runners

vars(runners)["HEARTBEAT_INTERVAL"] = 0.5  # 1 in Locust, where it is an int
