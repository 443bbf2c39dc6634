"""Load a game server whose packets are ``[size][id][data]``, and whose size counts the header.

    locust -f examples/game_header.py --host=localhost:12345 --headless --users=100 \\
        --spawn-rate=10 --run-time=1m

Size and id have 2 bytes each, little-endian. The size is that of the whole packet: 4 for one
without data. The echo has an id of its own.

To change: the ids, and

- other sizes or order of bytes: ``SIZE`` and ``ID``, such as ``">I"`` (``struct``);
- no id behind the size: leave out ``LOGIN``, ``CHAT`` and their like, and ``echo=is_answer``;
- a size behind the id: ``binary_header.py``;
- a server that drops who is silent: ``heartbeat`` and ``on_heartbeat``, as in ``stomp.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import locustfile

SIZE = struct.Struct("<H")  # of the packet, this field included
ID = struct.Struct("<H")
LOGIN, LOGGED_IN, REFUSED, CHAT, SAID = (ID.pack(number) for number in (1, 2, 3, 4, 5))


class PacketFraming:
    """A message is the id of a packet and its data: all but the size."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def encode(self, payload: bytes) -> bytes:
        """Return the packet; raise ``ValueError`` for a size that the header cannot say."""
        try:
            return SIZE.pack(SIZE.size + len(payload)) + payload
        except struct.error:
            raise ValueError("the message is longer than its size can say") from None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that data completes."""
        self.buffer += data
        while len(self.buffer) >= SIZE.size:
            (size,) = SIZE.unpack_from(self.buffer)
            if size < SIZE.size:  # the packet would have no end
                raise locustfile.FramingError
            if size > locustfile.MESSAGE_LIMIT:
                raise locustfile.MessageTooLong
            if len(self.buffer) < size:
                return
            message = bytes(self.buffer[SIZE.size : size])
            del self.buffer[:size]
            yield message


class GameUser(locustfile.ChatClient):
    """Logs in, and chats."""

    framing = PacketFraming

    def on_connect(self) -> None:
        """Log in."""
        if self.client.send_chat(LOGIN + b"load", echo=is_answer) is None:
            raise PermissionError("no login")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(REFUSED)

    def compose(self, tag: str, message: str) -> bytes:
        """Return what to send for a text."""
        return CHAT + self.expected(tag, message)

    def expected(self, tag: str, message: str) -> bytes:
        """Return what comes back unchanged: the text, not the id."""
        return f"[{tag}] {message}".encode()


def is_answer(message: bytes) -> bool:
    """Return whether a packet is the answer to the login."""
    return message.startswith((LOGGED_IN, REFUSED))
