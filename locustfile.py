"""Load-test a TCP chat server with Locust: connect, send chat messages, time their echoes.

    locust --headless --users 20 --spawn-rate 10 --run-time 10s --echo-server   a trial, no server needed
    locust --host=localhost:12345                                               web UI on port 8089
    python locustfile.py localhost 12345                                        five messages, no load

Rows: connect, send_chat, echo_response (the round trip), delivery (on request); as failures only, disconnect and login.
"""

from __future__ import annotations

# Locust comes first: it replaces the blocking calls of the standard library with gevent's.
from locust import User, argument_parser, between, env, event, events, runners, stats, task  # isort: skip
import argparse
import contextlib
import functools
import logging
import random
import re
import socket
import ssl
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import gevent
import psutil
from gevent import hub, monkey, server

MESSAGE_LIMIT = 1024 * 1024  # bytes: no chat message is longer; more without an end is a flood
RUN, CLIENTS = random.getrandbits(32), iter(range(2**32))  # where this run's tags start, and how many clients there are
READ_SIZE = 16 * 1024  # bytes a read: larger buffers cost more to allocate than the calls that they save
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to connect: after one failure, after many
STAMPED_TAG = re.compile(rb"\b([0-9a-f]{8})\.\d{1,9}\.([0-9a-f]{8})\.([0-9a-f]{7})\b")  # sender, time, machine
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # with the boot, the clock begins anew; not all systems have this
MACHINE = BOOT_ID.read_text()[:7] if BOOT_ID.exists() else f"{RUN:08x}"[:7]
DELIVERED: deque[Callable[[], None]] = deque()  # what reports the messages of others
OUTBOX: deque[Exchange] = deque()  # what is sent next
READY: deque[Callable[[None], object]] = deque()  # wakes the users whose exchange has ended
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 12345  # of the built-in echo server and the standalone mode
shared_pause = functools.cache(lambda low, high: functools.partial(random.uniform, float(low), float(high)))
shared_context = functools.cache(lambda factory: factory())  # one for all: reading the system's certificates is slow
EchoMode = Literal["full", "tag", "any", "none"]
hub.Hub.NOT_ERROR = (*hub.Hub.NOT_ERROR, KeyboardInterrupt)  # gevent need not print Ctrl-C as an error


def chat_error(name: str, text: str, *bases: type[Exception]) -> Any:
    """Return a class of what a request fails with. Its text is always the same, as Locust counts failures by it."""
    return type(name, (*bases, Exception), {"__doc__": text, "__init__": lambda self: Exception.__init__(self, text)})


EchoTimeout = chat_error("EchoTimeout", "No echo came within the time-out.", TimeoutError)
EchoTruncated = chat_error("EchoTruncated", "The echo ends before the message does.")
EchoAltered = chat_error("EchoAltered", "The echo is not what was sent.")
ConnectionClosed = chat_error("ConnectionClosed", "The server closed the connection.", ConnectionError)
MessageTooLong = chat_error("MessageTooLong", "The server sent over 1 MiB without the end of a message.")
FramingError = chat_error("FramingError", "The framing failed on what the server sent; level DEBUG logs the cause.")


class Framing:
    """How messages lie in the byte stream; one object for each connection. This one, ``raw``, is no framing: whatever
    one read returns is a message. Another framing is any object with these two methods."""

    def encode(self, payload: bytes) -> bytes:
        """Return the bytes to send for one message; raise ``ValueError`` for one that cannot be carried."""
        return payload

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Take the next received bytes, cut anywhere; return the payloads that are complete now."""
        return (data,)


class LineFraming(Framing):
    r"""A message ends with ``\n``; a ``\r`` before it is dropped."""

    def __init__(self) -> None:
        self._tail = bytearray()

    def encode(self, payload: bytes) -> bytes:
        r"""Return payload and ``\n``; raise ``ValueError`` where the other side would read something else."""
        if b"\n" in payload or payload.endswith(b"\r"):
            raise ValueError("line framing carries no line break, and no carriage return at the end of a message")
        return payload + b"\n"

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that end in data; raise ``MessageTooLong`` for one over the limit."""
        if not self._tail and 0 <= data.find(b"\n") == len(data) - 1 <= MESSAGE_LIMIT:  # mostly so
            return [data[:-1].removesuffix(b"\r")]
        *lines, rest = data.split(b"\n")
        if lines and self._tail:
            lines[0] = bytes(self._tail) + lines[0]
            self._tail.clear()
        self._tail += rest
        if len(self._tail) > MESSAGE_LIMIT + 1 or (lines and len(lines[0]) > MESSAGE_LIMIT + 1):
            raise MessageTooLong
        return [line.removesuffix(b"\r") for line in lines]


