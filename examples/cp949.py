"""Load a server that speaks CP949 (EUC-KR), as many Korean ones do, and wants a name in Korean.

    locust -f examples/cp949.py --host=localhost:12345 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

The server takes lines, and answers ``/name NAME`` with a line that begins with ``환영``, welcome,
or ``오류``, error. ``--chat-encoding=cp949`` with ``locustfile.py`` does the same without the name.
What the encoding lacks, an emoji say, is sent as ``?``, and expected so.

To change: ``ENCODING``, to any that keeps ASCII as it is, such as ``gb18030`` or ``big5``; the
command in ``on_connect``, and how its two answers begin; or drop ``on_connect``. Text is encoded;
``bytes`` are sent as they are, and functions for ``echo=``, ``is_refusal`` and ``on_message`` get
them as they came.

A refused name, one without an answer and a hang-up are each one failed row ``login``.
"""

from __future__ import annotations

import locustfile

ENCODING = "cp949"
WELCOME = "환영".encode(ENCODING)
ERROR = "오류".encode(ENCODING)


def is_answer(line: bytes) -> bool:
    """Return whether a line is the answer to a name."""
    return line.startswith((WELCOME, ERROR))


class Cp949User(locustfile.ChatClient):
    """Takes a name, and chats."""

    encoding = ENCODING

    def on_connect(self) -> None:
        """Take a name that nobody else has."""
        name = f"손님{self.client.identity}"
        if self.client.send_chat(f"/name {name}", echo=is_answer) is None:
            raise PermissionError("no name")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no."""
        return payload.startswith(ERROR)
