"""Load a server that speaks JSON, one object a line, with a login.

    locust -f examples/json_lines.py --host=localhost:12345 --headless --users=100 \\
        --spawn-rate=10 --run-time=1m

The server writes JSON anew: other order, other spaces. What comes back unchanged is the text, so
``expected`` names that. A greeting, and what others say, are not the answer to the login.

To change: the keys, and where the server

- has no login: drop ``on_connect``;
- writes other characters than ASCII as ``\\u…``: drop ``ensure_ascii=False``;
- sends back an ``id`` and not the text: ``"id": tag`` in ``compose``, and ``echo = "tag"`` in place
  of ``expected``;
- refuses a message with its ``id`` alone: ``"id": tag`` in ``compose``, beside the text;
- wants a length before each object in place of a line: ``framing = ">I"``.

A refused login, one without an answer and a hang-up are each one failed row ``login``.
"""

from __future__ import annotations

import json

import locustfile


def type_of(line: bytes) -> str | None:
    """Return the type of a message, or None for whatever else a server can send."""
    try:
        return str(json.loads(line)["type"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


class JsonUser(locustfile.ChatClient):
    """Logs in, and chats."""

    def on_connect(self) -> None:
        """Log in."""
        login = json.dumps({"type": "login", "name": "load", "password": "secret"})

        def is_answer(line: bytes) -> bool:
            return type_of(line) in ("welcome", "error")

        if self.client.send_chat(login, echo=is_answer) is None:
            raise PermissionError("no login")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return type_of(payload) == "error"

    def compose(self, tag: str, message: str) -> str:
        """Return what to send for a text."""
        return json.dumps({"type": "chat", "text": f"[{tag}] {message}"})

    def expected(self, tag: str, message: str) -> str:
        """Return what comes back unchanged: the text, as the server writes it."""
        return json.dumps(f"[{tag}] {message}", ensure_ascii=False)
