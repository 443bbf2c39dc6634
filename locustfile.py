"""Load-test a TCP chat server with Locust: connect, send chat messages, time their echoes.

    locust --headless --users 20 --spawn-rate 10 --run-time 10s --echo-server   no server needed
    locust --host=localhost:12345                                               web UI on port 8089
    python locustfile.py localhost 12345                                        five messages

Rows: connect; send_chat, until the kernel has the last byte; echo_response, the round trip; login,
the round trips of ``on_connect``; as a failure only, disconnect.

From top to bottom: errors, framing, settings, the exchange (one message on its way), the
connection, ``TCPSocketClient``, ``TCPChatUser``, ``ChatClient`` (add your ``@task`` there),
Locust's hooks, the built-in echo server, the standalone mode.
"""

from __future__ import annotations

# Locust comes first: it replaces the blocking calls of the standard library with gevent's.
from locust import User, argument_parser, between, env, event, events, runners, stats, task  # isort: skip

import argparse
import contextlib
import functools
import io
import ipaddress
import itertools
import logging
import math
import os
import random
import re
import socket
import ssl
import statistics
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from time import perf_counter
from typing import Literal, NamedTuple, Protocol

import gevent
import gevent.event
import gevent.hub
import gevent.monkey
import gevent.server

logger = logging.getLogger(__name__)

MESSAGE_LIMIT = 1024 * 1024  # bytes; no chat message is longer, more without an end is a flood
# Bytes a read. A larger buffer costs more to allocate than the calls it saves; a smaller one could
# leave a part of a TLS record, which has up to 16 KiB, where the event loop does not see it.
READ_SIZE = 16 * 1024
FIRST_PAUSE = 0.1  # seconds, at most, between the first failed attempt to connect and the second
LONGEST_PAUSE = 5.0  # seconds, at most, between two attempts after many have failed
BACKLOG_MESSAGES = 10_000  # messages that may wait for a user's on_message
BACKLOG_BYTES = 16 * 1024 * 1024  # bytes that may wait for it
TOLERATED_LATENESS = 1.0  # seconds; further behind its schedule, the generator is too slow
DEFAULT_HOST = "127.0.0.1"  # of the built-in echo server and of the standalone mode
DEFAULT_PORT = 12345


# ---------------------------------------------------------------------------------------- errors
# What a request fails with. Locust counts failures by their text, so each class has one fixed text,
# its docstring, with nothing in it that the server sent.


class ChatError(Exception):
    """The chat failed."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class EchoTimeout(ChatError, TimeoutError):
    """No echo came within the time-out."""


class EchoTruncated(ChatError):
    """The echo ends before the message does."""


class EchoAltered(ChatError):
    """The echo is not what was sent."""


class EchoRefused(ChatError):
    """The server answered with a refusal."""


class EchoFunctionError(ChatError):
    """The function given as echo failed; level DEBUG logs where."""


class ConnectionClosed(ChatError, ConnectionError):
    """The server closed the connection."""


class MessageTooLong(ChatError):
    """The server sent over 1 MiB without the end of a message."""


class FramingError(ChatError):
    """The framing failed on what the server sent; level DEBUG logs where."""


class HandlerTooSlow(ChatError):
    """The user's on_message is 10,000 messages or 16 MiB behind."""


class SettingError(argparse.ArgumentTypeError, ValueError):
    """A setting is wrong. The text says what was written, and what to write instead."""

    def __init__(self, written: object, instead: str) -> None:
        what = repr(written) if written else "an empty setting"
        super().__init__(f"{what} will not do: write {instead}")


def log_place_of(error: Exception) -> None:
    """Log at level DEBUG where user code failed, without its text, which may hold server bytes."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.debug("%s\n%s", type(error).__name__, where)


# --------------------------------------------------------------------------------------- framing


class Framing(Protocol):
    """How messages lie in the byte stream: bytes to messages and back, and nothing else.

    Each connection gets an object of its own. Any class with these two methods will do. They run
    on the event loop, and must not block.
    """

    def encode(self, payload: bytes) -> bytes:
        """Return the bytes to send for one message.

        :raises ValueError: for a message that cannot be carried
        """

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Take the next received bytes, cut anywhere; return the payloads that are complete now.

        :raises MessageTooLong: for a message over the limit
        """


