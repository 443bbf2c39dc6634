"""Load a server whose messages have a binary header: a type, and the length of what follows.

    locust -f examples/binary_header.py --host=localhost:12345 --headless --users=100 \\
        --spawn-rate=10 --run-time=1m

``type: 1 byte, length: 2 bytes little-endian, data``. To the framing the first byte of a message is
its type, both ways.

To change: the types, and

- other sizes or order of bytes: ``HEADER``, such as ``">BI"`` (``struct`` of the standard library);
- a length that counts the header: ``game_header.py``;
- no type: no class, but ``--chat-framing``, such as ``'<H'``;
- echoes of the same type as what was sent: drop ``expected``;
- no login: drop ``on_connect``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import locustfile

HEADER = struct.Struct("<BH")  # type, length of the data
LOGIN, WELCOME, REFUSED, CHAT, SAID = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"


class HeaderFraming:
    """A message is its type, one byte, and its data."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def encode(self, payload: bytes) -> bytes:
        """Return header and data; raise ``ValueError`` for what the header cannot say."""
        data = payload[1:]
        try:
            return HEADER.pack(payload[0], len(data)) + data
        except struct.error:
            raise ValueError("the message is longer than its header can say") from None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that data completes."""
        self.buffer += data
        while len(self.buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self.buffer)
            if length > locustfile.MESSAGE_LIMIT:
                raise locustfile.MessageTooLong
            end = HEADER.size + length
            if len(self.buffer) < end:
                return
            message = bytes([kind]) + self.buffer[HEADER.size : end]
            del self.buffer[:end]
            yield message


class BinaryUser(locustfile.ChatClient):
    """Logs in, and chats."""

    framing = HeaderFraming

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
        """Return what comes back unchanged: the text, not the type."""
        return f"[{tag}] {message}".encode()


def is_answer(message: bytes) -> bool:
    """Return whether a message is the answer to the login."""
    return message.startswith((WELCOME, REFUSED))
