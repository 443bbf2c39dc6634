"""The users of locustfile.py, shared out over the servers that SPREAD_HOSTS names (``host:port
host:port``).

For more users than one server process may have files open, or one address has ephemeral ports
(about 28,000)."""

from __future__ import annotations

import os

import locustfile

for number, address in enumerate(os.environ["SPREAD_HOSTS"].split()):
    # Locust collects the user classes from the names of this module.
    globals()[f"ChatClient{number}"] = type(
        f"ChatClient{number}", (locustfile.ChatClient,), {"host": address}
    )