class RawFraming:
    """No framing: whatever one read returns is a message."""

    def encode(self, payload: bytes) -> bytes:
        """Return the payload as it is."""
        return payload

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Return what was read, as one message."""
        return (data,)


class LineFraming:
    r"""A message ends with ``\n``; a ``\r`` before it is dropped."""

    delimiter = b"\n"
    r"""What is sent after a message. It ends with ``\n``, and so do the messages that arrive."""

    def __init__(self) -> None:
        self._incomplete = bytearray()

    def encode(self, payload: bytes) -> bytes:
        r"""Return payload and delimiter.

        :raises ValueError: for a payload of which the other side would make something else
        """
        if b"\n" in payload or payload.endswith(b"\r"):
            raise ValueError(
                "line framing carries no line break, and no carriage return at the end of a message"
            )
        return payload + self.delimiter

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Return the lines that end in data.

        :raises MessageTooLong: for a line over the limit
        """
        # Nearly every read is one whole line, and READ_SIZE is far below the limit.
        end = data.find(b"\n")
        is_one_line = end >= 0 and end == len(data) - 1
        if is_one_line and not self._incomplete and len(data) <= MESSAGE_LIMIT:
            return (data[:-1].removesuffix(b"\r"),)
        return self._split(data)

    def _split(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that end in data, and keep the rest."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._extend(data[start:end])
            line = bytes(self._incomplete)
            self._incomplete.clear()
            yield line.removesuffix(b"\r")
            start = end + 1
        self._extend(data[start:])

    def _extend(self, data: bytes) -> None:
        r"""Add data to the incomplete line, which may be as long as a message and a ``\r``."""
        if len(self._incomplete) + len(data) > MESSAGE_LIMIT + 1:
            raise MessageTooLong
        self._incomplete += data


class CrlfFraming(LineFraming):
    r"""Lines, sent with ``\r\n``, for servers that wait for both (Twisted, telnet, muds)."""

    delimiter = b"\r\n"


class LengthPrefixFraming:
    """A message is its length, packed as a ``struct`` format says, and then as many bytes."""

    def __init__(self, length_format: str) -> None:
        self._length = struct.Struct(length_format)
        self._buffer = bytearray()

    def encode(self, payload: bytes) -> bytes:
        """Return prefix and payload.

        :raises ValueError: for a length that the prefix cannot say
        """
        if len(payload) >= 256**self._length.size:
            raise ValueError("the message is longer than its length prefix can say")
        return self._length.pack(len(payload)) + payload

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the payloads that data completes.

        :raises MessageTooLong: for a length over the limit
        """
        self._buffer += data
        start = self._length.size
        while len(self._buffer) >= start:
            (length,) = self._length.unpack_from(self._buffer)
            if length > MESSAGE_LIMIT:
                raise MessageTooLong
            end = start + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[start:end])
            del self._buffer[:end]
            yield payload


# -------------------------------------------------------------------------- settings and address

EchoMode = Literal["full", "tag", "any", "none"]
ECHO_MODES: tuple[EchoMode, ...] = ("full", "tag", "any", "none")
EchoFunction = Callable[[bytes], bool]
Echo = EchoMode | EchoFunction
FramingFactory = Callable[[], Framing]

NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
PORT = re.compile(r"[1-9]\d{0,4}", re.ASCII)
LENGTH_FORMAT = re.compile(r"[@=<>!]?[BHILQ]")
LABEL = r"[^\s:/\[\]@?#\\.]{1,63}"
ADDRESS = re.compile(
    rf"(?:(?P<scheme>tls|tcp)://)?"
    rf"(?:\[(?P<ipv6>[\w:.%]+)\]|(?P<name>{LABEL}(?:\.{LABEL})*))"
    rf"(?::(?P<port>[^/]*))?"
)


class Address(NamedTuple):
    """Where the server is."""

    host: str
    port: int
    tls: bool


def parse_address(host: str | None, port: str | None = None) -> Address:
    """Understand ``host:port``, or a host with the port beside it, ``tcp://`` or ``tls://`` before.

    :raises SettingError: for anything else
    """
    match = ADDRESS.fullmatch((host or "").strip())
    if match is None or (match["port"] is None and not port):
        raise SettingError(
            host, "host:port, such as localhost:12345 or tls://[::1]:12345, or add --tcp-port"
        )
    written = port if match["port"] is None else match["port"]
    return Address(match["ipv6"] or match["name"], parse_port(written), match["scheme"] == "tls")


def parse_port(value: object) -> int:
    """Return the number of a port."""
    text = str(value)
    if not PORT.fullmatch(text) or int(text) > 65535:
        raise SettingError(value, "a port from 1 to 65535")
    return int(text)


def parse_framing(value: object) -> FramingFactory:
    """Return the factory of framings that a name means; a factory is returned as it is."""
    if callable(value):
        return value
    named: dict[object, FramingFactory] = {
        "line": LineFraming,
        "crlf": CrlfFraming,
        "raw": RawFraming,
    }
    if value in named:
        return named[value]
    if not LENGTH_FORMAT.fullmatch(str(value)):
        raise SettingError(value, "line (default), crlf, raw, or a prefix like >I, <H")
    return functools.partial(LengthPrefixFraming, str(value))


def parse_echo(value: object) -> EchoMode:
    """Return the mode that a name means."""
    for mode in ECHO_MODES:
        if value == mode:
            return mode
    raise SettingError(value, "full (default), tag, any or none")


def parse_timeout(value: object) -> float:
    """Return seconds above 0."""
    return parse_positive(value, "seconds above 0 (default 5)")


def parse_rate(value: object) -> float:
    """Return messages a second, above 0."""
    return parse_positive(value, "messages a second above 0, such as 2 or 0.1")


def parse_positive(value: object, instead: str) -> float:
    """Return a number above 0; raise ``SettingError``, which says what to write instead."""
    if isinstance(value, (int, float)) and 0 < value < float("inf"):  # of a user class
        return float(value)
    text = str(value)
    if not NUMBER.fullmatch(text) or float(text) == 0:
        raise SettingError(value, instead)
    return float(text)


class Pause(NamedTuple):
    """The shortest and the longest pause between two messages, in seconds."""

    shortest: float
    longest: float


def parse_pause(value: object) -> Pause:
    """Understand one number of seconds, or two as ``0.5-2``."""
    shortest, dash, longest = str(value).partition("-")
    if not dash:
        longest = shortest
    if NUMBER.fullmatch(shortest) and NUMBER.fullmatch(longest):
        pause = Pause(float(shortest), float(longest))
        if pause.shortest <= pause.longest:
            return pause
    raise SettingError(value, "seconds, such as 2, 0.5-2 or 0 (default 1-3)")


def parse_sources(value: object) -> tuple[str, ...]:
    """Understand the addresses of this machine, with commas between them."""
    addresses = tuple(str(value).split(","))
    for address in addresses:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            instead = "addresses of this machine, such as 127.0.0.1,127.0.0.2"
            raise SettingError(value, instead) from None
    return addresses


class Option(NamedTuple):
    """An option of this file. Its value stays text, as the web form has it, until it is used."""

    name: str
    parse: Callable[[object], object]
    meaning: str
    choices: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """The name among the parsed options, and in capitals that of the environment variable."""
        return self.name.replace("-", "_")

    def check(self, text: str) -> str:
        """Return the text as it is: argparse shows the ``SettingError`` of a wrong one.

        Empty means not given, as in a field of the web form that is left empty.
        """
        if text:
            self.parse(text)
        return text

    def add_to(
        self, parser: argument_parser.LocustArgumentParser, default: str | None = None
    ) -> None:
        """Add it to Locust's options, its environment variable and the web form with it."""
        parser.add_argument(
            f"--{self.name}",
            metavar=f"<{self.name.rpartition('-')[2]}>",
            env_var=self.key.upper(),
            type=self.check,
            choices=self.choices,
            default=default,
            help=self.meaning if default is None else f"{self.meaning} (default {default})",
        )


OPTIONS = (
    Option("tcp-port", parse_port, "Port of the chat server where the host names none"),
    Option("chat-framing", parse_framing, "Framing: line (default), crlf, raw, or a prefix >I, <H"),
    Option("chat-echo", parse_echo, "What counts as the echo (default full)", ("", *ECHO_MODES)),
    Option("chat-timeout", parse_timeout, "Seconds for connecting, and for each echo (default 5)"),
    Option("chat-wait", parse_pause, "Seconds between messages: 2, 0.5-2 or 0 (default 1-3)"),
    Option("chat-rate", parse_rate, "Messages a second of each user, in open loop"),
    Option("chat-source", parse_sources, "Local addresses to connect from in turn: A,B,…"),
)


class Settings(NamedTuple):
    """What the options say, or else the user class."""

    address: Address
    framing: FramingFactory
    echo: EchoMode
    timeout: float
    pause: Pause | None
    rate: float | None
    sources: tuple[str, ...]


def given_options(environment: env.Environment) -> dict[str, str]:
    """Return the options of this file that were given, as text, after their checks.

    :raises SettingError: for a wrong one, and for two that exclude each other
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    texts: dict[str, str] = {}
    for option in OPTIONS:
        text = option.check(str(options.get(option.key) or ""))
        if text:
            texts[option.key] = text
    if "chat_rate" in texts and "chat_wait" in texts:
        raise SettingError(
            f"--chat-rate={texts['chat_rate']} with --chat-wait={texts['chat_wait']}",
            "one of them: a rate is open loop, and has no pauses",
        )
    return texts


def settings_of(user_class: type[TCPChatUser], environment: env.Environment) -> Settings:
    """Return the settings of the users of a class.

    :raises SettingError: for the first setting that is wrong
    """
    options = given_options(environment)
    pause = options.get("chat_wait")
    rate: object = options.get("chat_rate")
    if rate is None and pause is None:
        rate = user_class.rate
    return Settings(
        address=parse_address(environment.host or user_class.host, options.get("tcp_port")),
        framing=parse_framing(options.get("chat_framing") or user_class.framing),
        echo=parse_echo(options.get("chat_echo") or user_class.echo),
        timeout=parse_timeout(options.get("chat_timeout") or user_class.timeout),
        pause=None if pause is None else parse_pause(pause),
        rate=None if rate is None else parse_rate(rate),
        sources=parse_sources(options["chat_source"]) if "chat_source" in options else (),
    )


# ---------------------------------------------------------------------------------- the exchange

# A tag is the identity of its client and the number of the message: 3f9a1c20.17
TAG = re.compile(rb"[0-9a-f]{8}\.\d{1,9}(?!\d)")


class Exchange:
    """One message on its way: what it awaits, when things happened, and what came of it."""

    __slots__ = (
        "abandoned",
        "answered_with",
        "arrived",
        "at_end",
        "connection",
        "echo",
        "expected",
        "in_login",
        "message",
        "name",
        "outcome",
        "payload",
        "returns_bytes",
        "sent",
        "size",
        "started",
        "tag",
        "unsent",
    )

    def __init__(self, connection: Connection, message: str | bytes, echo: Echo) -> None:
        self.connection = connection
        self.message = message  # as it is sent
        self.payload = message if isinstance(message, bytes) else message.encode()
        self.returns_bytes = False  # as the caller gave bytes
        self.unsent = b""  # what of it, framed, the kernel has not taken yet
        self.size = 0  # bytes on the wire
        self.tag = b""  # empty: sent untagged
        self.echo = echo
        self.expected = b""  # what a ``full`` echo has to contain
        self.name: str | None = None  # of the row that ends it, if it is not the usual one
        self.in_login = False  # sent by ``on_connect``
        self.started = 0.0  # ``perf_counter`` when its turn to be sent came
        self.sent = 0.0  # when the kernel had taken its last byte
        self.arrived = 0.0  # when the last byte of its echo was read, or when it failed
        self.outcome: bytes | Exception | None = None  # None: not ended, own close, none awaited
        self.answered_with: bytes | None = None  # the message that was found to be the echo
        self.abandoned = False  # its greenlet was stopped: ``send_chat`` is all that is reported
        self.at_end: Callable[[Exchange], object] = ignore  # lets its greenlet go on, or reports

    @property
    def is_on_its_way(self) -> bool:
        """Whether the kernel has taken a part of the message, or all of it."""
        return not self.unsent or len(self.unsent) < self.size

    def accepts(self, payload: bytes, has_own_tag: bool) -> bool:
        """Return whether a payload is the answer to this untagged message.

        :raises EchoFunctionError: where the function that the user gave raises anything
        """
        if self.echo == "any":
            return not has_own_tag  # not the late echo of a message that was given up
        try:
            return callable(self.echo) and bool(self.echo(payload))
        except Exception as error:
            log_place_of(error)
            raise EchoFunctionError from error

    def judge(self, payload: bytes, tag_at: int) -> bytes | Exception:
        """Return the payload, which carries this tag, if it is a good echo, else what is wrong."""
        if payload == self.expected:
            return self.expected  # the very object, so that ``returned`` need not decode it
        if self.echo == "tag" or self.expected in payload:
            return payload
        from_tag_on = payload[tag_at:]
        tag_in_expected = max(0, self.expected.find(self.tag))
        if self.expected.startswith(from_tag_on, tag_in_expected):
            return EchoTruncated()
        return EchoAltered()

    def answer(self, payload: bytes, arrived: float, tag_at: int = 0) -> None:
        """Take its answer. It ends the exchange as soon as all of the message is sent.

        :param tag_at: where in the payload the tag stands
        """
        self.answered_with = payload
        self.outcome = self.judge(payload, tag_at) if self.tag else payload
        self.arrived = arrived
        if not self.unsent:
            TURNS.wake(self)

    def all_sent(self, now: float) -> None:
        """Note that the kernel has taken the last byte; end it where nothing more is awaited."""
        self.sent = now
        if self.echo == "none" or self.outcome is not None:
            TURNS.wake(self)

    def fail(self, error: Exception | None) -> None:
        """End it with an error, or with none where the user closed the connection."""
        self.outcome = error
        self.answered_with = None
        self.arrived = perf_counter()
        self.unsent = b""
        TURNS.wake(self)

    def returned(self, echo: bytes) -> str | bytes:
        """Return an echo as the caller gets it: as text where text was sent."""
        if self.returns_bytes:
            return echo
        if echo is self.payload and isinstance(self.message, str):
            return self.message  # which saves the decoding
        return echo.decode("utf-8", "replace")


def ignore(_: object) -> None:
    """Do nothing."""


class Turns:
    """What the event loop does in a turn: make all sends back to back, then let users go on.

    Sends are gathered because it costs more to wake a server than to send to one that is at work.
    Users go on in portions, as what they touch is then still in the processor's cache when they
    send again. docs/design.md has the measurements.
    """

    PORTION = 100  # exchanges that end in one turn

    def __init__(self) -> None:
        self._ended: deque[Exchange] = deque()
        self._to_send: deque[Exchange] = deque()
        self._is_planned = False

    def wake(self, exchange: Exchange) -> None:
        """Let whoever waits for the end of this exchange go on in a coming turn."""
        self._ended.append(exchange)
        if not self._is_planned:
            self._plan()

    def send(self, exchange: Exchange) -> None:
        """Let the message of this exchange be sent in the coming turn."""
        self._to_send.append(exchange)
        if not self._is_planned:
            self._plan()

    def send_all(self) -> None:
        """Make the sends whose turn it is."""
        while self._to_send:
            exchange = self._to_send.popleft()
            exchange.connection.send_in_turn(exchange)

    def _plan(self) -> None:
        """Ask the event loop for a turn."""
        self._is_planned = True
        gevent.get_hub().loop.run_callback(self._take)

    def _take(self) -> None:
        """Take a turn, and plan the next where more is left to do."""
        try:
            self.send_all()
            for _ in range(min(len(self._ended), self.PORTION)):
                exchange = self._ended.popleft()
                # Mostly a switch to the user, who comes back here with its next wait.
                exchange.at_end(exchange)
        finally:
            self._is_planned = False
            if self._ended or self._to_send:
                self._plan()


TURNS = Turns()


class Helpers:
    """Greenlets for what may block, and so has no place on the event loop.

    One helper does job after job. When a job waits for something, another helper takes those that
    are left: so a job that does not wait costs no switch of its own. Helpers are kept, as to make a
    greenlet takes 10 µs.
    """

    MOST_IDLE = 100  # greenlets kept

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], object]] = deque()
        self._idle: list[gevent.hub.Waiter] = []
        self._is_planned = False

    def do(self, job: Callable[[], object]) -> None:
        """Let a helper do a job soon."""
        self._jobs.append(job)
        if not self._is_planned:
            self._is_planned = True
            gevent.get_hub().loop.run_callback(self._begin)

    def _begin(self) -> None:
        """Let helpers do all jobs. The event loop calls it."""
        self._is_planned = False
        while self._jobs:
            # Comes back here when no job is left, or when the helper waits for something.
            if self._idle:
                self._idle.pop().switch(None)
            else:
                gevent.Greenlet(self._work).switch()

    def _work(self) -> None:
        """Do jobs until none is left, and wait for more, unless there are enough idle helpers."""
        waiter = gevent.hub.Waiter()
        while True:
            while self._jobs:
                job = self._jobs.popleft()
                job()
            if len(self._idle) >= self.MOST_IDLE:
                return
            self._idle.append(waiter)
            waiter.get()


HELPERS = Helpers()


# -------------------------------------------------------------------------------- the connection

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
READABLE, WRITABLE = 1, 2  # what libev, the event loop, watches a socket for
# Linux, ip(7): choose the port when connecting, not when binding. Python 3.11 has no name for it.
IP_BIND_ADDRESS_NO_PORT = 24


def open_socket(
    host: str,
    port: int,
    timeout: float,
    tls: ssl.SSLContext | None,
    source: str | None,
) -> socket.socket:
    """Return a connected socket that does not block; the timeout covers look-up, TCP and TLS.

    :raises OSError: where there is no connection
    :raises ValueError: for a name that cannot be looked up
    """
    # The block closes ``sock`` after a failure; else it is empty by then, its socket handed on.
    with gevent.Timeout(timeout, False), connect_socket(host, port, source) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no waiting as of RFC 896
        if tls is not None:
            connected: socket.socket = tls.wrap_socket(sock, server_hostname=host)
        else:
            # The event loop reads and writes by itself, and so needs nothing of gevent's socket.
            plain_socket = gevent.monkey.get_original("socket", "socket")
            connected = plain_socket(fileno=sock.detach())
        connected.setblocking(False)
        return connected
    # Here only after the time-out, which ends the block silently.
    raise TimeoutError("no connection within the time-out")


def connect_socket(host: str, port: int, source: str | None) -> socket.socket:
    """Return a socket connected to the first address of the host that accepts.

    :raises OSError: of the last address that did not
    """
    failure = OSError("the host has no address of the same family as the source")
    for family, kind, protocol, _, target in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        if source is not None and family != family_of(source):
            continue
        with contextlib.ExitStack() as cleanup:  # closes the socket after a failure or time-out
            sock = cleanup.enter_context(socket.socket(family, kind, protocol))
            try:
                if source is not None:
                    bind_to_source(sock, source)
                sock.connect(target)
            except OSError as error:
                failure = error
                continue
            cleanup.pop_all()  # connected: it stays open
            return sock
    raise failure


def family_of(source: str) -> socket.AddressFamily:
    """Return the address family of an IPv4 or IPv6 address."""
    return socket.AF_INET6 if ":" in source else socket.AF_INET


def bind_to_source(sock: socket.socket, source: str) -> None:
    """Let a socket connect from this local address.

    The port is chosen only when it connects, where the system can do that: so two connections to
    different servers may share one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # an old kernel
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((source, 0))


@functools.cache
def rotation_of(sources: tuple[str, ...]) -> Iterator[str]:
    """Return the local addresses in turn, one iterator for all clients of the process."""
    return itertools.cycle(sources)


@functools.cache
def shared_tls_context(factory: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return the context that a factory makes: one for all, as reading authorities is slow."""
    return factory()


class Backlog:
    """How much waits for the ``on_message`` of a client, on all connections it has had."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0


class Inbox:
    """The messages of a connection that no exchange took, on their way to ``on_message``.

    They are handled in order, by a helper that is there while there are any.
    """

    __slots__ = ("_backlog", "_handle", "_is_handling", "_messages")

    def __init__(self, handle: Callable[[bytes, float], None], backlog: Backlog) -> None:
        self._handle = handle
        self._backlog = backlog
        self._messages: deque[tuple[bytes, float]] = deque()
        self._is_handling = False

    def put(self, payload: bytes, arrived: float) -> None:
        """Let a message be handled when its turn comes.

        :raises HandlerTooSlow: where too many are waiting already
        """
        backlog = self._backlog
        backlog.messages += 1
        backlog.bytes += len(payload)
        self._messages.append((payload, arrived))
        if backlog.messages > BACKLOG_MESSAGES or backlog.bytes > BACKLOG_BYTES:
            self.drop()
            raise HandlerTooSlow
        if not self._is_handling:
            self._is_handling = True
            HELPERS.do(self._handle_all)

    def drop(self) -> None:
        """Forget the messages that are waiting."""
        while self._messages:
            self._next()

    def _next(self) -> tuple[bytes, float]:
        payload, arrived = self._messages.popleft()
        self._backlog.messages -= 1
        self._backlog.bytes -= len(payload)
        return payload, arrived

    def _handle_all(self) -> None:
        try:
            while self._messages:
                self._handle(*self._next())
            self._is_handling = False
        except BaseException:  # a kill or GreenletExit ends this greenlet, and another goes on
            HELPERS.do(self._handle_all)
            raise


class Watcher(Protocol):
    """What gevent's event loop calls back when a socket is ready, or a time has come."""

    def start(self, callback: Callable[[], None]) -> None:
        """Watch from now on."""

    def close(self) -> None:
        """Watch no more."""


class Connection:
    """A connected socket, with all that lives and dies with it. That it exists is "connected".

    The event loop calls ``send_in_turn``, ``_read``, ``_on_writable`` and ``_on_deadline``: none of
    them may block or raise, as that would stop all users.
    """

    __slots__ = (
        "_deadline",
        "_framing",
        "_identity",
        "_on_end",
        "_reader",
        "_socket",
        "_tagged",
        "_timeout",
        "_unsent",
        "_untagged",
        "_waiting_for_turn",
        "_writer",
        "end_error",
        "inbox",
        "is_open",
        "since",
    )

    def __init__(
        self,
        sock: socket.socket,
        framing: Framing,
        identity: str,
        timeout: float,
        on_end: Callable[[Connection, Exception | None, bool], None],
    ) -> None:
        self.since = perf_counter()
        self.is_open = True
        self.end_error: Exception | None = None  # None after an own close, too
        self.inbox: Inbox | None = None  # of the user's ``on_message``, if there is one
        self._socket = sock
        self._framing = framing
        self._identity = identity.encode()
        self._timeout = timeout
        self._on_end = on_end
        # Lists, as most are empty or hold one exchange: an empty deque takes 600 bytes.
        self._unsent: list[Exchange] = []  # begun, but the kernel was full
        self._tagged: dict[bytes, Exchange] = {}  # begun; their echoes are awaited
        self._untagged: list[Exchange] = []  # the same, oldest first
        self._waiting_for_turn = 0  # messages that have not begun
        loop = gevent.get_hub().loop
        self._reader: Watcher = loop.io(sock.fileno(), READABLE)
        self._reader.start(self._read)
        self._writer: Watcher | None = None  # there is one while the kernel is full
        self._deadline: Watcher | None = None  # a timer, there is one while anything is in flight

    @property
    def is_awaited(self) -> bool:
        """Whether anything is in flight of which somebody wants to know the end."""
        begun = itertools.chain(*self._begun_in_order())
        return self._waiting_for_turn > 0 or any(not exchange.abandoned for exchange in begun)

    def _begun_in_order(self) -> tuple[Collection[Exchange], ...]:
        """Return the exchanges that have begun, the oldest of each kind first."""
        return self._unsent, self._tagged.values(), self._untagged

    # -- a message goes out

    def enqueue(self, exchange: Exchange) -> None:
        """Frame a message and let it be sent in its turn.

        :raises ValueError: where the framing cannot carry it, or would send nothing
        :raises TypeError: where a framing of the user's own does not return bytes
        """
        exchange.unsent = bytes(self._framing.encode(exchange.payload))  # str is an error here
        exchange.size = len(exchange.unsent)
        if exchange.size == 0:
            raise ValueError("an empty message sends nothing in this framing: write a byte")
        self._waiting_for_turn += 1
        TURNS.send(exchange)

    def send_in_turn(self, exchange: Exchange) -> None:
        """Begin an exchange, now that its turn has come: start its clock and send."""
        self._waiting_for_turn -= 1
        if exchange.abandoned:
            return
        if self.is_open and not exchange.tag and exchange.echo != "none":
            self._read_what_has_arrived()  # what came before is not the answer
        if not self.is_open:
            exchange.fail(self.end_error)
            return
        self._await_answer(exchange)
        if self._unsent or not self._send(exchange):
            self._unsent.append(exchange)
            self._watch_writable()

    def _await_answer(self, exchange: Exchange) -> None:
        """Start the clock of an exchange, and keep it where its answer finds it."""
        exchange.started = perf_counter()
        if exchange.echo != "none":
            if exchange.tag:
                self._tagged[exchange.tag] = exchange
            else:
                self._untagged.append(exchange)
        if self._deadline is None:
            self._watch_deadline(self._timeout)

    def _send(self, exchange: Exchange) -> bool:
        """Send what the kernel takes now; return False where it will take more later."""
        try:
            taken = self._socket.send(exchange.unsent)
        except WOULD_BLOCK:
            return False
        except OSError as error:
            self.end(error, is_told=not exchange.abandoned)
            if exchange.unsent:  # its echo was not awaited, so that the end did not know of it
                exchange.fail(error)
            return True
        exchange.unsent = exchange.unsent[taken:]
        if exchange.unsent:
            return False
        exchange.all_sent(perf_counter())
        return True

    def _watch_writable(self) -> None:
        """Go on sending when the kernel has room."""
        if self._writer is None:
            watcher: Watcher = gevent.get_hub().loop.io(self._socket.fileno(), WRITABLE)
            watcher.start(self._on_writable)
            self._writer = watcher

    def _on_writable(self) -> None:
        if self._untagged:
            self._read_what_has_arrived()  # what came before they were sent is not their answer
        while self._unsent and self._send(self._unsent[0]):
            del self._unsent[:1]  # none is left where the connection has ended
        if self._writer is not None and not self._unsent:
            self._writer.close()
            self._writer = None

    # -- a message comes in

    def _read_what_has_arrived(self) -> None:
        """Read all that is waiting now, and not for ever where a server sends without an end."""
        waiting = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)  # at most
        while waiting > 0:
            count = self._read()
            if count == 0:
                return
            waiting -= count

    def _read(self) -> int:
        """Read once and deliver the messages that are complete; return how many bytes came."""
        try:
            data = self._socket.recv(READ_SIZE)
        except WOULD_BLOCK:
            return 0
        except OSError as error:
            self.end(error)
            return 0
        arrived = perf_counter()
        if not data:
            self.end(ConnectionClosed())
            return 0
        try:
            for payload in self._framing.feed(data):
                self._deliver(payload, arrived)
        except ChatError as error:
            self.end(error)
        except Exception as error:  # a framing of the user's own can raise anything
            log_place_of(error)
            self.end(FramingError())
        return len(data)

    def _deliver(self, payload: bytes, arrived: float) -> None:
        """Take a message to where it belongs: to the exchange that awaits it, or else on_message.

        A message that carries several of this client's tags (framing ``raw``) answers each.
        """
        if len(self._tagged) == 1:  # mostly so, and then mostly its echo as it was sent
            (exchange,) = self._tagged.values()
            if payload == exchange.payload and exchange.expected is exchange.payload:
                self._tagged.clear()
                exchange.answer(payload, arrived)
                return
        has_own_tag = False
        is_taken = False
        position = payload.find(self._identity)
        while position >= 0:
            tag = TAG.match(payload, position)
            if tag is not None:
                has_own_tag = True
                owner = self._tagged.pop(tag[0], None)
                if owner is not None:
                    owner.answer(payload, arrived, position)
                    is_taken = True
            position = payload.find(self._identity, position + len(self._identity))
        if not is_taken:
            self._deliver_untagged(payload, arrived, has_own_tag)

    def _deliver_untagged(self, payload: bytes, arrived: float, has_own_tag: bool) -> None:
        """Take a message to the oldest untagged exchange that it answers, or else on_message."""
        for exchange in self._untagged:
            if exchange.is_on_its_way and exchange.accepts(payload, has_own_tag):
                self._untagged.remove(exchange)
                exchange.answer(payload, arrived)
                return
        if self.inbox is not None:
            self.inbox.put(payload, arrived)

    # -- nothing comes in

    def _watch_deadline(self, seconds: float) -> None:
        """Look in so many seconds whether an exchange is overdue.

        All have the same time-out, so the first to be overdue is one that began first: no timer
        has to be set for each message.
        """
        timer: Watcher = gevent.get_hub().loop.timer(seconds)
        timer.start(self._on_deadline)
        self._deadline = timer

    def _on_deadline(self) -> None:
        """Fail what is overdue, and look again when the next may be."""
        if self._deadline is not None:
            self._deadline.close()
            self._deadline = None
        latest_start = perf_counter() - self._timeout
        self._fail_overdue(latest_start)
        oldest = [next(iter(begun)).started for begun in self._begun_in_order() if begun]
        if oldest:
            self._watch_deadline(max(0.0, min(oldest) - latest_start))

    def _fail_overdue(self, latest_start: float) -> None:
        """Fail the exchanges that began so early, and end the connection where it is of no use."""
        overdue: list[Exchange] = []
        for begun in self._begun_in_order():
            overdue += itertools.takewhile(lambda e: e.started <= latest_start, begun)
        is_sent_in_time = all(not exchange.unsent for exchange in overdue)
        untagged = [exchange for exchange in overdue if not exchange.tag and not exchange.unsent]
        for exchange in overdue:
            if exchange.unsent:
                continue
            exchange.fail(EchoTimeout())
            if exchange.tag:
                del self._tagged[exchange.tag]
            else:
                self._untagged.remove(exchange)
        if not is_sent_in_time:
            self.end(TimeoutError("the server did not take the message within the time-out"))
        elif untagged:  # a late answer could not be told from that to the next message
            is_told = any(not exchange.abandoned for exchange in untagged)
            self.end(ConnectionClosed(), is_told=is_told)

    # -- the end

    def end(self, error: Exception | None, *, is_told: bool = False) -> None:
        """Close, and fail what is in flight with the error, or with none for an own close.

        :param is_told: a row tells of the end already
        """
        if not self.is_open:
            return
        self.is_open = False
        self.end_error = error
        for watcher in (self._reader, self._writer, self._deadline):
            if watcher is not None:
                watcher.close()
        close_socket(self._socket)
        is_told = is_told or self._waiting_for_turn > 0  # these fail when their turn comes
        # An exchange may be both unsent and awaited.
        for exchange in dict.fromkeys(itertools.chain(*self._begun_in_order())):
            exchange.fail(error)
            is_told = is_told or not exchange.abandoned
        self._unsent.clear()
        self._tagged.clear()
        self._untagged.clear()
        if self.inbox is not None and error is None:  # else what has come is handled
            self.inbox.drop()
        self._on_end(self, error, is_told)


def close_socket(sock: socket.socket) -> None:
    """Close a socket, after TLS's own good-bye: without it the end looks cut (RFC 8446, 6.1)."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):
            sock.unwrap()
    sock.close()


# ------------------------------------------------------------------------------------ the client

RUN = random.getrandbits(32)  # where the identities of this run begin
CLIENT_NUMBERS = itertools.count()


def new_identity() -> str:
    """Return eight hexadecimal digits that no other client of this run is likely to have.

    Locust forks workers after this file was loaded: they share RUN, and their process numbers are
    multiplied so that what they count from lies far apart.
    """
    number = RUN + os.getpid() * 0x9E3779B1 + next(CLIENT_NUMBERS)
    return f"{number % 2**32:08x}"


class BackOff:
    """The pauses between attempts to connect, so that users do not storm a recovering server.

    They double from 0.1 s to 5 s with full jitter: any pause up to the present one is as likely
    (AWS Architecture Blog, "Exponential Backoff And Jitter").
    """

    def __init__(self) -> None:
        self._failures = 0
        self._next_attempt = 0.0

    def wait(self) -> None:
        """Wait until the next attempt may be made."""
        gevent.sleep(max(0.0, self._next_attempt - perf_counter()))

    def put_off(self) -> None:
        """Put off the next attempt, more after each failure."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures, 10))
        self._next_attempt = perf_counter() + random.uniform(0, longest)
        self._failures += 1

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._failures = 0


class Attempt:
    """An attempt to connect and log in that is under way; who needs a connection waits for it."""

    def __init__(self) -> None:
        self.greenlet = gevent.getcurrent()
        self.result = gevent.event.AsyncResult()  # whether it succeeded; None: try yourself
        self.has_failed_row = False  # a message of ``on_connect`` failed: that is told already
        self.is_cancelled = False  # ``close`` was called


def usual_compose(tag: str, message: str) -> str | bytes:
    """Put the tag at the start: a server that cuts long messages still returns it."""
    return f"[{tag}] {message}"


def usual_error_report(error: Exception) -> None:
    """Log what the user's code raised where no task of Locust's takes it."""
    logger.error("%s", error, exc_info=error)


class TCPSocketClient:
    """A chat connection, which opens again when it is needed.

    A call blocks its caller alone: other users go on. What the server does wrong is a request
    event, and never raised into the task.

    :param host: name or address of the server
    :param port: its port
    :param request_event: what events are fired on: Locust's ``environment.events.request``
    :param framing: as in :class:`TCPChatUser`, and so ``echo`` and ``timeout``
    :param tls: makes the context of TLS connections; None for connections without TLS
    :param sources: local addresses to connect from, in turn
    :param waits: whether ``send_chat`` waits unless told otherwise; not in open loop
    :param compose: as in :class:`TCPChatUser`, and so ``expected``, ``is_refusal``, ``on_connect``
    :param on_message: the same; None drops the messages that no exchange takes
    :param report_error: takes what ``on_message`` raises, and ``is_refusal`` where nobody waits
    :raises ValueError: for a wrong framing, echo or timeout
    :raises OSError: where ``tls`` does, for a missing file say
    """

    def __init__(
        self,
        host: str,
        port: int,
        request_event: event.EventHook,
        *,
        framing: str | FramingFactory = "line",
        echo: EchoMode = "full",
        timeout: float = 5.0,
        tls: Callable[[], ssl.SSLContext] | None = None,
        sources: tuple[str, ...] = (),
        waits: bool = True,
        compose: Callable[[str, str], str | bytes] = usual_compose,
        expected: Callable[[str, str], str | bytes | None] | None = None,
        is_refusal: Callable[[bytes], bool] | None = None,
        on_connect: Callable[[], object] | None = None,
        on_message: Callable[[bytes, float], object] | None = None,
        report_error: Callable[[Exception], object] = usual_error_report,
    ) -> None:
        self.host = host
        self.port = port
        self.timeout = parse_timeout(timeout)
        self.identity = new_identity()
        self._request_event = request_event
        self._new_framing = parse_framing(framing)
        self._echo: Echo = parse_echo(echo)
        self._tls = None if tls is None else shared_tls_context(tls)
        self._sources = sources
        self._waits = waits
        self._compose = compose
        self._expected = expected
        self._is_refusal = is_refusal
        self._on_connect = on_connect
        self._on_message = on_message
        self._report_error = report_error
        self._message_numbers = itertools.count(1)
        self._back_off = BackOff()
        self._backlog = Backlog()
        self._unreported = 0  # reports that helpers have still to make
        self._connection: Connection | None = None
        self._attempt: Attempt | None = None
        # The greenlets in ``on_connect`` and ``on_message``, whose messages go over one connection
        # or none.
        self._bound: dict[gevent.Greenlet, Connection] = {}

    @property
    def connected_since(self) -> float | None:
        """When the connection was opened (``time.perf_counter``); None where there is none."""
        if self._connection is None:
            return None
        return self._connection.since

    # -- messages

    def send_chat(
        self,
        message: str | bytes,
        *,
        echo: Echo | None = None,
        wait: bool | None = None,
        name: str | None = None,
    ) -> str | bytes | None:
        """Send a message, connecting first if need be, and wait for its echo.

        Text is tagged, unless it starts with ``/`` (a command) or echo is ``any`` or a function;
        ``bytes`` go out as they are. The README has a table of what counts as the echo.

        :param echo: what counts as the echo of this message, instead of the client's mode; a
            function is called on the event loop, and must not block
        :param wait: False: hand the message over and go on; its rows come with its echo. None: wait
            in closed loop and in ``on_connect``
        :param name: of the row that ends the exchange, instead of ``echo_response``, or of
            ``send_chat`` where no echo is awaited
        :returns: the echo, ``bytes`` for a ``bytes`` message; None where the exchange failed, no
            echo is awaited, or it does not wait
        :raises ValueError: for a message that cannot be sent so, before anything is sent
        """
        if echo is None:
            echo = self._echo
        elif not callable(echo):
            echo = parse_echo(echo)
        connection = self._usable_connection()
        if connection is None:
            return None
        exchange = self._new_exchange(connection, message, echo)
        exchange.name = name
        exchange.in_login = self._attempt is not None and self._is_logging_in()
        if wait is None:
            wait = self._waits or exchange.in_login
        if wait:
            return self._exchange_and_wait(exchange)
        exchange.at_end = self._report_by_helper
        connection.enqueue(exchange)
        return None

    def _usable_connection(self) -> Connection | None:
        """Return the connection that the calling greenlet may use, or None where there is none."""
        if self._bound:
            bound = self._bound.get(gevent.getcurrent())
            if bound is not None and bound.is_open:
                return bound
            if bound is not None:
                gevent.sleep(0)  # who tries again and again lets others go on
                return None
        if (self._connection is None or self._attempt is not None) and not self.connect():
            return None
        return self._connection

    def _is_logging_in(self) -> bool:
        """Return whether the calling greenlet connects: in ``on_connect``, or a listener then."""
        attempt = self._attempt
        return attempt is not None and attempt.greenlet is gevent.getcurrent()

    def _new_exchange(self, connection: Connection, message: str | bytes, echo: Echo) -> Exchange:
        """Return the exchange of a message, tagged if it is to be."""
        if isinstance(message, bytes) or message.startswith("/"):
            if echo in ("full", "tag"):
                echo = "any"
        elif echo in ("full", "tag", "none"):
            return self._tagged_exchange(connection, message, echo)
        exchange = Exchange(connection, message, echo)
        exchange.returns_bytes = isinstance(message, bytes)
        return exchange

    def _tagged_exchange(self, connection: Connection, message: str, echo: Echo) -> Exchange:
        """Return the exchange of a text that gets a tag.

        :raises ValueError: where ``compose`` leaves the tag out, or makes it another
        """
        tag = f"{self.identity}.{next(self._message_numbers)}"
        exchange = Exchange(connection, self._compose(tag, message), echo)
        exchange.tag = tag.encode()
        start = exchange.payload.find(exchange.tag)
        if start < 0:
            raise ValueError("compose left out the tag: what it returns has to contain it")
        end = start + len(exchange.tag)
        if exchange.payload[end : end + 1].isdigit():
            raise ValueError("compose put a digit right behind the tag: put a space between")
        exchange.expected = exchange.payload
        if self._expected is not None:
            expected = self._expected(tag, message)
            if expected is not None:
                exchange.expected = expected if isinstance(expected, bytes) else expected.encode()
        return exchange

    def _exchange_and_wait(self, exchange: Exchange) -> str | bytes | None:
        """Send a message, wait until its exchange has ended, report it and return the echo."""
        waiter = gevent.hub.Waiter()
        exchange.at_end = waiter.switch
        exchange.connection.enqueue(exchange)
        try:
            waiter.get()
        except BaseException:  # Locust stops this user, or the task has a time-out of its own
            exchange.abandoned = True
            exchange.at_end = self._report_by_helper
            raise
        return self._report(exchange)

    # -- reports

    def _report(self, exchange: Exchange) -> str | bytes | None:
        """Fire the rows of an exchange that has ended; return the echo, or None."""
        sending_row, echo_row = self._row_names(exchange)
        if exchange.sent:
            self._fire(sending_row, exchange.sent - exchange.started, exchange.size)
        if exchange.abandoned:
            return None
        outcome = self._outcome(exchange)
        if outcome is None:
            return None
        seconds = exchange.arrived - (exchange.started or exchange.arrived)
        if isinstance(outcome, Exception):
            if exchange.sent:
                size = len(exchange.answered_with or b"")
                self._fire_failure(exchange, echo_row, seconds, size, outcome)
            else:
                self._fire_failure(exchange, sending_row, seconds, exchange.size, outcome)
            return None
        if not exchange.in_login:  # else an attempt after a refused login would come too soon
            self._back_off.reset()
        self._fire(echo_row, seconds, len(outcome))
        return exchange.returned(outcome)

    def _outcome(self, exchange: Exchange) -> bytes | Exception | None:
        """Return what came of an exchange: a refusal, where the user sees one in the echo."""
        answer = exchange.answered_with
        if answer is not None and self._is_refusal is not None and self._is_refusal(answer):
            return EchoRefused()
        return exchange.outcome

    def _row_names(self, exchange: Exchange) -> tuple[str, str]:
        """Return the names of the rows for the sending and for the echo of a message."""
        if exchange.echo == "none":
            return exchange.name or "send_chat", ""
        if exchange.in_login:
            return "send_chat", exchange.name or "login"
        return "send_chat", exchange.name or "echo_response"

    def _report_by_helper(self, exchange: Exchange) -> None:
        """Report an exchange that has ended, where no greenlet waits for its end."""
        self._let_helper(self._report, exchange)

    def _let_helper(self, report: Callable[..., object], *arguments: object) -> None:
        """Let a helper call ``_report`` or ``_fire``: a listener may block, the event loop not."""
        self._unreported += 1
        HELPERS.do(functools.partial(self._make_report, report, *arguments))

    def _make_report(self, report: Callable[..., object], *arguments: object) -> None:
        try:
            report(*arguments)
        except (Exception, gevent.Timeout) as error:  # of a listener, or of ``is_refusal``
            self._report_error(error)
        finally:
            self._unreported -= 1

    def _fire_failure(
        self, exchange: Exchange, name: str, seconds: float, size: int, error: Exception
    ) -> None:
        """Fire the row of a failed message."""
        if exchange.in_login and self._attempt is not None:
            self._attempt.has_failed_row = True
        self._fire(name, seconds, size, error)

    def _fire(self, name: str, seconds: float, size: int, error: Exception | None = None) -> None:
        """Fire a request event. Never on the event loop: a listener may block."""
        self._request_event.fire(
            request_type="TCP",
            name=name,
            response_time=seconds * 1000,
            response_length=size,
            exception=error,
            context={},
        )

    # -- the connection

    def connect(self) -> bool:
        """Connect and log in, unless that is done; return whether the connection stands.

        After failures this waits first. Greenlets that call it at the same time share an attempt.
        """
        bound = self._bound.get(gevent.getcurrent())
        if bound is not None:
            return bound.is_open
        if self._is_logging_in():  # a listener of the row ``connect`` uses the client
            return self._connection is not None
        while self._attempt is not None:
            succeeded: bool | None = self._attempt.result.get()
            if succeeded is not None:
                return succeeded
        if self._connection is not None:
            return True
        return self._make_attempt()

    def close(self) -> None:
        """Close the connection if there is one. The next message opens a new one."""
        if self._attempt is not None:
            self._attempt.is_cancelled = True
        TURNS.send_all()  # what was handed over goes out
        if self._connection is not None:
            self._connection.end(None)

    def wait_for_echoes(self, seconds: float) -> None:
        """Wait until nothing is in flight and all is reported, at most so many seconds."""
        limit = perf_counter() + seconds
        while perf_counter() < limit:
            is_awaited = self._connection is not None and self._connection.is_awaited
            if not is_awaited and self._unreported == 0:
                return
            gevent.sleep(0.01)  # a run stops only once: nothing is gained by being told

    def _make_attempt(self) -> bool:
        """Connect and log in, and tell those who wait for it how it went."""
        attempt = self._attempt = Attempt()
        succeeded: bool | None = None
        try:
            succeeded = self._open_and_log_in(attempt)
        except BaseException:  # without its login, the connection is of no use to others
            self.close()
            raise
        finally:
            self._attempt = None
            attempt.result.set(succeeded)
        return bool(succeeded)

    def _open_and_log_in(self, attempt: Attempt) -> bool | None:
        """Return whether the connection stands; None where the attempt was cancelled."""
        self._back_off.wait()
        started = perf_counter()
        try:
            sock = self._open_socket()
        except (OSError, ValueError) as error:
            self._back_off.put_off()
            self._fire("connect", perf_counter() - started, 0, error)
            return False
        if attempt.is_cancelled:
            sock.close()
            return None
        connection = self._new_connection(sock)
        self._connection = connection
        self._fire("connect", connection.since - started, 0)
        if self._on_connect is not None and connection.is_open:
            self._log_in(self._on_connect, connection, attempt)
        return connection.is_open

    def _open_socket(self) -> socket.socket:
        """Return a connected socket; raise ``OSError`` or ``ValueError`` where there is none."""
        source = next(rotation_of(self._sources)) if self._sources else None
        return open_socket(self.host, self.port, self.timeout, self._tls, source)

    def _new_connection(self, sock: socket.socket) -> Connection:
        """Return the connection of a connected socket."""
        framing = self._new_framing()
        connection = Connection(sock, framing, self.identity, self.timeout, self._on_connection_end)
        if self._on_message is not None:
            handle = functools.partial(self._handle, self._on_message, connection)
            connection.inbox = Inbox(handle, self._backlog)
        return connection

    def _log_in(
        self, on_connect: Callable[[], object], connection: Connection, attempt: Attempt
    ) -> None:
        """Run the user's login. One that raises ends the connection."""
        self._bound[attempt.greenlet] = connection
        try:
            on_connect()
        except (OSError, ValueError) as error:
            connection.end(None)
            if not attempt.has_failed_row:
                self._fire("login", perf_counter() - connection.since, 0, error)
        except Exception:  # a mistake in on_connect, which Locust reports
            connection.end(None)
            raise
        finally:
            del self._bound[attempt.greenlet]
            was_given_up = not connection.is_open and connection.end_error is None
            if was_given_up:  # an end by the server has put it off already
                self._back_off.put_off()

    def _handle(
        self,
        on_message: Callable[[bytes, float], object],
        connection: Connection,
        payload: bytes,
        arrived: float,
    ) -> None:
        """Give a message to the user's handler."""
        greenlet = gevent.getcurrent()
        self._bound[greenlet] = connection
        try:
            on_message(payload, arrived)
        except (Exception, gevent.Timeout) as error:
            self._report_error(error)
        finally:
            del self._bound[greenlet]

    def _on_connection_end(
        self, connection: Connection, error: Exception | None, is_told: bool
    ) -> None:
        """Put off the next attempt where the end was a failure, and see that it is told."""
        if self._connection is connection:
            self._connection = None
        if error is None:
            return
        has_lasted = perf_counter() - connection.since > LONGEST_PAUSE
        if has_lasted:
            self._back_off.reset()
        self._back_off.put_off()
        if not is_told:
            self._let_helper(self._fire, "disconnect", 0.0, 0, error)


class FaultyClient(TCPSocketClient):
    """The client of a user with a wrong setting: each attempt to connect fails and says which."""

    def __init__(self, request_event: event.EventHook, fault: OSError | ValueError) -> None:
        super().__init__("", 0, request_event)
        self._fault = fault

    def _open_socket(self) -> socket.socket:
        raise self._fault


# -------------------------------------------------------------------------------------- the users


class Schedule:
    """Open loop: tasks begin at fixed times, whether earlier ones have been answered or not.

    So a server that stands still is shown by every message that fell due meanwhile, not by one a
    user (Gil Tene, "How NOT to Measure Latency": coordinated omission).

    What falls due while there is no connection is left out: nothing piles up.

    :param rate: tasks a second
    :param client: whose connection is looked at
    """

    warned = False  # once is enough: all users of a process are late together

    def __init__(self, rate: float, client: TCPSocketClient) -> None:
        self._interval = 1 / rate
        self._client = client
        self._connected_since: float | None = None
        self._due = perf_counter() + random.uniform(0, self._interval)  # a phase of its own
        self._start_anew(perf_counter())

    def _start_anew(self, now: float) -> None:
        """Go on with the next task that falls due from now on."""
        missed = math.ceil((now - self._due) / self._interval)
        self._due += max(0, missed) * self._interval
        self._connected_since = self._client.connected_since
        self._began = now
        self._tasks = 0

    def first_pause(self) -> float:
        """Return the seconds until the first task is due, once the user is connected."""
        now = perf_counter()
        self._start_anew(now)
        return max(0.0, self._due - now)

    def next_pause(self) -> float:
        """Return the seconds until the next task is due; 0 where that is past."""
        now = perf_counter()
        self._due += self._interval
        self._tasks += 1
        since = self._client.connected_since
        if since is None or since != self._connected_since:
            self._start_anew(now)
        lateness = now - self._due
        if lateness > TOLERATED_LATENESS and not Schedule.warned:
            Schedule.warned = True
            logger.warning(
                "this machine cannot keep the schedule: a user begins %.4g tasks a second instead "
                "of %.4g; use --processes, more machines, or a lower --chat-rate, and no task that "
                "waits",
                self._tasks / (now - self._began),
                1 / self._interval,
            )
        return max(0.0, -lateness)


@functools.cache
def shared_wait(pause: Pause) -> Callable[[], float]:
    """Return what gives the seconds between two messages: one for all users."""
    return functools.partial(random.uniform, pause.shortest, pause.longest)


class TCPChatUser(User):
    """A user with a chat connection, ``self.client``.

    The attributes are defaults: an option that is given wins over them.
    """

    abstract = True

    framing: str | FramingFactory = "line"
    """``line``, ``crlf``, ``raw``, a ``struct`` format of a length prefix such as ``>I``, or a
    factory of objects like :class:`Framing`."""

    echo: EchoMode = "full"
    """What counts as the echo: ``full``, ``tag``, ``any`` or ``none``."""

    timeout: float = 5.0
    """Seconds for connecting, and for one exchange."""

    rate: float | None = None
    """Messages a second in open loop; None: the next message waits for the echo and a pause."""

    tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context
    """Makes the context that ``tls://`` connections share: authorities, own certificate, …"""

    wait_time = between(1, 3)
    """Seconds between two messages."""

    client: TCPSocketClient

    def __init__(self, environment: env.Environment) -> None:
        super().__init__(environment)
        self._schedule: Schedule | None = None
        try:
            self._apply(settings_of(type(self), environment))
        except (OSError, ValueError) as error:  # typed into the web UI: a failed connect says it
            self.client = FaultyClient(environment.events.request, error)

    def _apply(self, settings: Settings) -> None:
        """Make the client and the pauses that the settings say."""
        self.client = TCPSocketClient(
            settings.address.host,
            settings.address.port,
            self.environment.events.request,
            framing=settings.framing,
            echo=settings.echo,
            timeout=settings.timeout,
            tls=type(self).tls_context if settings.address.tls else None,
            sources=settings.sources,
            waits=settings.rate is None,
            compose=self.compose if self._overrides("compose") else usual_compose,
            expected=self.expected if self._overrides("expected") else None,
            is_refusal=self.is_refusal if self._overrides("is_refusal") else None,
            on_connect=self.on_connect if self._overrides("on_connect") else None,
            on_message=self.on_message if self._overrides("on_message") else None,
            report_error=self._report_error,
        )
        if settings.rate is not None:
            self._schedule = Schedule(settings.rate, self.client)
            self.wait_time = self._schedule.next_pause  # type: ignore[method-assign]
        elif settings.pause is not None:
            self.wait_time = shared_wait(settings.pause)  # type: ignore[method-assign]

    def _overrides(self, hook: str) -> bool:
        """Return whether a hook is more than the one of this class, which need not be called."""
        function = getattr(getattr(self, hook), "__func__", None)
        return function is not getattr(TCPChatUser, hook)

    def _report_error(self, error: Exception) -> None:
        """Report an exception as Locust reports that of a task."""
        self.environment.events.user_error.fire(
            user_instance=self, exception=error, tb=error.__traceback__
        )
        if self.environment.catch_exceptions:
            logger.error("%s", error, exc_info=error)

    def on_start(self) -> None:
        """Connect. A failure is a row, and the first message tries again."""
        self.client.connect()
        if self._schedule is not None:
            gevent.sleep(self._schedule.first_pause())

    def on_stop(self) -> None:
        """Close the connection; under ``--stop-timeout``, after the echoes in flight have come."""
        try:
            self.client.wait_for_echoes(self.environment.stop_timeout)
        finally:  # Locust may end the wait
            self.client.close()

    def on_connect(self) -> None:
        """Log in: called after every connect, before other messages are sent.

        :raises OSError: or ``ValueError`` where the server refuses: a failed row ``login``, and the
            connection is closed
        """

    def compose(self, tag: str, message: str) -> str | bytes:
        """Return what to send for a text: it has to contain the tag."""
        return usual_compose(tag, message)

    def expected(self, tag: str, message: str) -> str | bytes | None:
        """Return what a ``full`` echo has to contain, where the server wraps it anew.

        None means all that was sent.
        """
        return None

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether an echo says no: then the exchange fails with ``EchoRefused``."""
        return False

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Take a message that no exchange awaits: a broadcast, a banner, a server's ``PING``.

        Called in order, in a greenlet: it may send, wait and block. A ``gevent.Timeout`` that it
        starts, it has to close: the greenlet takes the messages of other users next.

        :param arrived: ``time.perf_counter()`` when its last byte was read
        """


SENTENCES = (
    "오늘 저녁에 시간 되시면 같이 식사해요 🍜",
    "The build is green again, thanks for the quick fix!",
    "회의는 세 시로 옮겼습니다, 확인 부탁드려요.",
    "사진 정말 잘 나왔네요 📷 어디에서 찍으셨어요?",
    "Ça marche très bien 👍 Schöne Grüße aus München!",
)
# With up to 22 bytes for the tag: at most 60, 100 to 400, 513 to 1,000 bytes as sent.
SHORT_TEXTS = (
    "안녕하세요! 👋",
    "Hello, everyone!",
    "점심 드셨어요? 🍜",
    "ㅋㅋㅋ 좋아요 😄",
    "Très bien, merci",
    "👍",
)
LONG_TEXTS = tuple(
    " ".join(SENTENCES[first:] + SENTENCES[:first]) for first in range(len(SENTENCES))
)
VERY_LONG_TEXTS = tuple(f"{text} {text}" for text in LONG_TEXTS)


class ChatClient(TCPChatUser):
    """Mostly short messages, some long, a few very long.

    A new scenario is one more ``@task`` method.
    """

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


# --------------------------------------------------------------------------------- Locust's hooks

usual_bucket = stats.bucket_response_time


def bucket_response_time(milliseconds: float) -> float:
    """Keep two digits below 10 ms, where Locust counts whole ms.

    This is Locust's hook for it ("Customizing response time bucketing" in its documentation).
    """
    if milliseconds >= 10:
        return usual_bucket(milliseconds)
    if milliseconds >= 1:
        steps = 10
    elif milliseconds >= 0.1:
        steps = 100
    else:
        steps = 1000
    return int(milliseconds * steps + 0.5) / steps  # several times as fast as round()


stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]