class LengthPrefixFraming(Framing):
    """A message is its length, packed as the ``struct`` format says, and then as many bytes."""

    def __init__(self, length_format: str) -> None:
        self._length = struct.Struct(length_format)
        self._buffer = bytearray()

    def encode(self, payload: bytes) -> bytes:
        """Return prefix and payload; raise ``ValueError`` for a length that the prefix cannot say."""
        if len(payload) >= 256**self._length.size:
            raise ValueError("the message is longer than its length prefix can say")
        return self._length.pack(len(payload)) + payload

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the payloads that data completes; raise ``MessageTooLong`` for a length over the limit."""
        self._buffer += data
        while len(self._buffer) >= (start := self._length.size):
            end = start + self._length.unpack_from(self._buffer)[0]
            if end - start > MESSAGE_LIMIT:
                raise MessageTooLong
            if end > len(self._buffer):
                return
            yield bytes(self._buffer[start:end])
            del self._buffer[:end]


NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
PORT = r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]"
OPTIONS = {  # what a value looks like, what it means, what can be written
    "tcp-port": (PORT, "Port of the chat server where the host names none", "a port from 1 to 65535"),
    "chat-framing": ("line|raw|[@=<>!]?[BHILQ]", "Framing of messages", "line (default), raw, or a prefix like >I, <H"),
    "chat-echo": ("full|tag|any|none", "What counts as the echo", "full (default), tag, any or none"),
    "chat-timeout": (f"(?=.*[1-9]){NUMBER}", "Time for connecting, and for each echo", "seconds above 0 (default 5)"),
    "chat-max-fail-ratio": (r"[01]|0?\.\d{1,9}", "Largest share of failed echoes and connects", "0 to 1, such as 0.01"),
    "chat-max-p95": (f"(?=.*[1-9]){NUMBER}", "Largest 95th percentile of echoes", "ms above 0, such as 200"),
    "chat-wait": (f"{NUMBER}(-{NUMBER})?", "Pause between messages", "seconds, such as 2, 0.5-2 or 0 (default 1-3)"),
}


class SettingError(argparse.ArgumentTypeError, ValueError):
    """A setting is wrong. The text says what was written, and what to write instead."""

    def __init__(self, written: object, instead: str) -> None:
        super().__init__(f"{repr(written) if written else 'an empty setting'} will not do: write {instead}")


def checked(value: object, option: str) -> str:
    """Return the text of a value that the option can have; raise ``SettingError`` for another."""
    pattern, _, instead = OPTIONS[option]
    if not re.fullmatch(pattern, str(value), re.ASCII):
        raise SettingError(value, instead)
    return str(value)


def parse_address(host: str | None, port: str | None = None) -> tuple[str, int, bool]:
    """Return host, port, and whether TLS is wanted: of ``host:port`` or a host, ``tcp://`` or ``tls://`` before it."""
    text, label = (host or "").strip(), r"[^\s:/\[\]@?#\\.]{1,63}"
    match = re.fullmatch(rf"(tls://|tcp://)?(?:\[([\w:.%]+)\]|({label}(?:\.{label})*))(?::([^/]*))?", text)
    if match is None or (match[4] is None and not port):
        raise SettingError(host, "host:port, such as localhost:12345 or tls://[::1]:12345, or add --tcp-port")
    return match[2] or match[3], int(checked(port if match[4] is None else match[4], "tcp-port")), match[1] == "tls://"


