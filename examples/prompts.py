"""Log in to a server that asks with prompts: a mud, a BBS, anything made for telnet.

    locust -f examples/prompts.py --host=localhost:4000 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

The server asks ``login: `` and ``password: ``, without a line end, and waits for ``\\r\\n``. To the
framing a prompt is a message of its own; after the login all is lines.

To change: the two prompts, and how the answers to the password begin. Where the server

- ends its prompts with a newline: ``framing = "crlf"``, and no class for it;
- drops what comes before it asks: let the first message be an empty line,
  ``self.answer("", lambda line: line == b"login: ", "login_name")``;
- begins with telnet options (bytes ``\\xff…``): remove them in ``feed``, as a prompt has to begin
  its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import locustfile

MESSAGE = re.compile(rb"(login: |password: )|(.*?)\r?\n")  # a prompt, or a line


class PromptFraming(locustfile.CrlfFraming):
    """Lines, and prompts that end without one. It sends as ``CrlfFraming`` does."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the prompts and lines that data completes."""
        self.rest += data
        while message := MESSAGE.match(self.rest):
            self.rest = self.rest[message.end() :]
            yield message[1] or message[2]
        if len(self.rest) > locustfile.MESSAGE_LIMIT:
            raise locustfile.MessageTooLong


class PromptUser(locustfile.ChatClient):
    """Answers the prompts, and chats."""

    framing = PromptFraming

    def on_connect(self) -> None:
        """Log in."""
        self.answer("load", lambda line: line == b"password: ", "login_name")
        self.answer("secret", lambda line: line.startswith(b"Welcome"), "login")

    def answer(self, text: str, echo: Callable[[bytes], bool], name: str) -> None:
        """Answer a prompt, and wait for what comes next."""
        if self.client.send_chat(text, echo=echo, name=name) is None:
            raise PermissionError("no login")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(b"Wrong")