# The web UI's chart is of all requests together, and every second one is a ``send_chat``, which
# takes microseconds. So these are the median, the 90th and the 98th percentile of the echoes.
stats.PERCENTILES_TO_CHART = [0.75, 0.95, 0.99]


# gevent need not print Ctrl-C as an error of the greenlet that happened to run.
gevent.hub.Hub.NOT_ERROR = (*gevent.hub.Hub.NOT_ERROR, KeyboardInterrupt)


@events.init_command_line_parser.add_listener
def add_options(parser: argument_parser.LocustArgumentParser) -> None:
    """Add this file's options to Locust's."""
    for option in OPTIONS:
        option.add_to(parser)
    parser.add_argument(
        "--echo-server",
        action="store_true",
        include_in_web_ui=False,
        help="Serve a built-in echo chat server during the test, on --host "
        f"({DEFAULT_HOST}:{DEFAULT_PORT} if none)",
    )


@events.test_start.add_listener
def warn_anew(**_: object) -> None:
    """Let each run say once that the generator is too slow."""
    Schedule.warned = False


@events.init.add_listener
def prepare(environment: env.Environment, **_: object) -> None:
    """Start the echo server if asked for, and end Locust with one line where a setting is wrong."""
    options = environment.parsed_options
    if options is None:
        return
    if isinstance(environment.runner, runners.WorkerRunner):
        if os.getpid() != LOADING_PROCESS:
            gevent.spawn(leave_with_master, environment.runner)
        return  # its settings come from the master
    try:
        if options.echo_server:
            start_echo_server(environment, options.tcp_port)
        check_settings(environment, options)
    except (OSError, ValueError) as error:
        logging.disable()  # else Locust goes on to tell of workers
        sys.exit(f"locust: error: {error}")