class Exchange:
    """A message on its way, what came of it, and when (``perf_counter``)."""

    def __init__(self, client: TCPSocketClient, tag: bytes, unsent: bytes, awaited: bytes | None) -> None:
        self.client, self.unsent, self.waiter = client, unsent, hub.Waiter()
        self.tag, self.awaited = tag, awaited  # an echo contains the latter, a damaged one at least the tag
        self.started = self.sent = self.arrived = 0.0
        self.outcome: bytes | Exception | None = None

    def settle(self, outcome: bytes | Exception, arrived: float) -> None:
        """End it, and let its user go on when the turn comes: not at once, as there may be echoes to read first."""
        self.awaited, self.outcome, self.arrived = None, outcome, arrived
        if not READY and not OUTBOX:
            gevent.get_hub().loop.run_callback(take_turns)
        READY.append(self.waiter.switch)

    def fail(self, error: Exception) -> bool:
        """End it, wholly sent or not; return False where it had ended before."""
        if pending := self.outcome is None or self.unsent != b"":
            self.unsent = b""
            self.client._writer.stop()
            self.settle(error, perf_counter())
        return pending


@functools.cache
def exchanges_within(timeout: float) -> dict[Exchange, bool]:
    """Return the exchanges with that time-out, which end on time. They are due in the order in which they began: so one
    greenlet watches the oldest, and no timer has to be set and to fire for each message."""
    exchanges: dict[Exchange, bool] = {}

    def end_overdue() -> None:
        late = TimeoutError("the server did not take the message within the time-out")
        while True:
            oldest = next(iter(exchanges), None)
            gevent.sleep(max(0.0, oldest.started + timeout - perf_counter()) if oldest else timeout)
            if oldest and exchanges.pop(oldest, False):
                oldest.fail(EchoTimeout() if oldest.sent else late)

    gevent.spawn(end_overdue)
    return exchanges


def take_turns() -> None:
    """Send what users have ready, back to back, as it costs more to wake a server than to send to one that is at work;
    then wake some users, and the next when these have sent again, while their data is in the processor's cache."""
    for exchange in OUTBOX:
        if exchange.outcome is None and exchange.awaited == b"":  # what has come before the send is not the answer
            all(exchange.client._on_readable() for _ in range(64))
        if exchange.outcome is None:  # else the connection is lost, or the user stopped
            exchange.started = perf_counter()
            exchange.client._exchanges[exchange] = True
            exchange.client._send(exchange)
    OUTBOX.clear()
    for _ in range(min(len(READY), 100)):
        READY[0](None)  # who is woken finds the queue not empty, and so does not ask for one more turn
        READY.popleft()
    if READY or OUTBOX:
        gevent.get_hub().loop.run_callback(take_turns)


