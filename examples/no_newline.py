"""Load a server that reads lines, and whose answers have no end.

    locust -f examples/no_newline.py --host=localhost:12345 --headless --users=100 \\
        --spawn-rate=10 --run-time=1m

What is sent ends with a newline; whatever one read returns is an answer.

To change: where long echoes fail with ``EchoTruncated``, as they come in two reads, add
``echo = "tag"`` to the user. Its limits are in the first lines of ``raw.py``.
"""

from __future__ import annotations

import locustfile


class NoNewlineFraming(locustfile.RawFraming):
    """Lines to the server, anything from it."""

    def encode(self, payload: bytes) -> bytes:
        """Return a line."""
        return payload + b"\n"


class NoNewlineUser(locustfile.ChatClient):
    """Chats."""

    framing = NoNewlineFraming