LOADING_PROCESS = os.getpid()  # --processes forks the workers after this file was loaded


def leave_with_master(runner: runners.WorkerRunner) -> None:
    """End this worker, which --processes has forked, where its master ends before any run.

    Locust's own workers would wait a minute for a master that has found a wrong setting.
    """
    while runner.state == runners.STATE_INIT:
        if os.getppid() != LOADING_PROCESS:
            logging.disable()  # the master has said why
            sys.exit(1)
        gevent.sleep(0.1)


def check_settings(environment: env.Environment, options: argparse.Namespace) -> None:
    """Look for what can be seen to be wrong before there is a user.

    :raises OSError: or ``ValueError`` for it
    """
    given_options(environment)  # raises for a wrong one, also where the host is not known yet
    starts_at_once = options.headless or options.autostart  # else the web UI asks for the host
    for user_class in environment.user_classes:
        if not issubclass(user_class, TCPChatUser):
            continue
        if environment.host or user_class.host or starts_at_once:
            settings = settings_of(user_class, environment)
            if settings.address.tls:
                shared_tls_context(user_class.tls_context)
            if options.processes or not isinstance(environment.runner, runners.MasterRunner):
                check_sources(settings.sources)


def check_sources(sources: tuple[str, ...]) -> None:
    """Raise ``SettingError`` for an address that this machine does not have."""
    for source in sources:
        with socket.socket(family_of(source)) as probe:
            try:
                probe.bind((source, 0))
            except OSError:
                raise SettingError(source, "an address that this machine has") from None