class TCPSocketClient:
    """A chat connection. Every call blocks its caller and, under gevent, nobody else. Failures are request events, and
    never raised into the task. The event loop sends, and reads also between messages, so that no broadcast piles up in
    the server, and no echo waits for its user's turn to be timed.

    :param request_event: what the events are fired on: Locust's ``environment.events.request``
    :param framing: this, ``echo``, ``timeout``, ``compose`` and ``on_connect`` are as in :class:`TCPChatUser`
    :param tls: makes the context of a TLS connection, as ``tls_context`` there; None for one without TLS
    :param delivery: report each message of another client as ``delivery``
    :raises ValueError: for a wrong framing, echo or time-out
    """

    def __init__(
        self,
        host: str,
        port: int,
        request_event: event.EventHook,
        *,
        framing: str | Callable[[], Framing] = "line",
        echo: EchoMode = "full",
        timeout: float = 5.0,
        tls: Callable[[], ssl.SSLContext] | None = None,
        delivery: bool = False,
        compose: Callable[[str, str], str] | None = None,
        on_connect: Callable[[], object] = lambda: None,
    ) -> None:
        self.host, self.port, self._fire = host, port, request_event.fire
        self.echo, self.timeout = checked(echo, "chat-echo"), float(checked(timeout, "chat-timeout"))
        self.fault: OSError | ValueError | None = None  # a wrong setting, which every attempt to connect fails with
        self._tls = None if tls is None else shared_context(tls)
        if not callable(framing):
            prefix = functools.partial(LengthPrefixFraming, checked(framing, "chat-framing"))
            framing = {"line": LineFraming, "raw": Framing}.get(framing, prefix)
        self.new_framing, self._framing = framing, framing()  # the first may be replaced, to watch what comes
        self._compose, self._on_connect = compose or self.compose, on_connect
        # Locust forks its workers after this file was loaded: multiplied, their numbers lie far apart.
        self._identity = f"{(RUN + psutil.Process().pid * 0x9E3779B1 + next(CLIENTS)) % 2**32:08x}"
        self._seen: dict[bytes, None] | None = {} if delivery else None  # the latest messages of others
        self._socket = self._reader = self._writer = cast(Any, None)
        self._exchanges, self._numbers = exchanges_within(self.timeout), iter(range(1, 10**9))
        self._exchange: Exchange | None = None
        self._greeting, self._failures, self._next_attempt, self._connected_at = False, 0, 0.0, float("inf")

    @staticmethod
    def compose(tag: str, message: str) -> str:
        """Return the text to send. The tag stands first: a server that cuts long messages still returns it."""
        return f"[{tag}] {message}"

    def connect(self) -> bool:
        """Connect unless connected, then call ``on_connect``; return whether the connection stands. After failures
        this waits first: 0.1 s, doubling to 5 s, with full jitter, so that users do not storm a recovering server."""
        if self._socket is not None:
            return True
        gevent.sleep(max(0.0, self._next_attempt - perf_counter()))
        started = perf_counter()
        try:
            self._open()
            self._report("connect", (self._connected_at - started) * 1000, 0)
            self._greeting = True  # what on_connect sends goes over this connection or none
            self._on_connect()
        except (OSError, ValueError) as error:
            self._drop()
            self._report("login" if self._greeting else "connect", (perf_counter() - started) * 1000, 0, error)
        except BaseException:
            self.close()
            raise
        finally:
            self._greeting = False
        return self._socket is not None

    def close(self) -> None:
        """Close the connection if there is one. The next message opens a new one."""
        if self._socket is not None:
            self._reader.close()
            self._writer.close()
            with contextlib.suppress(OSError, AttributeError):  # the latter without TLS
                self._socket.unwrap()  # tells the server that this is the end, not an attacker's cut (RFC 8446, 6.1)
            self._socket.close()
            self._socket = None
        if self._exchange is not None:
            self._exchange.fail(ConnectionClosed())

    def send_chat(self, message: str, *, echo: EchoMode | None = None) -> str | None:
        """Send one message, connecting first if need be, and wait for its echo. One that starts with ``/``, a command,
        goes out untouched, and ``any`` message answers it.

        :param echo: what counts as the echo of this message, instead of the client's mode
        :returns: the text of the echo; None where the exchange failed or no echo is awaited
        :raises ValueError: for a message that the framing cannot carry, before anything is sent
        """
        mode = self.echo if echo is None else checked(echo, "chat-echo")
        if message.startswith("/"):
            mode, echo = "none" if mode == "none" else "any", "any"
        if self._exchange is not None:
            raise RuntimeError("one message at a time: give each greenlet a TCPSocketClient of its own")
        if self._socket is None and (self._greeting or not self.connect()):
            return None
        tag = ""
        if mode in ("full", "tag") or (mode == "none" and echo is None and self._seen is not None):
            tag = f"{self._identity}.{next(self._numbers)}"
            stamp = f".{int(perf_counter() * 1e5) % 2**32:08x}.{MACHINE}" if self._seen is not None else ""
            message = self._compose(tag + stamp, message)
        payload, tagged = message.encode(), tag.encode()
        awaited = payload if mode == "full" else tagged if mode == "tag" else b"" if mode == "any" else None
        exchange = self._exchange = Exchange(self, tagged, data := self._framing.encode(payload), awaited)
        if not READY and not OUTBOX:
            gevent.get_hub().loop.run_callback(take_turns)
        OUTBOX.append(exchange)
        try:
            while exchange.outcome is None or exchange.unsent:
                exchange.waiter.get()
                exchange.waiter.clear()
        finally:
            if exchange.outcome is None or exchange.unsent:  # Locust stops this user: no use for half an exchange
                self.close()
            self._exchange = None
            self._exchanges.pop(exchange, None)
            if exchange.sent:
                self._report("send_chat", (exchange.sent - exchange.started) * 1000, len(data))
        outcome, time = exchange.outcome, (exchange.arrived - (exchange.started or exchange.arrived)) * 1000
        if isinstance(outcome, Exception):
            if self._socket and (awaited == b"" or not isinstance(outcome, (EchoTimeout, EchoTruncated, EchoAltered))):
                self._drop()  # in mode any too, as a late answer would be taken for the next one
            name, size = ("echo_response", 0) if exchange.sent else ("send_chat", len(data))
            self._report(name, time, size, outcome)
            return None
        if not self._greeting:  # else an attempt after an answered login that was refused would come too soon
            self._failures = 0
        if awaited is None:
            return None
        self._report("echo_response", time, len(outcome))
        return message if outcome == payload else outcome.decode("utf-8", "replace")

    def _send(self, exchange: Exchange) -> None:
        """Send what the kernel takes now, and the rest when it takes more."""
        self._writer.stop()
        try:
            exchange.unsent = exchange.unsent[self._socket.send(exchange.unsent) :]  # TLS takes 0 bytes, or all
            exchange.sent = 0.0 if exchange.unsent else perf_counter()
        except Exception as error:  # raised here, it would stop all other users
            if not isinstance(error, BlockingIOError):
                exchange.fail(error)
                self._drop()
        if exchange.unsent:
            self._writer.start(self._send, exchange)
        elif exchange.sent and exchange.awaited is None:  # nothing to wait for, or the answer came before all was sent
            exchange.settle(exchange.outcome or b"", exchange.arrived)

    def _open(self) -> None:
        """Connect and watch for bytes; raise ``OSError``, or ``ValueError`` for a wrong setting."""
        if self.fault is not None:
            raise self.fault
        # One limit for look-up, addresses and TLS together. Then this class waits itself, with a bare socket if it can.
        with gevent.Timeout(self.timeout, False), socket.create_connection((self.host, self.port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a message waits, as RFC 896 says
            tls, bare = self._tls, monkey.get_original("socket", "socket")
            self._socket = tls.wrap_socket(sock, server_hostname=self.host) if tls else bare(fileno=sock.detach())
        if self._socket is None:
            raise TimeoutError("no connection within the time-out")
        self._socket.setblocking(False)
        self._framing, self._connected_at = self.new_framing(), perf_counter()
        self._reader, self._writer = (gevent.get_hub().loop.io(self._socket.fileno(), kind) for kind in (1, 2))
        self._reader.start(self._on_readable)

    def _drop(self) -> None:
        """Close after a failure and put off the next attempt, more each time until an echo or a lasting connection."""
        self.close()
        now = perf_counter()
        failures = 0 if now - self._connected_at > LONGEST_PAUSE else self._failures
        self._next_attempt = now + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures, 10)))
        self._failures, self._connected_at = failures + 1, float("inf")

    def _report(self, name: str, time: float | None, size: int, error: Exception | None = None) -> None:
        """Fire one request event, with its time in ms and its length in bytes."""
        self._fire(request_type="TCP", name=name, response_time=time, response_length=size, exception=error, context={})

    def _on_readable(self) -> bool:
        """Read in the event loop, without blocking or raising; hand over the echo; return whether there may be more."""
        try:
            data = self._socket.recv(READ_SIZE)
            arrived = perf_counter()
            if not data:
                raise ConnectionClosed
            for payload in self._framing.feed(data):
                if self._seen is not None:
                    self._on_delivery(payload, arrived, self._seen)
                if (exchange := self._exchange) is None or exchange.awaited is None or not exchange.started:
                    continue
                if exchange.awaited in payload:
                    exchange.settle(payload, arrived)
                elif exchange.tag in payload:
                    error = EchoTruncated if payload[payload.find(exchange.tag) :] in exchange.awaited else EchoAltered
                    exchange.settle(error(), arrived)
            return True
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except Exception as error:  # a framing of the user's own can raise anything
            logging.getLogger(__name__).debug("reading failed", exc_info=True)
            error = error if isinstance(error, (OSError, MessageTooLong)) else FramingError()
            if self._exchange is None or not self._exchange.fail(error):
                gevent.spawn(self._report, "disconnect", 0, 0, error)  # a listener may block
            self._drop()
        return False

    def _on_delivery(self, payload: bytes, arrived: float, seen: dict[bytes, None]) -> None:
        """Report a message of another user: once, with its time if sent on this machine; but no history."""
        tag = STAMPED_TAG.search(payload)
        if tag is None or tag[1].decode() == self._identity or tag[0] in seen:
            return
        seen[tag[0]] = None
        if len(seen) > 1000:
            del seen[next(iter(seen))]
        age = (arrived * 1e5 - int(tag[2], 16)) % 2**32 / 100 if tag[3].decode() == MACHINE else None
        if age is None or age <= (arrived - self._connected_at) * 1000:
            DELIVERED.append(functools.partial(self._report, "delivery", age, len(payload)))
            if len(DELIVERED) % 100 == 1:  # a greenlet reports many: listeners may block, and greenlets cost
                gevent.spawn(any, (DELIVERED.popleft()() for _ in iter(DELIVERED.__len__, 0)))


