"""Load a server without any framing: whatever one read returns is a message.

    locust -f examples/raw.py --host=localhost:12345 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

The same as ``--chat-framing=raw --chat-echo=tag`` with ``locustfile.py``. An echo that comes in two
reads

- counts in mode ``tag`` with the first piece, and is timed there; a tag that is itself cut is not
  found: ``EchoTimeout``;
- is ``EchoTruncated`` in mode ``full``;
- counts in mode ``any`` with the first piece; a second piece that comes after the next message was
  sent is taken for its answer.

To change: ``echo``, by these.
"""

from __future__ import annotations

import locustfile


class RawUser(locustfile.ChatClient):
    """Chats."""

    framing = "raw"
    echo = "tag"