# --------------------------------------------------------------------------- built-in echo server


def start_echo_server(
    environment: env.Environment, tcp_port: str | None
) -> gevent.server.StreamServer:
    """Return a server that listens on the host and sends every byte back, whatever the framing.

    :raises OSError: where the address is taken
    :raises SettingError: for a host that is none
    """
    if not environment.host:
        environment.host = f"{DEFAULT_HOST}:{tcp_port or DEFAULT_PORT}"
    address = parse_address(environment.host, tcp_port)
    if address.tls:
        raise SettingError(
            environment.host,
            f"tcp://{address.host}:{address.port}: the built-in echo server has no TLS",
        )
    server = gevent.server.StreamServer((address.host, address.port), echo_all, backlog=1024)
    server.start()
    return server


def echo_all(connection: socket.socket, _address: object) -> None:
    """Send back all that a connection receives, until its client is gone."""
    with contextlib.suppress(OSError):
        while data := connection.recv(READ_SIZE):
            connection.sendall(data)


# -------------------------------------------------------------------------------- standalone mode


class Printer:
    """Prints what comes of five messages, and counts."""

    def __init__(self, client: TCPSocketClient, *, awaits_echo: bool) -> None:
        self._client = client
        self._row = "echo_response" if awaits_echo else "send_chat"
        self._verb = "came back" if awaits_echo else "sent"
        self._times: list[float] = []
        self._line = ""

    def on_request(
        self,
        name: str,
        response_time: float,
        response_length: int,
        exception: Exception | None,
        **_: object,
    ) -> None:
        """Take a request event."""
        if exception is not None:
            print(f"{name} failed after {response_time:.1f} ms: {exception!r}")
        elif name == self._row:
            self._times.append(response_time)
            self._line = f"{response_length:5} bytes {response_time:9.3f} ms"

    def send(self, text: str) -> None:
        """Send a message and print a line for it."""
        self._line = ""
        echo = self._client.send_chat(text, wait=True)
        if echo is not None:
            # Escaped, as a terminal acts on some characters that a server can send.
            print(f"{self._line}  {echo[:40]!r}")
        elif self._line:
            print(self._line)

    def summarize(self, count: int) -> int:
        """Print the summary; return the exit code."""
        summary = f"{len(self._times)} of {count} messages {self._verb}"
        if self._times:
            summary += f", median {statistics.median_high(self._times):.3f} ms"
        print(summary)
        return 0 if len(self._times) == count else 1