class TCPChatUser(User):
    """A user with a chat connection, ``self.client``. An option that is given wins over the attribute of the class."""

    abstract = True
    framing: str | Callable[[], Framing] = "line"
    """``line``, ``raw``, a ``struct`` format of a length prefix, or a factory of :class:`Framing`."""
    echo: EchoMode = "full"
    """What counts as the echo: ``full``, ``tag``, ``any`` or ``none``."""
    timeout: float = 5.0
    """Seconds for connecting, and for one exchange."""
    tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context
    """Makes what ``tls://`` connections share: the trusted authorities, the client's certificate, and so on."""
    wait_time = between(1, 3)
    """Seconds between two messages."""
    compose = staticmethod(TCPSocketClient.compose)
    """Return the text to send for a tag and a message; override this method for another protocol."""

    def __init__(self, environment: env.Environment) -> None:
        super().__init__(environment)
        try:
            self.client = self.new_client(environment, compose=self.compose, on_connect=self.on_connect)
            if wait := getattr(environment.parsed_options, "chat_wait", None):
                self.wait_time = shared_pause(*(wait.split("-") * 2)[:2])  # type: ignore[method-assign]
        except (OSError, ValueError) as error:  # typed into the web UI: there it shows up as a failed connect
            self.client = TCPSocketClient("", 0, environment.events.request)
            self.client.fault = error

    @classmethod
    def new_client(cls, environment: env.Environment, **hooks: Any) -> TCPSocketClient:
        """Return a client as the given options say, else the class; raise ``ValueError`` where they are wrong."""
        options = vars(environment.parsed_options) if environment.parsed_options else {}
        given = {name: checked(value, name) for name in OPTIONS if (value := options.get(name.replace("-", "_")))}
        host, port, tls = parse_address(environment.host or cls.host, given.get("tcp-port"))
        settings: Any = {key: given.get(f"chat-{key}") or getattr(cls, key) for key in ("framing", "echo", "timeout")}
        hooks |= {"tls": cls.tls_context if tls else None, "delivery": options.get("chat_delivery", False)}
        return TCPSocketClient(host, port, environment.events.request, **settings, **hooks)

    def on_connect(self) -> None:
        """Called after every connect: override it to log in. An ``OSError`` raised here is a failed ``login`` row."""

    def on_start(self) -> None:
        """Connect. A failure is a row, and the first message tries again."""
        self.client.connect()

    def on_stop(self) -> None:
        """Close the connection."""
        self.client.close()


