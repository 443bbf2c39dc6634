"""Treat a server as broken and hostile clients do, and see whether it goes on serving a good one.

    locust -f plugins/abnormal_clients.py --headless --host=localhost:12345 --users=20 \\
        --spawn-rate=10 --run-time=1m

One user, the canary, chats as a ``ChatClient``. All others abuse the server, each time on a new
connection, and then ask on another one whether it still echoes.

Rows: connect, send_chat and echo_response are the canary's alone; a row of type ABUSE for each kind
of abuse, its time from the connect until the connection ended. Hanging up on an abuser is a right
answer, and so is an error or an echo. A row fails where the server

- accepts no connection, or does not echo on a new one after the abuse: it has crashed, or hangs;
- does not end its side of the connection within ``--chat-timeout`` after the client has ended its
  own;
- gives a new connection what was not its own. In a room everybody gets everybody's messages, so
  this is only said of half a message whose sender has reset the connection: that never was a
  message, and nobody may get it. With the framing ``raw``, where whatever one read returns is a
  message, it may.

The row that fails is that of the last abuse before the trouble was seen; ``--users=2`` leaves one
abuser, and no doubt.

Options: those of ``locustfile.py``. ``--chat-wait`` is the time between two abuses of a user. The
server has to echo (no ``--chat-echo=none``), and to do without TLS.

The last line says how the canary fared, and which abuse the server did not survive.

Exit code: 1 where a row failed, where nobody abused the server, or where no echo came to the canary
at all, whatever the limits of ``verdict.py`` allow; else 0.
"""

from __future__ import annotations

from locust import between, events, runners, task  # isort: skip

import contextlib
import copy
import socket
import struct
import sys
from collections import Counter
from time import perf_counter
from typing import Literal

import gevent
from locust.env import Environment
from locust.event import Events
from locust.stats import StatsEntry, StatsError

import locustfile  # as a module: Locust would run a ChatClient that is imported by its name, too

MOMENT = 0.1  # seconds: the server has read what came, before the client does the next thing
HALF = b"This message was never finished "
ANNOUNCED = 200  # bytes that a prefix announces, and that never come
# Bytes without a delimiter: far above what servers allow, and so far below what clients allow that
# the canary is not hit where a room gives them to everybody, several in a row.
LONG = locustfile.MESSAGE_LIMIT // 4

End = Literal["half-close", "close", "reset"]


class NotAccepted(locustfile.ChatError):
    """It accepts no connection any more."""

    text = "After the abuse the server accepted no connection."


class NotEchoed(locustfile.ChatError):
    """It accepts connections, and serves none."""

    text = "After the abuse the server did not echo on a new connection."


class NotEnded(locustfile.ChatError):
    """It keeps connections that have no client."""

    text = "The server did not end a connection that its client had ended."


class Leaked(locustfile.ChatError):
    """It mixes up its connections."""

    text = "Half a message of a connection that was reset came to a new connection."