def send_five(environment: env.Environment) -> int:
    """Send five of ``ChatClient``'s messages, one after the other.

    Return 0 if all came back (were sent, where no echo is awaited), else 1.
    """
    settings = settings_of(ChatClient, environment)
    client = ChatClient(environment).client
    printer = Printer(client, awaits_echo=settings.echo != "none")
    environment.events.request.add_listener(printer.on_request)
    texts = (*SHORT_TEXTS[:3], LONG_TEXTS[0], VERY_LONG_TEXTS[0])
    for text in texts:
        printer.send(text)
    client.close()
    return printer.summarize(len(texts))


def serve_until_interrupted(environment: env.Environment, tcp_port: str) -> None:
    """Serve the echo server until Ctrl-C."""
    server = start_echo_server(environment, tcp_port)
    address = f"{server.server_host}:{server.server_port}"
    print(f"echo server on {address}, Ctrl-C ends it", flush=True)
    server.serve_forever()


def main(arguments: list[str] | None = None) -> int:
    """Run without Locust's engine: five messages, or the echo server. Return the exit code."""
    parser = argument_parser.LocustArgumentParser(
        description="Send five messages to a TCP chat server, or be one."
    )
    parser.add_argument(
        "host",
        nargs="?",
        default=DEFAULT_HOST,
        help=f"host or host:port (default {DEFAULT_HOST})",
    )
    parser.add_argument("port", nargs="?", help=f"default TCP_PORT or {DEFAULT_PORT}")
    add_options(parser)
    options = parser.parse_args(arguments)
    options.tcp_port = options.port or options.tcp_port or str(DEFAULT_PORT)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know Korean
    environment = env.Environment(host=options.host, parsed_options=options, events=events)
    try:
        if not options.echo_server:
            return send_five(environment)
        serve_until_interrupted(environment, options.tcp_port)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