SENTENCES = (
    "오늘 저녁에 시간 되시면 같이 식사해요 🍜",
    "The build is green again, thanks for the quick fix!",
    "회의는 세 시로 옮겼습니다, 확인 부탁드려요.",
    "사진 정말 잘 나왔네요 📷 어디에서 찍으셨어요?",
    "Ça marche très bien 👍 Schöne Grüße aus München!",
)
# With up to 22 bytes for the tag: at most 60, 100 to 400, 513 to 1,000 bytes as sent.
SHORT_TEXTS = ("안녕하세요! 👋", "Hello, everyone!", "점심 드셨어요? 🍜", "ㅋㅋㅋ 좋아요 😄", "Très bien, merci", "👍")
LONG_TEXTS = [" ".join(SENTENCES[first:] + SENTENCES[:first]) for first in range(len(SENTENCES))]
VERY_LONG_TEXTS = [f"{text} {text}" for text in LONG_TEXTS]


class ChatClient(TCPChatUser):
    """Mostly short messages, some long, a few very long. A new scenario is one more ``@task`` method."""

    @task(5)
    def short_message(self) -> None:
        """At most 60 bytes: what people mostly type."""
        self.client.send_chat(random.choice(SHORT_TEXTS))

    @task(2)
    def long_message(self) -> None:
        """100 to 400 bytes: a few sentences."""
        self.client.send_chat(random.choice(LONG_TEXTS))

    @task(1)
    def very_long_message(self) -> None:
        """513 to 1,000 bytes: more than the 512-byte buffer of many servers."""
        self.client.send_chat(random.choice(VERY_LONG_TEXTS))


