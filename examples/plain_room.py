"""Load one chat room, open to all, in which a user chooses a name with ``/nick``.

    locust -f examples/plain_room.py --host=localhost:12345 --headless --users=100 \\
        --spawn-rate=10 --run-time=1m

The server takes lines. It sends a banner of some lines to who connects, answers ``/nick NAME`` with
a line that starts with ``*`` and holds the name, and sends what a user says to everybody in the
room, its sender too: ``<NAME> text``. The banner and what others say are not the answer to
``/nick``, as the answer holds this user's own name.

To change: the command, and ``is_answer``. Where the server does not answer ``/nick`` at all:
``self.client.send_chat(command, echo="none")``, and no ``if``. Where it does not send to the
sender what the sender said: ``echo = "none"`` in the class, and ``plugins/delivery.py`` times what
the others get.
"""

from __future__ import annotations

import locustfile


class RoomUser(locustfile.ChatClient):
    """Takes a name of its own, and chats."""

    def on_connect(self) -> None:
        """Choose a name that nobody else has."""
        name = f"u{self.client.identity}"

        def is_answer(line: bytes) -> bool:
            return line.startswith(b"*") and name.encode() in line

        if self.client.send_chat(f"/nick {name}", echo=is_answer) is None:
            raise PermissionError("no name")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(b"*") and payload.endswith(b"in use")
