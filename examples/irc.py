"""Load an IRC server: ngircd, InspIRCd, UnrealIRCd, …

    locust -f examples/irc.py --host=localhost:6667 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

A channel sends what is said to the others only. So round trips are those of ``PING``, which the
server answers with the same text; ``talk`` fills the channel, and its row is ``send_chat``.

To change: ``CHANNEL``, or the weights of the tasks. With a password of the server, send
``b"PASS secret"`` before ``NICK``, with ``echo="none"``.

A line has at most 512 bytes: ngircd hangs up on a longer one. So this is no ``ChatClient``, whose
very long messages have up to 1,000. Before a test, lift the server's limits of connections from
one address and of messages (ngircd: ``MaxConnectionsIP = 0``, ``MaxPenaltyTime = 0``). Some round
trips of about 40 ms are those of a server that sets no ``TCP_NODELAY``.
"""

from __future__ import annotations

import random
import re

from locust import task

import locustfile

CHANNEL = "#load"
REFUSAL = re.compile(rb":\S+ 4[0367]\d ")  # no such channel, nick in use, not logged in, banned


class IrcUser(locustfile.TCPChatUser):
    """Joins a channel, talks, and times PING."""

    framing = "crlf"

    def on_connect(self) -> None:
        """Register, and join the channel."""
        name = f"u{self.client.identity}"  # 9 characters, the most that every server takes
        self.client.send_chat(f"NICK {name}".encode(), echo="none")
        self.await_reply(f"USER {name} 0 * {name}", b"001")
        self.await_reply(f"JOIN {CHANNEL}", b"366")

    def await_reply(self, command: str, number: bytes) -> None:
        """Send a command, and wait for the reply with that number, or a refusal."""
        reply = re.compile(rb":\S+ (%b|4[0367]\d) " % number)
        answer = self.client.send_chat(command, echo=lambda line: reply.match(line) is not None)
        if answer is None:
            raise PermissionError("refused")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return REFUSAL.match(payload) is not None

    def compose(self, tag: str, message: str) -> str:
        """Return what to send for a text."""
        return f"PING :[{tag}] {message}"

    def expected(self, tag: str, message: str) -> str:
        """Return what the echo, ``:server PONG server :text``, has to contain."""
        return f":[{tag}] {message}"

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Answer the server's own ``PING``."""
        if payload.startswith(b"PING "):
            self.client.send_chat(b"PONG " + payload[5:], echo="none")

    @task
    def ping(self) -> None:
        """Time a round trip."""
        self.client.send_chat(random.choice(locustfile.SHORT_TEXTS))

    @task
    def talk(self) -> None:
        """Say something in the channel."""
        text = random.choice(locustfile.SHORT_TEXTS)
        self.client.send_chat(f"PRIVMSG {CHANNEL} :{text}".encode(), echo="none")