def bucket_response_time(milliseconds: float, otherwise: Callable[[float], int] = stats.bucket_response_time) -> float:
    """Keep two significant digits below 10 ms, where Locust counts whole ms ("Customizing response time bucketing")."""
    steps = 10 if milliseconds >= 1 else 100 if milliseconds >= 0.1 else 1000
    return otherwise(milliseconds) if milliseconds >= 10 else int(milliseconds * steps + 0.5) / steps


stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]


@events.init_command_line_parser.add_listener
def add_options(parser: argument_parser.LocustArgumentParser) -> None:
    """Add this file's options to Locust's. Values stay text, as in the web form, and empty means not given."""
    for option, (_, meaning, instead) in OPTIONS.items():
        check = functools.partial(lambda text, option: text and checked(text, option), option=option)
        name, value = option.upper().replace("-", "_"), f"<{option.rpartition('-')[2]}>"
        parser.add_argument(f"--{option}", metavar=value, env_var=name, type=check, help=f"{meaning}: {instead}")
    parser.add_argument("--chat-delivery", action="store_true", env_var="CHAT_DELIVERY", help="Time messages of others")
    served = f"Serve a built-in echo chat server on --host ({DEFAULT_HOST}:{DEFAULT_PORT} if none) during the test"
    parser.add_argument("--echo-server", action="store_true", include_in_web_ui=False, help=served)


@events.init.add_listener
def prepare(environment: env.Environment, **_: Any) -> None:
    """Start the echo server if asked for, and end Locust with one line where a setting is wrong."""
    options: Any = environment.parsed_options
    if options is None or isinstance(environment.runner, runners.WorkerRunner):  # a worker asks its master
        return
    environment.events.quitting.add_listener(judge)
    try:
        if options.echo_server:
            start_echo_server(environment)
        for cls in environment.user_classes:
            if issubclass(cls, TCPChatUser) and (environment.host or cls.host or options.headless or options.autostart):
                cls.new_client(environment)
    except (OSError, ValueError) as error:
        for worker in psutil.Process().children() if options.processes else ():
            worker.kill()  # Locust has forked it already, and it would wait for its master in vain
        sys.exit(f"locust: error: {error}")


