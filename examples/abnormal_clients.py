"""Treat a chat server as broken and hostile clients do, and see whether it goes on serving a well-behaved one.

    locust -f examples/abnormal_clients.py --headless --host=127.0.0.1:12345 --users=20 --spawn-rate=10 --run-time=1m

One user, the canary, chats as a ``ChatClient``: the rows connect, send_chat and echo_response are its alone. All others
abuse the server, each time on a new connection: a row of type ABUSE for each kind, its time from the connect until the
connection ended. Hanging up on an abuser is a right answer, and so is an error or an echo. A row fails where the server

- accepts no connection, or does not echo on a new one after the abuse: it has crashed, or hangs;
- does not end its side of the connection within ``--chat-timeout`` after the client has ended its own;
- gives a new connection what was not its own. In a room everybody gets everybody's messages, so this is only said of
  half a message whose sender has reset the connection: that never was a message, and nobody may get it. With the
  framing ``raw``, where whatever one read returns is a message, it may.

The row that fails is that of the last abuse before the trouble was seen; ``--users=2`` leaves one abuser, and no doubt.
Exit code 1 where a row failed, or no echo came to the canary at all. The server has to echo (no ``--chat-echo=none``).
"""

from __future__ import annotations

from locust import between, events, runners, task  # isort: skip

import contextlib
import copy
import socket
import struct
import sys
from collections.abc import Iterable
from time import perf_counter
from typing import Any, Literal

import gevent
from locust.env import Environment
from locust.event import Events

import locustfile  # as a module: Locust would run a ChatClient that is imported by its name, too

MOMENT = 0.1  # seconds: the server has read what came, before the client does the next thing
HALF = b"This message was never finished "

NotAccepted: type[Exception] = locustfile.chat_error(
    "NotAccepted", "After the abuse the server accepted no connection."
)
NotEchoed: type[Exception] = locustfile.chat_error(
    "NotEchoed", "After the abuse the server did not echo on a new connection."
)
NotEnded: type[Exception] = locustfile.chat_error(
    "NotEnded", "The server did not end a connection that its client had ended."
)
Leaked: type[Exception] = locustfile.chat_error(
    "Leaked", "Half a message of a connection that was reset came to a new connection."
)


class Canary(locustfile.ChatClient):
    """The one user that behaves, and has to get its echoes."""

    fixed_count = 1
    wait_time = between(0.2, 0.5)


