"""Load a server that speaks CP949 (EUC-KR), as many Korean ones do, and wants a name in Korean.

    locust -f examples/cp949.py --host=localhost:12345 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

``--chat-encoding=cp949`` with ``locustfile.py`` does the same without the name. What the encoding
lacks, an emoji say, is sent as ``?``, and expected so.

To change: ``encoding``, to any that keeps ASCII as it is, such as ``gb18030`` or ``big5``, and the
name; or drop ``on_connect``. Text is encoded; ``bytes`` are sent as they are, and functions for
``echo=``, ``is_refusal`` and ``on_message`` get them as they came.
"""

from __future__ import annotations

import locustfile


class Cp949User(locustfile.ChatClient):
    """Takes a name, and chats."""

    encoding = "cp949"

    def on_connect(self) -> None:
        """Take a name. The server's answer begins with 환영, welcome."""
        name = f"손님{self.client.identity}"
        welcome = "환영".encode("cp949")
        self.client.send_chat(f"/name {name}", echo=lambda line: line.startswith(welcome))