def judge(environment: Any, **_: Any) -> None:
    """Set the exit code where a limit was given, and say in one line how echoes and failed connects compare with it."""
    options, runner, none = environment.parsed_options, environment.runner, stats.StatsEntry(environment.stats, "", "")
    if not (options.chat_max_fail_ratio or options.chat_max_p95) or environment.process_exit_code is not None:
        return  # Locust may come here twice
    runner.stop()  # after Ctrl-C, users are still there
    gevent.sleep(isinstance(runner, runners.MasterRunner) * (runners.WORKER_REPORT_INTERVAL + 0.5))  # for last reports
    echoes, connects = (environment.stats.entries.get((name, "TCP"), none) for name in ("echo_response", "connect"))
    failures, tries = echoes.num_failures + connects.num_failures, echoes.num_requests + connects.num_failures
    ratio = ("fail ratio {:.4g}", failures / max(1, tries), options.chat_max_fail_ratio)
    p95 = ("95th percentile {:.4g} ms", echoes.get_response_time_percentile(0.95), options.chat_max_p95)
    limits = [row for row in (ratio, p95) if row[2]]
    held = tries > failures and all(figure <= float(limit) for _, figure, limit in limits)
    texts = [f"{text.format(figure)} (limit {limit})" for text, figure, limit in limits]
    texts += ["no echo came"] * (tries == failures)
    print(f"locust: verdict {'passed' if held else 'failed'}: {', '.join(texts)}", file=sys.stderr)
    if not (held and runner.exceptions):  # a mistake in a task is left to Locust's own rule
        environment.process_exit_code = int(not held)


def start_echo_server(environment: Any) -> server.StreamServer:
    """Return a server that is listening on the host and sends every byte back, whatever the framing."""

    def echo(connection: socket.socket, _address: object) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            while data := connection.recv(READ_SIZE):
                connection.sendall(data)

    environment.host = environment.host or f"{DEFAULT_HOST}:{environment.parsed_options.tcp_port or DEFAULT_PORT}"
    host, port, tls = parse_address(environment.host, environment.parsed_options.tcp_port)
    if tls:
        raise SettingError(environment.host, f"tcp://{host}:{port}: the built-in echo server has no TLS")
    echo_server = server.StreamServer((host, port), echo, backlog=1024)
    echo_server.start()
    return echo_server


def send_five(environment: env.Environment) -> int:
    """Send five messages as ``ChatClient`` does and print a line for each; return 0 if all came back, else 1."""
    client, times = ChatClient(environment).client, list[float]()
    row = "send_chat" if client.echo == "none" else "echo_response"

    @environment.events.request.add_listener
    def on_request(name: str, response_time: float, response_length: int, exception: object, **_: Any) -> None:
        if exception is not None:
            print(f"{name} failed after {response_time:.1f} ms: {exception!r}")
        elif name == row:
            times.append(response_time)
            print(f"{response_length:5} bytes {response_time:9.3f} ms", end="\n" if row == "send_chat" else "  ")

    for text in (*SHORT_TEXTS[:3], LONG_TEXTS[0], VERY_LONG_TEXTS[0]):
        if (echoed := client.send_chat(text)) is not None:
            print(repr(echoed[:40]))  # escaped, as a terminal acts on some characters that a server can send
    client.close()
    median = f", median {sorted(times)[len(times) // 2]:.3f} ms" if times else ""
    print(f"{len(times)} of 5 messages {'sent' if client.echo == 'none' else 'came back'}{median}")
    return 0 if len(times) == 5 else 1


def main(arguments: list[str] | None = None) -> int:
    """Run without Locust's engine: five messages, or the echo server. Return the exit code."""
    parser = argument_parser.LocustArgumentParser(description="Send five messages to a TCP chat server, or be one.")
    parser.add_argument("host", nargs="?", default=DEFAULT_HOST, help=f"host or host:port (default {DEFAULT_HOST})")
    parser.add_argument("port", nargs="?", help=f"default TCP_PORT or {DEFAULT_PORT}")
    add_options(parser)
    options: Any = parser.parse_args(arguments)
    options.tcp_port = options.port or options.tcp_port or str(DEFAULT_PORT)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    environment = env.Environment(host=options.host, parsed_options=options, events=events)
    try:
        ChatClient.new_client(environment)
        if options.echo_server:
            echo_server = start_echo_server(environment)
            print(f"echo server on {echo_server.server_host}:{echo_server.server_port}, Ctrl-C ends it", flush=True)
            echo_server.serve_forever()
        return send_five(environment)
    except (OSError, ValueError) as error:
        sys.exit(parser.error(str(error)))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