class AbusedConnection:
    """A connection to abuse. What the server sends is read and dropped.

    Otherwise a server that echoes a long message would wait for its reader for ever.

    :param limit: seconds for connecting, for a piece to be sent, and for the server to end its side
    :raises OSError: or ``ValueError`` where there is no connection
    """

    def __init__(self, host: str, port: int, limit: float) -> None:
        self._limit = limit
        self._socket = socket.create_connection((host, port), limit)
        self._socket.settimeout(None)  # a server that is silent has not ended the connection
        self._reader = gevent.spawn(self._read_all)

    def _read_all(self) -> None:
        """Read until the server ends the connection."""
        with contextlib.suppress(OSError):
            while self._socket.recv(locustfile.READ_SIZE):
                pass

    def send(self, pieces: tuple[bytes, ...], pause: float) -> None:
        """Send pieces, and wait for so many seconds after each, or until the server hangs up.

        :raises OSError: where the server has hung up
        """
        for piece in pieces:
            # A server that reads no more is not an error yet: whether it ends the connection is.
            with gevent.Timeout(self._limit, False):
                self._socket.sendall(piece)
            self._reader.join(pause)

    def half_close(self) -> Exception | None:
        """End this side; return what is wrong where the server does not end its own."""
        with contextlib.suppress(OSError):  # the server has hung up already
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join(self._limit)
        if not self._reader.ready():
            return NotEnded()
        return None

    def reset(self) -> None:
        """Close with a TCP reset, which a lingering of no seconds means."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._reader.kill()
        self._socket.close()


class Canary(locustfile.ChatClient):
    """The one user that behaves, and has to get its echoes."""

    fixed_count = 1
    wait_time = between(0.2, 0.5)


class AbnormalClient(locustfile.TCPChatUser):
    """Abuses the server. ``self.client`` asks afterwards whether it still echoes."""

    silence = 10.0
    """Seconds that half a message is left alone."""

    trickle_pause = 1.0
    """Seconds between two bytes of a trickle."""

    def __init__(self, environment: Environment) -> None:
        silent = copy.copy(environment)
        silent.events = Events()  # nobody listens: connect, send_chat, … are the canary's rows
        super().__init__(silent)
        self.environment = environment  # the rows of the abuses do count
        self._has_heard_half = False
        self._fault: Exception | None = None
        self._new_framing: locustfile.FramingFactory = locustfile.LineFraming
        self._is_echo_awaited = True
        try:
            settings = settings_without_tls(type(self), environment)
        except (
            ValueError
        ) as fault:  # typed into the web UI: each abuse is a failed row that says it
            self._fault = fault
        else:
            self._new_framing = settings.framing
            self._is_echo_awaited = settings.echo != "none"

    def on_start(self) -> None:
        """Hold no connection between two abuses."""

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Look for half a message of a connection that was reset."""
        if HALF in payload:
            self._has_heard_half = True

    # -- the kinds of abuse

    @task(3)
    def invalid_utf_8(self) -> None:
        """Expected: an echo, replacement characters, an error, or the end of this connection."""
        invalid = b"\xff\xfe\xc3\x28 \xed\xa0\x80 \xf8\x88\x80\x80\x80"
        self.abuse("invalid UTF-8", self.message(invalid))

    @task(3)
    def empty_message(self) -> None:
        """Expected: an empty echo, an error, nothing, or the end of this connection."""
        self.abuse("empty message", self.message(b""))

    @task(1)
    def no_delimiter(self) -> None:
        """Expected: the end of this connection at the server's limit, or patience."""
        self.abuse("no delimiter in 256 KiB", b"x" * LONG)

    @task(2)
    def short_of_its_prefix(self) -> None:
        """Fewer bytes than announced. Expected: nothing until the client leaves, or a time-out."""
        self.abuse("short of its prefix", self.prefix() + b"x" * 10)

    @task(2)
    def huge_prefix(self) -> None:
        """The largest length there is. Expected: the end of this connection, and no memory."""
        self.abuse("huge prefix", b"\xff" * len(self.prefix()) + b"x" * 10)

    @task(1)
    def half_then_silence(self) -> None:
        """Expected: others are served meanwhile; the connection may end at a time-out."""
        half = self.message(b"x" * 100)[:-50]
        self.abuse("half, then silence", half, pause=self.silence)

    @task(3)
    def half_then_reset(self) -> None:
        """Expected: the half is thrown away with its connection."""
        half = self.message(HALF + b"x" * 100)[:-100]
        self.abuse("half, then reset", half, end="reset")

    @task(3)
    def connect_and_leave(self) -> None:
        """Expected: the server takes no notice."""
        self.abuse("connect and leave", end="close")

    @task(2)
    def half_close(self) -> None:
        """Send, and end this side at once. Expected: an echo or none, and the server's end."""
        self.abuse("half-close", self.message(b"Goodbye!"), pause=0)

    @task(1)
    def trickle(self) -> None:
        """Expected: an echo of the whole message, or the end of this connection at a time-out."""
        message = self.message(b"Slowly!")
        pieces = (message[at : at + 1] for at in range(len(message)))
        self.abuse("trickle", *pieces, pause=self.trickle_pause)

    # -- how they are done

    def message(self, payload: bytes) -> bytes:
        """Return the bytes of a message in the framing of the server."""
        return self._new_framing().encode(payload)

    def prefix(self) -> bytes:
        """Return the length of a message, in the format of the server or else in four bytes."""
        framing = self._new_framing()
        if not isinstance(framing, locustfile.LengthPrefixFraming):
            framing = locustfile.LengthPrefixFraming(">I")
        return framing.encode(b"x" * ANNOUNCED)[:-ANNOUNCED]

    def abuse(
        self, kind: str, *pieces: bytes, pause: float = MOMENT, end: End = "half-close"
    ) -> None:
        """Abuse the server on a new connection, see whether it is still well, and fire the row.

        :param kind: the name of the row
        :param pieces: what to send, one after the other
        :param pause: seconds to wait after each piece
        :param end: how the connection ends then
        """
        started = perf_counter()
        error = self._connect_and_send(pieces, pause, end)
        milliseconds = (perf_counter() - started) * 1000
        if error is None:
            error = self._aftermath()
        self.environment.events.request.fire(
            request_type="ABUSE",
            name=kind,
            response_time=milliseconds,
            response_length=0,
            exception=error,
            context={},
        )

    def _connect_and_send(
        self, pieces: tuple[bytes, ...], pause: float, end: End
    ) -> Exception | None:
        """Return what the server did wrong on the connection that is abused."""
        if self._fault is not None:
            return self._fault
        try:
            connection = AbusedConnection(self.client.host, self.client.port, self.client.timeout)
        except (OSError, ValueError) as error:
            return error
        try:
            with contextlib.suppress(OSError):  # the server has hung up, as it may
                connection.send(pieces, pause)
            if end == "half-close":
                return connection.half_close()
            if end == "reset":
                connection.reset()
            return None
        finally:
            connection.close()

    def _aftermath(self) -> Exception | None:
        """Return what the server does wrong on a new connection."""
        self._has_heard_half = False
        try:
            if not self.client.connect():
                return NotAccepted()
            echo = self.client.send_chat("Is everything all right?", wait=True)
            gevent.sleep(0)  # lets ``on_message`` take what came before the echo
        finally:
            self.client.close()
        has_half = self._has_heard_half or HALF.decode() in str(echo)
        if has_half and not isinstance(self._new_framing(), locustfile.RawFraming):
            return Leaked()
        if echo is None and self._is_echo_awaited:
            return NotEchoed()
        return None