class Recording(locustfile.Framing):
    """The framing of the user's client, which also keeps the end of what comes."""

    def __init__(self, user: AbnormalClient) -> None:
        self._user, self._framing = user, user.new_framing()
        self.encode = self._framing.encode  # type: ignore[method-assign]

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Keep data, and return the payloads that are complete now."""
        self._user.heard = (self._user.heard + data)[-locustfile.READ_SIZE * 4 :]
        return self._framing.feed(data)


class AbnormalClient(locustfile.TCPChatUser):
    """Abuses the server; ``self.client`` is what asks it afterwards whether it still echoes, and reports nothing."""

    silence = 10.0
    """Seconds that half a message is left alone."""
    trickle_pause = 1.0
    """Seconds between two bytes of a trickle."""
    heard = b""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.new_framing = self.client.new_framing
        self.client.new_framing = lambda: Recording(self)
        given = getattr(environment.parsed_options, "chat_framing", None) or self.framing
        prefixed = isinstance(given, str) and given not in ("line", "raw")
        self.prefix = struct.Struct(str(given) if prefixed else ">I")

    @classmethod
    def new_client(cls, environment: Environment, **hooks: Any) -> locustfile.TCPSocketClient:
        """Return a client with a request event of its own; raise ``ValueError`` for wrong settings, and for TLS."""
        address = environment.host or cls.host
        host, port, tls = locustfile.parse_address(address, getattr(environment.parsed_options, "tcp_port", None))
        if tls:  # it would hide a half-close, and end a connection that is cut inside a record
            raise locustfile.SettingError(address, f"tcp://{host}:{port}: abnormal clients speak no TLS")
        silent = copy.copy(environment)
        silent.events = Events()
        return super().new_client(silent, **hooks)

    def on_start(self) -> None:
        """Hold no connection between two abuses."""

    @task(3)
    def invalid_utf_8(self) -> None:
        """Expected: an echo, replacement characters, an error, or the end of this one connection."""
        self.abuse("invalid UTF-8", self.message(b"\xff\xfe\xc3\x28 \xed\xa0\x80 \xf8\x88\x80\x80\x80"))

    @task(3)
    def empty_message(self) -> None:
        """Expected: an empty echo, an error, nothing at all, or the end of this one connection."""
        self.abuse("empty message", self.message(b""))

    @task(1)
    def no_delimiter(self) -> None:
        """Expected: the end of this one connection at the server's limit, or patience until the client ends it."""
        self.abuse("no delimiter in 1 MiB", b"x" * locustfile.MESSAGE_LIMIT)

    @task(2)
    def short_of_its_prefix(self) -> None:
        """Ten bytes where 200 are announced. Expected: nothing until the client ends the connection, or a time-out."""
        self.abuse("short of its prefix", self.prefix.pack(200) + b"x" * 10)

    @task(2)
    def huge_prefix(self) -> None:
        """The largest length that the prefix can say. Expected: the end of this connection, and no memory for it."""
        self.abuse("huge prefix", b"\xff" * self.prefix.size + b"x" * 10)

    @task(1)
    def half_then_silence(self) -> None:
        """Expected: others are served meanwhile; the connection may end at a time-out of the server's."""
        self.abuse("half, then silence", self.message(b"x" * 100)[:-50], pause=self.silence)

    @task(3)
    def half_then_reset(self) -> None:
        """Expected: the half is thrown away with its connection."""
        self.abuse("half, then reset", self.message(HALF + b"x" * 100)[:-100], end="reset")

    @task(3)
    def connect_and_leave(self) -> None:
        """Expected: the server takes no notice."""
        self.abuse("connect and leave", end="close")

    @task(2)
    def half_close(self) -> None:
        """A message, and at once the end of what the client sends. Expected: an echo or none, and the server's end."""
        self.abuse("half-close", self.message(b"Goodbye!"), pause=0)

    @task(1)
    def trickle(self) -> None:
        """Expected: an echo once the message is complete, or the end of this one connection at a time-out."""
        data = self.message(b"Slowly!")
        self.abuse("trickle", *(data[at : at + 1] for at in range(len(data))), pause=self.trickle_pause)

    def message(self, payload: bytes) -> bytes:
        """Return the bytes of a message in the framing of the server."""
        return bytes(self.new_framing().encode(payload))

    def abuse(
        self,
        kind: str,
        *pieces: bytes,
        pause: float = MOMENT,
        end: Literal["half-close", "close", "reset"] = "half-close",
    ) -> None:
        """Connect, send pieces and wait for so many seconds after each, end the connection, look whether the server is
        still well, and report it all as one row."""
        started = perf_counter()
        error = self._connect_and_send(pieces, pause, end)
        milliseconds = (perf_counter() - started) * 1000
        error = error or self._aftermath()
        self.environment.events.request.fire(
            request_type="ABUSE",  # not TCP, whose failed connects and echoes --chat-max-fail-ratio counts
            name=kind,
            response_time=milliseconds,
            response_length=0,
            exception=error,
            context={},
        )

    def _connect_and_send(self, pieces: tuple[bytes, ...], pause: float, end: str) -> Exception | None:
        """Return what the server did wrong on the connection that is abused."""
        limit = self.client.timeout
        try:
            if self.client.fault is not None:  # a wrong host, typed into the web UI
                raise self.client.fault
            connection = socket.create_connection((self.client.host, self.client.port), limit)
        except (OSError, ValueError) as error:
            return error
        connection.settimeout(None)
        reader = gevent.spawn(read_all, connection)  # else an echo of a long message would wait for ever
        try:
            with contextlib.suppress(OSError):  # the server has hung up, as it may
                for piece in pieces:
                    with gevent.Timeout(limit, False):  # where it stops reading, it does not end the connection either
                        connection.sendall(piece)
                    reader.join(pause)
                if end == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if end != "half-close":
                    return None
                connection.shutdown(socket.SHUT_WR)
            reader.join(limit)
            return None if reader.ready() else NotEnded()
        finally:
            reader.kill()
            connection.close()

    def _aftermath(self) -> Exception | None:
        """Return what the server does wrong on a new connection."""
        self.heard = b""
        try:
            if not self.client.connect():
                return NotAccepted()
            echoed = self.client.send_chat("Is everything all right?")
            if HALF in self.heard and type(self.new_framing()) is not locustfile.Framing:
                return Leaked()
            return NotEchoed() if echoed is None and self.client.echo != "none" else None
        finally:
            self.client.close()


def read_all(connection: socket.socket) -> None:
    """Read and drop what comes, until the server ends the connection."""
    with contextlib.suppress(OSError):
        while connection.recv(locustfile.READ_SIZE):
            pass


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Fail the run where a row of ours failed, even if a limit such as ``--chat-max-p95``, which is judged before this,
    held; and where no echo came to the canary at all."""
    if environment.runner is None or isinstance(environment.runner, runners.WorkerRunner):
        return
    if environment.runner.state == runners.STATE_INIT:  # nothing was started in the web UI
        return
    entries = environment.stats.entries
    echoes = entries.get(("echo_response", "TCP"))
    if echoes is None or echoes.num_requests == echoes.num_failures:
        print("locust: the canary failed: no echo came", file=sys.stderr)
        environment.process_exit_code = 1
    abuses = [entry for (_name, kind), entry in entries.items() if kind == "ABUSE"]
    if not abuses:
        print("locust: nobody has abused the server: write --users=2 or more, and a longer --run-time", file=sys.stderr)
    if not abuses or any(entry.num_failures for entry in abuses):
        environment.process_exit_code = 1
