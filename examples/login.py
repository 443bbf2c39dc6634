"""Log in with an account of its own for each user, where the server answers yes or no.

    locust -f locustfile.py,plugins/accounts.py,examples/login.py LoginUser \\
        --host=localhost:12345 --headless --users=100 --spawn-rate=10 --run-time=1m \\
        --chat-accounts=members.csv

``members.csv`` is a file of yours with at least as many accounts as users::

    name,password
    kim,secret

The server takes lines, greets, and answers ``/login NAME PASSWORD`` with ``Welcome …`` or
``Wrong …``. Others may talk meanwhile: that is not the answer.

To change: the command in ``on_connect``, and how its two answers begin. ``self.account`` has a key
for each column of the file.

A refused login, one without an answer and a hang-up are each one failed row ``login``. The user
tries again after a pause.
"""

from __future__ import annotations

import accounts

import locustfile


def is_answer(line: bytes) -> bool:
    """Return whether a line is the answer to a login."""
    return line.startswith((b"Welcome", b"Wrong"))


class LoginUser(accounts.WithAccount, locustfile.ChatClient):
    """Logs in with its own account, and chats."""

    def on_connect(self) -> None:
        """Log in."""
        login = f"/login {self.account['name']} {self.account['password']}"
        if self.client.send_chat(login, echo=is_answer) is None:
            raise PermissionError("no login")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(b"Wrong")