def settings_without_tls(
    user_class: type[AbnormalClient], environment: Environment
) -> locustfile.Settings:
    """Return the settings of the users of a class.

    TLS would hide a half-close, and end a connection that is cut inside a record.

    :raises SettingError: for the first setting that is wrong, and for a server with TLS
    """
    settings = locustfile.settings_of(user_class, environment)
    for address in settings.addresses:
        if address.tls:
            instead = f"tcp://{address.host}:{address.port}: abnormal clients speak no TLS"
            raise locustfile.SettingError(environment.host or user_class.host, "--host", instead)
    return settings


@events.init.add_listener
def refuse_tls(environment: Environment, **_: object) -> None:
    """End Locust with one line where the server is one with TLS."""
    if isinstance(environment.runner, runners.WorkerRunner) or environment.parsed_options is None:
        return  # the settings of a worker come from its master
    try:
        for user_class in environment.user_classes:
            if issubclass(user_class, AbnormalClient) and (environment.host or user_class.host):
                settings_without_tls(user_class, environment)
    except ValueError as error:
        locustfile.refuse_to_start(environment, error)


@events.quitting.add_listener
def judge(environment: Environment, **_: object) -> None:
    """Fail the run where an abuse failed, nobody abused, or no echo came to the canary at all."""
    runner = environment.runner
    if runner is None or isinstance(runner, runners.WorkerRunner):
        return
    if runner.state == runners.STATE_INIT:  # nothing was started in the web UI
        return
    runner.stop()  # after Ctrl-C the users are still there
    rows = abuse_rows(environment)
    has_failed = not rows or any(row.num_failures for row in rows)
    if has_failed or canary_echoes(environment) == 0:
        environment.process_exit_code = environment.process_exit_code or 1


@events.init.add_listener
def say_result_at_the_end(environment: Environment, **_: object) -> None:
    """Let the process that is no worker say in its last line how it went."""
    if not isinstance(environment.runner, runners.WorkerRunner):
        environment.events.quit.add_listener(
            lambda **_: print(last_line(environment), file=sys.stderr)
        )


def last_line(environment: Environment) -> str:
    """Return how the canary fared, and which abuse the server did not survive."""
    return f"abnormal clients: {canary_result(environment)}; {abuse_result(environment)}"


def canary_result(environment: Environment) -> str:
    """Return how the canary fared, as text. The rows of type TCP are its own."""
    row = environment.stats.entries.get(locustfile.ECHO_ROW)
    attempts = row.num_requests if row else 0
    parts = [f"the canary got {canary_echoes(environment)} of {attempts} echoes"]
    for row in environment.stats.entries.values():
        if row.method == "TCP" and row.name != "echo_response" and row.num_failures:
            parts.append(f"{row.num_failures} × {row.name} failed")
    return ", ".join(parts)


def abuse_result(environment: Environment) -> str:
    """Return which abuse the server did not survive, as text."""
    rows = abuse_rows(environment)
    if not rows:
        return "nobody has abused the server: use --users=2 or more, and a longer --run-time"
    was_never_echoed = canary_echoes(environment) == 0 and failures_of(environment, NotEchoed)
    if was_never_echoed and not failures_of(environment, NotAccepted, NotEnded, Leaked):
        return "nothing was tested, as the server echoed nobody"
    blamed = [
        f"{name} ({count} ×)"
        for name, count in failures_of(
            environment, NotAccepted, NotEchoed, NotEnded, Leaked
        ).items()
    ]
    if blamed:
        return f"the server did not survive: {', '.join(blamed)}"
    failed = sum(row.num_failures for row in rows)
    if failed:
        return f"{failed} abuses found no server"
    count = sum(row.num_requests for row in rows)
    return f"the server survived all {count} abuses, of {len(rows)} kinds"


def failures_of(environment: Environment, *kinds: type[Exception]) -> Counter[str]:
    """Return how often each kind of abuse was followed by trouble of some kinds."""
    names = tuple(kind.__name__ for kind in kinds)
    counts: Counter[str] = Counter()
    for error in environment.stats.errors.values():
        # A master has the errors of its workers as text.
        if error.method == "ABUSE" and StatsError.parse_error(error.error).startswith(names):
            counts[error.name] += error.occurrences
    return counts


def canary_echoes(environment: Environment) -> int:
    """Return how many echoes came to the canary."""
    row = environment.stats.entries.get(locustfile.ECHO_ROW)
    return row.num_requests - row.num_failures if row else 0


def abuse_rows(environment: Environment) -> list[StatsEntry]:
    """Return the rows of the kinds of abuse."""
    return [row for row in environment.stats.entries.values() if row.method == "ABUSE"]
