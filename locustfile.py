"""Load-test a TCP chat server with Locust: connect, send chat messages, time their echoes.

    locust --headless --users 20 --spawn-rate 10 --run-time 10s --echo-server   no server needed
    locust --host=localhost:12345                                               web UI on port 8089
    python locustfile.py localhost 12345                                        five messages

Rows: connect; send_chat, until the kernel has the last byte; echo_response, the round trip; login,
the round trips of ``on_connect``; starttls, its handshake; as a failure only, disconnect. A run
ends with one line, its answer.

From top to bottom:

    ChatHooks, TCPChatUser, ChatClient   what you set, override or add a ``@task`` to
    TCPSocketClient                      send_chat, connecting, rows, on_message
    Connection, Exchange                 one socket, and one message with its reply
    TLSLayer, the framings, the errors   bytes to messages and back; what a request fails with
    opening a socket                     look-up, addresses, socket options
    Schedule, RunRecord                  open loop; the generator's own faults; the result line
    settings, options, Locust's events   --host, --chat-…, exit codes; the sample texts
    echo server, standalone mode         ``--echo-server``; ``python locustfile.py``
"""

from __future__ import annotations

# Locust comes first: it replaces the blocking calls of the standard library with gevent's.
from locust import User, argument_parser, between, env, event, events, runners, stats, task  # isort: skip

import argparse
import codecs
import contextlib
import contextvars
import errno
import functools
import inspect
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
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter, time
from typing import Literal, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

import gevent
import gevent.event
import gevent.hub
import gevent.lock
import gevent.monkey
import gevent.pool
import gevent.server
import gevent.socket
from locust import TaskSet
from locust.exception import StopUser
from locust.rpc import Message

logger = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"  # of the built-in echo server and of the standalone mode
DEFAULT_PORT = 12345
MESSAGE_LIMIT = 1024 * 1024  # bytes; no chat message is longer, more without an end is a flood
READ_SIZE = 16 * 1024  # bytes a read; a larger buffer costs more to allocate than it saves in calls


# ------------------------------------------------------------------------ users, and what they say


class ChatHooks:
    """The methods that a protocol overrides. A ``TCPChatUser`` has them, for its client to call."""

    tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context
    """Makes the context of TLS connections: authorities, own certificate, … A function makes one
    for all users, a method one for each user."""

    heartbeat: float | None = None
    """Seconds between two calls of ``on_heartbeat``; None: none."""

    def on_connect(self) -> None:
        """Log in: called after every connect, before the messages of tasks are sent.

        ``send_chat`` waits here, and its row is ``login``. With ``is_refusal``, a refusal is one
        failed row, at once; without, the login waits for its time-out::

            def on_connect(self):
                if self.client.send_chat(b"NICK kim", echo=lambda line: b" 001 " in line) is None:
                    raise PermissionError("not let in")

            def is_refusal(self, payload):
                return b" 433 " in payload

        :raises OSError: or ``ValueError`` where the user cannot go on: the connection is closed,
            with a failed row ``login``, unless a message of the login has failed already
        """

    def compose(self, tag: str, message: str) -> str | bytes:
        """Return what to send for a text: it has to contain the tag.

        Here at the start: a server that cuts long messages still returns it.
        """
        return f"[{tag}] {message}"

    def expected(self, tag: str, message: str) -> str | bytes | None:
        """Return what a ``full`` echo has to contain, where the server wraps it anew.

        None means all that was sent.
        """
        return None

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether a message is the server's "no": an exchange fails with ``EchoRefused``.

        Asked of each echo, and of each message that nobody awaits while an echo is awaited: then
        the oldest exchange fails, which with several in flight is a guess. Called on the event
        loop, so it must not block.
        """
        return False

    def on_echo(self, tag: str, payload: bytes, arrived: float) -> None:
        """Take a good echo, after its row.

        :param tag: of the message; empty where it was sent untagged
        :param arrived: as in ``on_message``
        """

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Take a message that no exchange awaits: a broadcast, a banner, a server's ``PING``.

        Called in order, in a greenlet: it may send, wait and block. During the login, too::

            def on_message(self, payload, arrived):
                if payload == b"PING":
                    self.client.send_chat(b"PONG", echo="none", name="pong")

        :param arrived: ``time.perf_counter()`` when the kernel had its last byte
        """

    def on_heartbeat(self) -> None:
        """Tell the server that the client is alive: called every ``heartbeat`` seconds."""

    def context(self) -> dict[str, object]:
        """Return what Locust's request events carry as their ``context``."""
        return {}

    def report_error(self, error: BaseException) -> None:
        """Log what a hook raised where no task of Locust's takes it."""
        logger.error("%s", error, exc_info=error)


class TCPChatUser(ChatHooks, User):
    """A user with a chat connection, ``self.client``, that ends with the user.

    The attributes are defaults: an option that is given wins over them. For another protocol, set
    and override what differs, in a file of its own. Import this file as a module there: Locust
    would run a ``ChatClient`` that is imported by its name, too::

        import locustfile

        class IrcUser(locustfile.ChatClient):
            framing = "crlf"
            echo = "tag"

            def compose(self, tag, message):
                return f"PRIVMSG #room :[{tag}] {message}"
    """

    abstract = True

    framing: str | FramingFactory = "line"
    """``line``, ``crlf``, ``nul``, ``raw``, a ``struct`` format of a length prefix such as ``>I``,
    or a factory of objects like :class:`Framing`."""

    echo: EchoMode = "full"
    """What counts as the echo: ``full``, ``tag``, ``any`` or ``none``."""

    encoding: str = "utf-8"
    """How text is encoded, both ways: any encoding that keeps ASCII as it is."""

    timeout: float = 5.0
    """Seconds for connecting, and for one exchange."""

    rate: float | None = None
    """Messages a second in open loop; None: the next message waits for the echo and a pause."""

    wait_time = between(1, 3)
    """Seconds between two messages."""

    client: TCPSocketClient

    def __init__(self, environment: env.Environment) -> None:
        super().__init__(environment)
        self._schedule: Schedule | None = None
        try:
            settings = settings_of(type(self), environment)
            self.client = client_of(self, settings)
        except (OSError, ValueError) as error:  # typed into the web UI: a failed connect says it
            self.client = MisconfiguredClient(environment.events.request, error)
            return
        if settings.rate is not None:
            self._schedule = Schedule(settings.rate, self.client)
            self.wait_time = self._schedule.next_pause  # type: ignore[method-assign]
        elif settings.pause is not None:
            self.wait_time = shared_wait(settings.pause)  # type: ignore[method-assign]

    def on_start(self) -> None:
        """Connect. A failure is a row, and the first message tries again."""
        self.client.connect()
        if self._schedule is not None:
            gevent.sleep(self._schedule.first_pause())

    def start(self, group: gevent.pool.Group) -> gevent.Greenlet:
        """Start the user as Locust does, and end its connection with it."""
        self._group = group
        # Locust finds the user as the first argument of its greenlet.
        self._greenlet = group.spawn(TCPChatUser._run_and_disconnect, self)
        return self._greenlet

    def _run_and_disconnect(self) -> None:
        """Run the user, and end its connection, whatever its class overrides, raises or leaves.

        Under ``--stop-timeout``, what is in flight may finish first.
        """
        try:
            self.run()
        finally:
            if self._schedule is not None:
                self._schedule.count_missed()
            try:
                self.client.wait_for_echoes(self.environment.stop_timeout)
            finally:  # a second kill ends the wait
                self.client.shut_down()

    def report_error(self, error: BaseException) -> None:
        """Report an exception of a hook as Locust reports that of a task."""
        if isinstance(error, StopUser):
            if self._greenlet is not None:
                self._greenlet.kill(block=False)
            return
        self.environment.events.user_error.fire(
            user_instance=self, exception=error, tb=error.__traceback__
        )
        if self.environment.catch_exceptions:
            logger.error("%s", error, exc_info=error)


class ChatClient(TCPChatUser):
    """Mostly short messages, some long, a few very long.

    A new scenario is one more ``@task`` method that calls ``self.client.send_chat(text)``. A login
    or another protocol is a class of its own: see :class:`TCPChatUser`.
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


# ------------------------------------------------------------------------------------- the client
# The way of a message:
#   send_chat            compose and tag it: an Exchange; Connection.send frames it; the user waits
#   Connection.flush     in the next iteration of the event loop: start the clock, send
#   Connection._read     when its echo has come: cut the bytes into messages, find the exchange
#   SendBatch            in the next iteration: wake the user
#   _report              fire the rows ``send_chat`` and ``echo_response``; send_chat returns


class TCPSocketClient:
    """A chat connection, which opens again when it is needed.

    A call blocks its caller alone. What the server does wrong is a request event, and never raised
    into the task::

        client = TCPSocketClient("localhost", 12345, environment.events.request)
        echo = client.send_chat("hello")

    :param host: name or address of the server
    :param port: its port
    :param request_event: what events are fired on: Locust's ``environment.events.request``
    :param framing: as in :class:`TCPChatUser`, and so ``echo``, ``timeout`` and ``encoding``
    :param tls: makes the context of connections that begin with TLS; None where they do not
    :param sources: local addresses to connect from, in turn
    :param waits: whether ``send_chat`` waits unless told otherwise; not in open loop
    :param hooks: what a protocol's author may override
    :raises ValueError: for a wrong framing, echo, timeout or encoding
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
        encoding: str = "utf-8",
        tls: Callable[[], ssl.SSLContext] | None = None,
        sources: tuple[str, ...] = (),
        waits: bool = True,
        hooks: ChatHooks | None = None,
    ) -> None:
        # No more than 29 attributes: Python shares the names of so many among all clients. With one
        # more, each user takes 1.3 KB more.
        self.host = host
        self.port = port
        self.timeout = parse_timeout(timeout)
        self.encoding = parse_encoding(encoding)
        self.identity = new_identity()
        self.trace: Trace | None = None  # gets the bytes that are sent and received
        self.first_send_at = 0.0  # ``perf_counter``, in open loop, since its schedule looked last
        self._url = f"{host}:{port}"
        self._request_event = request_event
        self._new_framing = parse_framing(framing)
        self._echo: Echo = parse_echo(echo)
        self._tls = None if tls is None else tls_context_from(tls)
        self._start_tls_context = self._tls  # of ``start_tls``, once it is made
        self._sources = sources
        self._waits = waits
        self._hooks = ChatHooks() if hooks is None else hooks
        self._overridden = overridden_hooks(self._hooks)
        self.has_refusals = "is_refusal" in self._overridden
        if self._hooks.heartbeat is not None:
            parse_heartbeat(self._hooks.heartbeat)
        self._message_numbers = itertools.count(1)
        self._back_off = BackOff()
        self._connection: Connection | None = None
        self._connecting = gevent.lock.BoundedSemaphore()  # held by who connects and logs in
        self._attempts = 0  # that came to an end
        self._is_cancelled = False  # ``close`` was called during the attempt
        self._is_shut_down = False
        self._connecting_greenlet: gevent.Greenlet | None = None
        # The greenlets in ``on_connect``, ``on_message`` and ``on_heartbeat``, each with the
        # connection that it is called for: its answers must not go out on a later one.
        self._bound: dict[gevent.Greenlet, Connection] = {}
        self._pending = 0  # exchanges and reports that ``wait_for_echoes`` waits for
        self.unawaited: MessageQueue | None = None  # for ``on_message``, if that is overridden
        if "on_message" in self._overridden:
            self.unawaited = MessageQueue(self._hooks, self._bound, self.timeout)

    @property
    def connected_since(self) -> float | None:
        """When the connection was opened (``time.perf_counter``); None where there is none."""
        return None if self._connection is None else self._connection.since

    @property
    def logged_in_since(self) -> float | None:
        """When ``on_connect`` of this connection had ended (``time.perf_counter``), or None."""
        return None if self._connection is None else self._connection.logged_in_since

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
        ``bytes`` go out as they are. The README has a table of what counts as the echo. ``any`` is
        the next message, be it a ``PING``: give a function where the server talks unasked, too::

            self.client.send_chat("hello")
            self.client.send_chat(b"JOIN #room", echo=lambda line: b" 366 " in line, name="join")

        :param echo: what counts as the echo of this message, instead of the client's mode; a
            function is called on the event loop, and must not block
        :param wait: False: hand the message over and go on; its rows come with its echo. None: wait
            in closed loop and in ``on_connect``
        :param name: of the row of the round trip, good or failed, instead of ``echo_response``; of
            ``send_chat`` where no echo is awaited. A row with a name of its own is a try, as the
            result line and verdicts count them
        :returns: the echo, ``bytes`` for a ``bytes`` message; None where the exchange failed, no
            echo is awaited, or it does not wait
        :raises ValueError: for a message that cannot be sent so, before anything is sent
        """
        if echo is None:
            echo = self._echo
        elif not callable(echo):
            echo = parse_echo(echo)
        connection = self._connection
        if connection is None or self._connecting_greenlet is not None or self._bound:
            connection = self._usable_connection()  # without a hook at work, it is that one
        if connection is None:
            return None
        exchange = self._new_exchange(message, echo)
        if self._connecting_greenlet is not None:
            exchange.is_login = self._connecting_greenlet is gevent.getcurrent()
        if name is not None or exchange.is_login:
            exchange.name_rows(name)
        if wait is None:
            wait = self._waits or exchange.is_login
        if not self._waits and not self.first_send_at and gevent.getcurrent() not in self._bound:
            self.first_send_at = perf_counter()  # by a task, for the schedule of the open loop
        if not wait:
            exchange.on_done = self._report_later
            connection.send(exchange)
            self._pending += 1
            return None
        reply = self._send_and_wait(connection, exchange)
        if reply is None or isinstance(message, bytes):
            return reply
        if reply is exchange.payload and isinstance(exchange.text, str):
            return exchange.text  # which saves the decoding
        return reply.decode(self.encoding, "replace")

    def _usable_connection(self) -> Connection | None:
        """Return the connection that the calling greenlet may use, or None where there is none."""
        if self._bound:
            bound = self._bound.get(gevent.getcurrent())
            if bound is not None and bound.is_open:
                return bound
            if bound is not None:
                gevent.sleep(0)  # who tries again and again lets others go on
                return None
        return self._connection if self.connect() else None

    def _new_exchange(self, message: str | bytes, echo: Echo) -> Exchange:
        """Return the exchange of a message, tagged if it is to be.

        :raises ValueError: where ``compose`` returns what cannot be sent, or found again
        """
        if isinstance(message, bytes):
            return Exchange(message, untagged_echo(echo))
        if message.startswith("/") or echo not in ("full", "tag", "none"):
            payload = message.encode(self.encoding, "replace")
            return Exchange(payload, untagged_echo(echo))
        tag = f"{self.identity}.{next(self._message_numbers)}"
        composed = self._hooks.compose(tag, message)
        exchange = Exchange(self._encoded(composed), echo, tag.encode())
        if self.encoding == "utf-8":
            exchange.text = composed
        if "compose" in self._overridden:
            check_composed(exchange.payload, exchange.tag)
        if "expected" in self._overridden:
            expected = self._hooks.expected(tag, message)
            if expected is not None:
                exchange.expected = self._encoded(expected)
        return exchange

    def _encoded(self, text: str | bytes) -> bytes:
        """Return what ``compose`` or ``expected`` returned as bytes.

        :raises ValueError: for what is neither text nor bytes
        """
        if isinstance(text, str):
            return text.encode(self.encoding, "replace")
        if isinstance(text, bytes):
            return text
        raise ValueError("compose and expected have to return text or bytes")

    def _send_and_wait(self, connection: Connection, exchange: Exchange) -> bytes | None:
        """Send a message, wait until its exchange has ended, report it and return the reply."""
        waiter = gevent.hub.Waiter()
        exchange.on_done = waiter.switch
        connection.send(exchange)
        self._pending += 1
        try:
            waiter.get()
        except BaseException as error:
            exchange.on_done = self._report_later
            if connection.withdraw(exchange):
                self._pending -= 1  # nothing of it was sent: there is nothing to report
            # Locust kills its users: under --stop-timeout their echoes still count. Anything else,
            # such as a gevent.Timeout of the task's own, gives the message up.
            exchange.is_abandoned = not isinstance(error, gevent.GreenletExit)
            raise
        try:
            return self._report(exchange)
        finally:
            self._pending -= 1

    # -- reports

    def _report(self, exchange: Exchange) -> bytes | None:
        """Fire the rows of an exchange that has ended; return the reply, or None."""
        started_at = exchange.started_at
        if exchange.sent_at:
            self._fire(
                exchange.sending_row, started_at, exchange.sent_at - started_at, exchange.size
            )
        if exchange.error is not None:
            if not exchange.is_abandoned:
                self._report_failure(exchange)
            return None
        if exchange.reply is None or exchange.is_abandoned:
            return None
        seconds = exchange.received_at - started_at
        self._fire(exchange.echo_row, started_at, seconds, len(exchange.reply))
        if not exchange.is_login:  # else an attempt after a refused login would come too soon
            self._back_off.reset()
        if "on_echo" in self._overridden:
            self._hooks.on_echo(exchange.tag.decode(), exchange.reply, exchange.received_at)
        return exchange.reply

    def _report_failure(self, exchange: Exchange) -> None:
        """Fire the failed row of an exchange: of its echo, or of the sending that failed."""
        started_at = exchange.started_at or exchange.received_at
        seconds = exchange.received_at - started_at
        if exchange.sent_at:
            size = len(exchange.reply or b"")
            self._fire(exchange.echo_row, started_at, seconds, size, exchange.error)
        else:
            self._fire(exchange.sending_row, started_at, seconds, exchange.size, exchange.error)

    def _report_later(self, exchange: Exchange) -> None:
        """Report an exchange for which no greenlet waits: not here, on the event loop."""
        GREENLET_POOL.spawn(functools.partial(self._report_guarded, self._report, exchange))

    def _report_guarded(self, report: Callable[..., object], *arguments: object) -> None:
        """Call ``_report`` or ``_fire``, and hand on what a listener or a hook raises."""
        try:
            report(*arguments)
        except (Exception, gevent.Timeout) as error:
            self._hooks.report_error(error)
        finally:
            self._pending -= 1

    def _fire(
        self,
        name: str,
        started_at: float,
        seconds: float,
        size: int,
        error: Exception | None = None,
    ) -> None:
        """Fire a request event. Never on the event loop: a listener may block."""
        self._request_event.fire(
            request_type="TCP",
            name=name,
            response_time=seconds * 1000,
            response_length=size,
            response=None,
            exception=error,
            context=self._hooks.context() if "context" in self._overridden else {},
            start_time=started_at + ARRIVALS.clock_offset,
            url=self._url,
        )

    # -- messages that nobody awaits

    def refusal_in(self, payload: bytes) -> ChatError | None:
        """Ask the hook; return what an exchange fails with, or None. The event loop calls it.

        What the hook raises is reported, and fails an echo that it was asked of: it is not judged.
        """
        try:
            is_refusal = timed_hook("is_refusal", self._hooks.is_refusal, payload)
        except HOOK_ERRORS as error:
            GREENLET_POOL.spawn(functools.partial(self._hooks.report_error, error))
            return EchoFunctionError()
        return EchoRefused() if is_refusal else None

    # -- the connection

    def connect(self) -> bool:
        """Connect and log in, unless that is done; return whether the connection is open.

        After failures this waits first. Greenlets that call it at the same time share an attempt.
        """
        bound = self._bound.get(gevent.getcurrent())
        if bound is not None:
            return bound.is_open
        if self._connecting_greenlet is gevent.getcurrent():  # a listener of the row ``connect``
            return self._connection is not None
        if self._is_shut_down:
            gevent.sleep(FIRST_DELAY)  # who tries again and again lets others go on
            return False
        attempts = self._attempts
        if not self._wait_for_attempt():
            return False
        try:
            if self._connection is None and self._attempts == attempts:
                self._attempt()
            return self._connection is not None
        finally:
            self._connecting.release()

    def _wait_for_attempt(self) -> bool:
        """Acquire the lock of connecting: after an attempt of another greenlet, if there is one.

        A login may wait for this very greenlet: so it is waited for at most the time-out.
        """
        seconds = self.timeout
        while not self._connecting.acquire(timeout=seconds):
            seconds = self.timeout
            connection = self._connection
            if connection is None:  # the attempt is still to connect
                continue
            seconds = connection.since + self.timeout - perf_counter()
            if seconds <= 0:
                error = TimeoutError("on_connect did not end within the time-out")
                self._fire("login", connection.since, self.timeout, 0, error)
                return False
        return True

    def _attempt(self) -> None:
        """Connect and log in."""
        self._connecting_greenlet = gevent.getcurrent()
        self._is_cancelled = self._is_shut_down
        try:
            self._back_off.wait()
            if not self._is_shut_down:
                self._open_and_log_in()
        except BaseException:  # without its login, the connection is of no use to others
            self._back_off.delay()
            self.close()
            raise
        finally:
            self._connecting_greenlet = None
            self._bound.pop(gevent.getcurrent(), None)

    def _open_and_log_in(self) -> None:
        """Open a connection and log in. A failure is a row."""
        started_at = perf_counter()
        RUN.attempts += 1
        try:
            sock, tls = self._open()
        except (OSError, ValueError) as error:
            if self._is_cancelled:  # nobody waits for it any more: it is no failure
                return
            self._attempts += 1
            self._back_off.delay()
            self._fire("connect", started_at, perf_counter() - started_at, 0, error)
            return
        if self._is_cancelled:
            sock.close()
            return
        connection = self._connection = Connection(sock, tls, self._new_framing(), self)
        self._bound[gevent.getcurrent()] = connection
        RUN.connected += 1
        self._fire("connect", started_at, connection.since - started_at, 0)
        self._log_in(connection)
        self._attempts += 1

    def _open(self) -> tuple[socket.socket, TLSLayer | None]:
        """Return a connected socket; raise ``OSError`` or ``ValueError`` where there is none."""
        source = next(rotation_of(self._sources)) if self._sources else None
        return open_socket(self.host, self.port, self.timeout, self._tls, source)

    def _log_in(self, connection: Connection) -> None:
        """Run the user's login. One that raises ends the connection."""
        try:
            if connection.is_open:  # a listener of the row ``connect`` may have blocked for long
                self._hooks.on_connect()
        except (OSError, ValueError) as error:
            connection.end(None)
            if not connection.has_failed_login:
                seconds = perf_counter() - connection.since
                self._fire("login", connection.since, seconds, 0, bounded_error(error))
            connection.is_end_reported = True
        if connection.is_open:
            connection.logged_in_since = perf_counter()
            if self._hooks.heartbeat is not None:
                seconds = parse_heartbeat(self._hooks.heartbeat)
                connection.heartbeat = gevent.spawn(self._send_heartbeats, connection, seconds)
        elif connection.end_error is None:
            self._back_off.delay()
        elif not connection.is_end_reported:
            self._fire("disconnect", perf_counter(), 0.0, 0, connection.end_error)

    def _send_heartbeats(self, connection: Connection, seconds: float) -> None:
        """Call ``on_heartbeat`` every so many seconds, while the connection is open."""
        self._bound[gevent.getcurrent()] = connection
        try:
            due = perf_counter()
            while connection.is_open:
                due = max(due + seconds, perf_counter())  # however long the hook has taken
                gevent.sleep(max(0.0, due - perf_counter()))
                try:
                    self._hooks.on_heartbeat()
                except (Exception, gevent.Timeout) as error:
                    self._hooks.report_error(error)
        finally:
            del self._bound[gevent.getcurrent()]

    def start_tls(self) -> bool:
        """Begin TLS on the open connection, after the server has agreed to it (``STARTTLS``).

        In ``on_connect``, or while nothing is in flight. The context is that of ``tls_context``::

            if self.client.send_chat(b"STARTTLS", echo="any") == b"OK" and self.client.start_tls():
                ...

        :returns: whether the handshake has succeeded; else the connection is closed, and the row
            ``starttls`` says why
        :raises ValueError: while messages are in flight, where TLS has begun already, and where,
            after the login, the message before was tagged
        """
        connection = self._bound.get(gevent.getcurrent(), self._connection)
        if connection is None or not connection.is_open:
            return False
        if self._start_tls_context is None:
            self._start_tls_context = tls_context_from(maker_of_tls_context(self._hooks))
        started_at = perf_counter()
        error: OSError | None = None
        try:
            connection.start_tls(TLSLayer(self._start_tls_context, self.host), self._new_framing())
        except OSError as failure:
            error = failure
        if error is None or connection.end_error is not None:  # not after a local close
            self._fire("starttls", started_at, perf_counter() - started_at, 0, error)
        return error is None

    def close(self) -> None:
        """Close the connection if there is one. The next message opens a new one."""
        self._is_cancelled = True
        if self._connection is not None:
            self._connection.close()

    def shut_down(self) -> None:
        """Close the connection for good, as its user has ended: no message opens another.

        A handler of ``on_message`` that still runs is stopped.
        """
        self._is_shut_down = True
        self.close()
        if self.unawaited is not None:
            self.unawaited.stop()

    def wait_for_echoes(self, seconds: float) -> None:
        """Wait until nothing is in flight and all is reported, at most so many seconds."""
        ends_at = perf_counter() + seconds
        while self._pending and perf_counter() < ends_at:
            gevent.sleep(0.01)  # once in the life of a user: nothing is gained by being woken

    def on_connection_end(self, connection: Connection) -> None:
        """Delay the next attempt after a failure; fire ``disconnect`` where no row says it yet."""
        if self._connection is connection:
            self._connection = None
        error = connection.end_error
        if error is None:
            if self.unawaited is not None:
                self.unawaited.clear()
            return
        if perf_counter() - connection.since > LONGEST_DELAY:
            self._back_off.reset()
        self._back_off.delay()
        # During the login, ``_log_in`` sees that a row says it.
        if not connection.is_end_reported and connection.logged_in_since is not None:
            self._pending += 1
            fire = functools.partial(self._fire, "disconnect", perf_counter(), 0.0, 0, error)
            GREENLET_POOL.spawn(functools.partial(self._report_guarded, fire))


class MisconfiguredClient(TCPSocketClient):
    """The client of a user with a wrong setting: each attempt to connect fails and says which."""

    def __init__(self, request_event: event.EventHook, fault: OSError | ValueError) -> None:
        super().__init__("", 0, request_event)
        self._fault = fault

    def _open(self) -> tuple[socket.socket, TLSLayer | None]:
        raise self._fault


def client_of(user: TCPChatUser, settings: Settings) -> TCPSocketClient:
    """Return the client that the settings of a user say.

    :raises OSError: or ``ValueError`` where its TLS context cannot be made
    """
    address = next_address(settings.addresses, user)
    client = TCPSocketClient(
        address.host,
        address.port,
        user.environment.events.request,
        framing=settings.framing,
        echo=settings.echo,
        timeout=settings.timeout,
        encoding=settings.encoding,
        tls=maker_of_tls_context(user) if address.tls else None,
        sources=settings.sources,
        waits=settings.rate is None,
        hooks=user,
    )
    if settings.trace and not RUN.is_traced:
        RUN.is_traced = True
        client.trace = log_trace
        logger.info("trace: all that one user sends and receives, logins and passwords included")
    return client


def overridden_hooks(hooks: ChatHooks) -> tuple[str, ...]:
    """Return the names of the hooks that are more than those of ``ChatHooks``.

    Those that every message would call are left out where they do nothing.
    """
    return tuple(
        name
        for name in ("compose", "context", "expected", "is_refusal", "on_echo", "on_message")
        if getattr(getattr(hooks, name), "__func__", None) is not getattr(ChatHooks, name)
    )


def untagged_echo(echo: Echo) -> Echo:
    """Return what counts as the echo of a message that has no tag."""
    return "any" if echo in ("full", "tag") else echo


def check_composed(payload: bytes, tag: bytes) -> None:
    """Raise ``ValueError`` where ``compose`` has left out the tag, or made another of it."""
    start = payload.find(tag)
    if start < 0:
        raise ValueError("compose left out the tag: what it returns has to contain it")
    end = start + len(tag)
    if payload[end : end + 1].isdigit():
        raise ValueError("compose put a digit right behind the tag: put a space between")


LOGIN_TEXTS_KEPT = 20  # Locust keeps a line for each: many would fill its memory and its tables
LOGIN_TEXT_LENGTH = 100  # characters


def bounded_error(error: OSError | ValueError) -> Exception:
    """Return an error of ``on_connect`` as a row may have it: its text may hold server bytes.

    At most its class and a bounded, escaped sentence; a bounded number of sentences in all.
    """
    if isinstance(error, ChatError):
        return error
    sentence = str(error)
    is_built_in = type(error).__module__ == "builtins"
    if is_built_in and isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno))
    if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)):
        sentence = error.reason
        is_built_in = False  # these take more than a text
    text = ascii(sentence[:LOGIN_TEXT_LENGTH])[1:-1]
    if not is_built_in:
        text = f"{type(error).__name__}: {text}"
    if text not in RUN.login_texts and len(RUN.login_texts) >= LOGIN_TEXTS_KEPT:
        text = type(error).__name__
    RUN.login_texts.add(text)
    if is_built_in:
        return type(error)(text)
    return OSError(text) if isinstance(error, OSError) else ValueError(text)


RANDOM_START = random.getrandbits(32)  # where the identities of this run begin
CLIENT_NUMBERS = itertools.count()


def new_identity() -> str:
    """Return eight hexadecimal digits that no other client of this run is likely to have.

    Locust forks workers after this file was loaded: they share RANDOM_START. Their process numbers
    are multiplied by 2^32 over the golden ratio, so that what they count from lies far apart.
    """
    number = RANDOM_START + os.getpid() * 0x9E3779B1 + next(CLIENT_NUMBERS)
    return f"{number % 2**32:08x}"


FIRST_DELAY = 0.1  # seconds, at most, between the first failed attempt to connect and the second
LONGEST_DELAY = 5.0  # seconds, at most, between two attempts after many have failed


class BackOff:
    """The delays between attempts to connect, so that users do not storm a recovering server.

    They double from 0.1 s to 5 s with full jitter: any delay up to the present one is as likely
    (AWS Architecture Blog, "Exponential Backoff And Jitter").
    """

    def __init__(self) -> None:
        self._failures = 0
        self._next_attempt_at = 0.0

    def wait(self) -> None:
        """Wait until the next attempt may be made."""
        gevent.sleep(max(0.0, self._next_attempt_at - perf_counter()))

    def delay(self) -> None:
        """Delay the next attempt, more after each failure."""
        doublings = min(self._failures, 10)  # more would make no difference, and overflow at last
        longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0**doublings)
        self._next_attempt_at = perf_counter() + random.uniform(0, longest)
        self._failures += 1

    def reset(self) -> None:
        """Begin with the shortest delay again."""
        self._failures = 0


class GreenletPool:
    """Greenlets for what may block, and so has no place on the event loop.

    One greenlet does job after job, as to make a greenlet takes 10 µs. When a job waits for
    something, another greenlet goes on with the jobs that are left. All jobs together have a tenth
    of a millisecond; then the event loop polls its sockets and timers before the next: what falls
    due meanwhile would be sent in one lump, and wait in the queue of the server.

    A job leaves nothing behind: it runs in an empty context (``contextvars``), and a greenlet whose
    job has waited, or to which something still refers (a forgotten ``gevent.Timeout``), is not used
    again.
    """

    SLICE = 0.0001  # seconds
    MOST_IDLE = 100  # greenlets kept

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], object]] = deque()
        self._idle: list[gevent.hub.Waiter] = []
        self._is_scheduled = False
        self._slice_ends_at = 0.0  # ``perf_counter``
        self._switches = 0  # to a greenlet and back; one that comes back in a job has waited
        self._timer: Watcher | None = None

    def spawn(self, job: Callable[[], object]) -> None:
        """Let a greenlet do a job soon."""
        self._jobs.append(job)
        if not self._is_scheduled:
            self._is_scheduled = True
            gevent.get_hub().loop.run_callback(self._run_slice)

    def is_slice_over(self) -> bool:
        """Return whether a job with more to do has to make way, and spawn the rest as a new job."""
        return perf_counter() > self._slice_ends_at

    def _run_slice(self) -> None:
        """Let greenlets do jobs until the slice is over. The event loop calls it."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._slice_ends_at = perf_counter() + self.SLICE
        while self._jobs and not self.is_slice_over():
            # Comes back here when no job is left, the slice is over, or the job waits.
            if self._idle:
                self._idle.pop().switch(None)
            else:
                gevent.Greenlet(self._work).switch()
            self._switches += 1
        self._is_scheduled = bool(self._jobs)
        if self._is_scheduled:  # by a timer: before a mere callback no socket is polled
            self._timer = gevent.get_hub().loop.timer(0)
            self._timer.start(self._run_slice)

    def _work(self) -> None:
        """Do jobs, slice after slice."""
        greenlet = gevent.getcurrent()
        waiter = gevent.hub.Waiter()
        while True:
            while self._jobs and not self.is_slice_over():
                job = self._jobs.popleft()
                switches = self._switches
                references = sys.getrefcount(greenlet)
                contextvars.Context().run(job)
                del job  # it holds a user, and this greenlet may be idle for long
                has_waited = self._switches != switches
                # A gevent.Timeout that is running refers to the greenlet that it will interrupt.
                if has_waited or sys.getrefcount(greenlet) != references:
                    return
            if len(self._idle) >= self.MOST_IDLE:
                return
            self._idle.append(waiter)
            waiter.get()


GREENLET_POOL = GreenletPool()

# What hooks and listeners can raise; the second and third are no ``Exception``.
HOOK_ERRORS = (Exception, gevent.Timeout, gevent.GreenletExit)

BACKLOG_MESSAGES = 10_000  # messages that may wait for ``on_message`` before reading pauses
BACKLOG_BYTES = 16 * 1024 * 1024  # bytes that may wait for it
# Of these limits. After a resume, one read of empty lines (READ_SIZE) stays below twice the limit.
PAUSE_ABOVE, RESUME_BELOW, GIVE_UP_ABOVE = 1.0, 0.25, 2.0


class MessageQueue:
    """The messages of a client that no exchange awaits, on their way to ``on_message``.

    They are handled in order, by one greenlet at a time. Too many pause the reading: TCP then holds
    up the server. A connection whose handler takes none within the time-out ends.
    """

    def __init__(
        self, hooks: ChatHooks, bound: dict[gevent.Greenlet, Connection], timeout: float
    ) -> None:
        self._hooks = hooks
        self._bound = bound  # so that the handler sends over the connection of its message
        self._timeout = timeout
        self._messages: deque[tuple[Connection, bytes, float]] = deque()
        self._bytes = 0
        self._taken = 0  # by the handler, of all
        self._is_scheduled = False
        self._handler: gevent.Greenlet | None = None  # which runs ``on_message`` now
        self._paused: Connection | None = None

    def put(self, connection: Connection, payload: bytes, received_at: float) -> None:
        """Queue a message. The event loop calls it.

        :raises HandlerTooSlow: where memory would pass twice the limit
        """
        self._messages.append((connection, payload, received_at))
        self._bytes += len(payload)
        if not self._is_scheduled:
            self._is_scheduled = True
            GREENLET_POOL.spawn(self._handle_all)
        if self._is_over(PAUSE_ABOVE) and self._paused is not connection:
            self._paused = connection
            connection.pause_reading()
            self._watch_handler(connection)
        if self._is_over(GIVE_UP_ABOVE):
            self.clear()
            raise HandlerTooSlow

    def _is_over(self, factor: float) -> bool:
        """Return whether more waits than so many times the limits."""
        too_many = len(self._messages) > BACKLOG_MESSAGES * factor
        return too_many or self._bytes > BACKLOG_BYTES * factor

    def _watch_handler(self, connection: Connection) -> None:
        """Look after the time-out whether the handler has taken any message since."""
        taken = self._taken

        def look() -> None:
            timer.close()
            if self._paused is not connection or not connection.is_open:
                return
            if self._taken != taken:
                self._watch_handler(connection)
                return
            self.clear()
            connection.end(HandlerTooSlow())

        timer: Watcher = gevent.get_hub().loop.timer(self._timeout)
        timer.start(look)

    def _handle_all(self) -> None:
        """Give the messages to ``on_message``, as a job of the greenlet pool."""
        greenlet = self._handler = gevent.getcurrent()
        try:
            while self._messages:
                self._handle_next(greenlet)
                if GREENLET_POOL.is_slice_over():
                    break
        finally:  # after a kill, another greenlet goes on
            self._handler = None
            self._bound.pop(greenlet, None)
            self._is_scheduled = bool(self._messages)
            if self._is_scheduled:
                GREENLET_POOL.spawn(self._handle_all)

    def _handle_next(self, greenlet: gevent.Greenlet) -> None:
        """Give one message to ``on_message``, and read on where few are left."""
        connection, payload, received_at = self._messages.popleft()
        self._bytes -= len(payload)
        self._taken += 1
        if self._paused is not None and not self._is_over(RESUME_BELOW):
            self._paused.resume_reading()
            self._paused = None
        self._bound[greenlet] = connection
        try:
            self._hooks.on_message(payload, received_at)
        except (Exception, gevent.Timeout) as error:
            self._hooks.report_error(error)

    def clear(self) -> None:
        """Drop what waits."""
        self._messages.clear()
        self._bytes = 0

    def stop(self) -> None:
        """Drop what waits, and end the handler that runs, unless that is the caller."""
        self.clear()
        if self._handler is not None and self._handler is not gevent.getcurrent():
            # It waits for something, so its greenlet does no other job after this one.
            self._handler.kill(block=False)


# --------------------------------------------------------------------------------- the connection

READABLE, WRITABLE = 1, 2  # what libev, the event loop, watches a socket for
DISCARDED_AT_CLOSE = 64  # reads, 1 MiB in all; a server may send without an end


class Watcher(Protocol):
    """What gevent's event loop calls back when a socket is ready, or a time has come."""

    def start(self, callback: Callable[..., object], *arguments: object) -> None:
        """Watch from now on."""

    def stop(self) -> None:
        """Pause."""

    def close(self) -> None:
        """Watch no more."""


class Connection:
    """A connected socket and the exchanges in flight on it. A reconnect makes another.

    What has arrived is read before an untagged message is sent, as its reply is known only by when
    it comes, and before a deadline or an error of sending fails anything.

    The event loop calls ``flush``, ``_read``, ``_on_writable`` and ``_on_deadline``: they
    may neither block nor raise, as that would stop all users.
    """

    __slots__ = (
        "_client",
        "_deadline",
        "_framing",
        "_has_built_in_framing",
        "_is_flush_scheduled",
        "_is_paused",
        "_is_reply_last",
        "_is_shaking_hands",
        "_knows_what_followed",
        "_loop",
        "_outgoing",
        "_overdue",
        "_reader",
        "_socket",
        "_tagged",
        "_tls",
        "_untagged",
        "_writer",
        "end_error",
        "has_failed_login",
        "heartbeat",
        "is_end_reported",
        "is_open",
        "logged_in_since",
        "since",
    )

    def __init__(
        self, sock: socket.socket, tls: TLSLayer | None, framing: Framing, client: TCPSocketClient
    ) -> None:
        self.since = perf_counter()
        self.logged_in_since: float | None = None
        self.is_open = True
        self.end_error: Exception | None = None  # None after a local close, too
        self.is_end_reported = False  # a row says that the connection has ended
        self.has_failed_login = False  # an exchange of ``on_connect`` has failed
        self.heartbeat: gevent.Greenlet | None = None
        self._socket = sock
        self._tls = tls
        self._framing = framing
        self._has_built_in_framing = type(framing) in BUILT_IN_FRAMINGS
        self._client = client
        # In each of these the oldest exchange comes first. One may be outgoing and awaited.
        self._outgoing: list[Exchange] = []  # not sent yet, or not wholly
        self._tagged: dict[bytes, Exchange] = {}  # started, reply awaited, by tag
        self._untagged: list[Exchange] = []  # started, reply awaited
        # Of the present read: exchanges with replies that are late, and where their tags are.
        self._overdue: tuple[tuple[Exchange, bytes, int], ...] = ()
        self._is_flush_scheduled = False
        self._is_paused = False
        self._is_reply_last = True  # nothing has come after the last reply
        self._knows_what_followed = True  # that, as the last byte of the read was fed alone
        self._is_shaking_hands = False
        self._loop = loop = gevent.get_hub().loop
        self._deadline: Watcher | None = None  # a timer, there is one while anything is in flight
        self._writer: Watcher | None = None  # there is one while the kernel is full
        self._reader: Watcher = loop.io(sock.fileno(), READABLE)
        self._reader.start(self._read)
        if tls is not None:
            loop.run_callback(self._read_behind_handshake)

    @property
    def awaited_count(self) -> int:
        """The number of exchanges whose reply is awaited."""
        return len(self._tagged) + len(self._untagged)

    # -- sending

    def send(self, exchange: Exchange) -> None:
        """Frame a message, and let the event loop send it in its next iteration.

        :raises ValueError: where the framing cannot carry it, or would send nothing
        :raises TypeError: where a framing of the user's own does not return bytes
        """
        exchange.unsent = bytes(self._framing.encode(exchange.payload))  # str is an error here
        exchange.size = len(exchange.unsent)
        if exchange.size == 0:
            raise ValueError("an empty message sends nothing in this framing: write a byte")
        if not self.is_open:
            self._fail(exchange, self.end_error)
            return
        self._outgoing.append(exchange)
        if not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            SEND_BATCH.add(self)

    def withdraw(self, exchange: Exchange) -> bool:
        """Take a message back, if nothing of it was sent; return whether that is so."""
        if exchange.started_at or exchange not in self._outgoing:
            return False
        self._outgoing.remove(exchange)
        return True

    def flush(self) -> None:
        """Send what the kernel takes; have the rest sent when it takes more."""
        self._is_flush_scheduled = False
        if self._is_shaking_hands:
            return
        for exchange in self._outgoing:  # it is empty where ``_start`` has ended the connection
            if not exchange.started_at:
                self._start(exchange)
        while self._outgoing and self._send(self._outgoing[0]):
            del self._outgoing[0]
        if self._outgoing or self._writer is not None:
            self._watch_writable()

    def _watch_writable(self) -> None:
        """Watch for room in the kernel, while it has not taken all of a message."""
        if self._outgoing and self._writer is None:
            self._writer = self._loop.io(self._socket.fileno(), WRITABLE)
            self._writer.start(self._on_writable)
        elif self._writer is not None and not self._outgoing:
            self._writer.close()
            self._writer = None

    def _on_writable(self) -> None:
        if self._untagged:
            self._read_arrived()  # what came before they were sent is not their reply
        self.flush()

    def _start(self, exchange: Exchange) -> None:
        """Start the clock of an exchange whose turn to be sent has come."""
        if not exchange.tag and exchange.echo != "none":
            self._read_arrived()  # what came before is not the reply
            if not self.is_open:
                return
        if self._client.trace is not None:
            self._client.trace("sent", exchange.unsent)
        if self._tls is not None:
            try:
                exchange.unsent = self._tls.encrypt(exchange.unsent)
            except OSError as error:
                self.end(error)
                return
        exchange.started_at = perf_counter()
        if exchange.echo != "none":
            if exchange.tag:
                self._tagged[exchange.tag] = exchange
            else:
                self._untagged.append(exchange)
        if self._deadline is None:
            self._watch_deadline(self._client.timeout)

    def _send(self, exchange: Exchange) -> bool:
        """Send what the kernel takes now; return whether that was the rest of the message."""
        try:
            taken = self._socket.send(exchange.unsent)
        except BlockingIOError:
            return False
        except OSError as error:
            self.end_error = error
            self._read_arrived()  # a reply may have come before the connection broke
            self.end(error)
            return False
        exchange.is_partly_sent = True
        if taken < len(exchange.unsent):
            exchange.unsent = exchange.unsent[taken:]
            return False
        exchange.unsent = b""
        exchange.sent_at = perf_counter()
        if exchange.echo == "none" or exchange.reply is not None:
            self._finish(exchange)
        return True

    # -- receiving

    def _read_arrived(self) -> None:
        """Read all that has arrived, as what comes next depends on it. It may end the connection.

        Not for ever where a server sends without an end: at most what the kernel can hold.
        """
        most = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        while most > 0 and self.is_open:
            count = self._read()
            if count == 0:
                return
            most -= count

    def _read(self) -> int:
        """Read once and deliver the messages that are complete; return how many bytes came.

        An error ends the connection.
        """
        try:
            data, received_at = ARRIVALS.receive(self._socket)
            if not data:
                raise ConnectionClosed
            if self._client.trace is not None and self._tls is None:
                self._client.trace("received", data)
            if self._tls is not None:
                self._feed_decrypted(self._tls, data, received_at)
            elif self._untagged or self.logged_in_since is None:
                self._feed_to_the_last_byte(data, received_at)
            else:
                self._feed(data, received_at)
        except BlockingIOError:
            return 0
        except (ChatError, OSError) as error:
            self.end(error)
            return 0
        return len(data)

    def _feed_decrypted(self, tls: TLSLayer, data: bytes, received_at: float) -> None:
        """Deliver the messages that are complete when this is decrypted."""
        for plaintext in tls.decrypt(data):
            if self._client.trace is not None:
                self._client.trace("received", plaintext)
            self._feed(plaintext, received_at)
        if tls.is_ended:
            raise ConnectionClosed

    def _read_behind_handshake(self) -> None:
        """Deliver what came together with the end of the handshake: the socket is empty of it."""
        if self.is_open and self._tls is not None:
            try:
                self._feed_decrypted(self._tls, b"", perf_counter())
            except (ChatError, OSError) as error:
                self.end(error)

    def _feed_to_the_last_byte(self, data: bytes, received_at: float) -> None:
        """Feed the last byte alone: so ``start_tls`` knows whether any came after a reply."""
        if len(data) > 1 and not isinstance(self._framing, RawFraming):
            self._feed(data[:-1], received_at)
            data = data[-1:]
        self._feed(data, received_at)

    def _feed(self, data: bytes, received_at: float) -> None:
        """Let the framing cut bytes into messages, and deliver these.

        :raises ChatError: where the connection has to end
        """
        self._is_reply_last = False
        error: BaseException | None = None
        payloads: Iterable[bytes]
        if self._has_built_in_framing:
            payloads = self._framing.feed(data)
        else:
            payloads, error = timed_hook("feed", feed_until_error, self._framing, data)
        payload = b""
        for payload in payloads:
            self._deliver(payload, received_at)
        if self._overdue:
            self._judge_overdue(payload, received_at)
        if error is None:
            return
        if isinstance(error, ChatError):
            raise error
        log_place_of(error)
        raise FramingError from error

    def _deliver(self, payload: bytes, received_at: float) -> None:
        """Take a message to the exchange that awaits it, or else to ``on_message``.

        A message that carries several of this client's tags (framing ``raw``) answers each.
        """
        if len(self._tagged) == 1:  # the common case: the one echo awaited, as it was sent
            (exchange,) = self._tagged.values()
            is_whole = payload == exchange.payload and exchange.expected is exchange.payload
            if is_whole and received_at - exchange.started_at <= self._client.timeout:
                self._tagged.clear()
                # Its own payload, so that ``send_chat`` need not decode what is equal.
                self._take_reply(exchange, exchange.payload, received_at)
                return
        has_own_tag = is_taken = False
        identity = self._client.identity.encode()
        position = payload.find(identity)
        while position >= 0:
            tag = TAG.match(payload, position)
            if tag is not None:
                has_own_tag = True
                owner = self._tagged.get(tag[0])
                if owner is not None and self._is_too_late(owner, received_at):
                    self._overdue = (*self._overdue, (owner, payload, position))
                    is_taken = True
                elif owner is not None:
                    del self._tagged[tag[0]]
                    self._take_reply(owner, payload, received_at, position)
                    is_taken = True
            position = payload.find(identity, position + len(identity))
        if not is_taken:
            self._deliver_untagged(payload, received_at, has_own_tag)

    def _deliver_untagged(self, payload: bytes, received_at: float, has_own_tag: bool) -> None:
        """Take a message without the tag of an exchange in flight to where it belongs."""
        for exchange in self._untagged:
            if exchange.is_partly_sent and exchange.accepts(payload, has_own_tag):
                if not self.is_open:  # the function has closed it
                    return
                if self._is_too_late(exchange, received_at):
                    self._time_out(exchange)  # which ends the connection
                    break
                self._untagged.remove(exchange)
                self._take_reply(exchange, payload, received_at)
                return
        if self._client.has_refusals and self.awaited_count:
            refusal = self._client.refusal_in(payload)
            if isinstance(refusal, EchoRefused) and self.is_open:
                self._refuse_oldest(refusal, payload, received_at)
                return
        if self._client.unawaited is not None:
            self._client.unawaited.put(self, payload, received_at)

    def _refuse_oldest(self, refusal: EchoRefused, payload: bytes, received_at: float) -> None:
        """Fail the oldest exchange that awaits an echo: most likely it is the one refused."""
        firsts = (*itertools.islice(self._tagged.values(), 1), *self._untagged[:1])
        oldest = min(firsts, key=lambda exchange: exchange.started_at)
        self._stop_awaiting(oldest)
        oldest.judge(payload, received_at)
        oldest.error = refusal
        if not oldest.unsent:
            self._finish(oldest)

    def _is_too_late(self, exchange: Exchange, received_at: float) -> bool:
        """Return whether a reply came after the deadline; the event loop was busy then."""
        return received_at - exchange.started_at > self._client.timeout

    def _judge_overdue(self, last: bytes, received_at: float) -> None:
        """Fail the exchanges whose replies came too late, as is known once a read was delivered.

        All of a read has the time of its last byte. A reply before that, which came while this
        process stood still, may have come in time: then it is good, and its time too long.

        :param last: the last message of the read
        """
        overdue, self._overdue = self._overdue, ()
        for exchange, payload, position in overdue:
            may_be_earlier = payload is not last
            came_at = RUN.earliest_arrival(received_at) if may_be_earlier else received_at
            is_awaited = self._tagged.get(exchange.tag) is exchange  # it may have ended meanwhile
            if is_awaited and not self._is_too_late(exchange, came_at):
                del self._tagged[exchange.tag]
                self._take_reply(exchange, payload, received_at, position)
                continue
            if is_awaited:
                self._time_out(exchange)
            self._deliver_untagged(payload, received_at, has_own_tag=True)

    def _take_reply(
        self, exchange: Exchange, payload: bytes, received_at: float, tag_at: int = 0
    ) -> None:
        """Give an exchange its reply, judge that, and finish it once all of the message is sent."""
        is_sent = not exchange.unsent
        exchange.judge(payload, received_at, tag_at)
        if self._client.has_refusals:
            exchange.error = self._client.refusal_in(payload) or exchange.error
        self._is_reply_last = True
        self._knows_what_followed = not exchange.tag or self.logged_in_since is None
        if is_sent:
            self._finish(exchange)

    def pause_reading(self) -> None:
        """Read no more, but for what a deadline depends on, until ``resume_reading`` is called."""
        self._is_paused = True
        self._reader.stop()

    def resume_reading(self) -> None:
        """Read again, after ``pause_reading``."""
        self._is_paused = False
        if self.is_open and not self._is_shaking_hands:
            self._reader.start(self._read)

    # -- TLS

    def start_tls(self, tls: TLSLayer, framing: Framing) -> None:
        """Shake hands, and put TLS between the socket and a new framing.

        Whatever came after the reply that allowed it came without TLS, maybe from an attacker
        (CVE-2011-0411): then the connection ends.

        :raises ValueError: as ``TCPSocketClient.start_tls``
        :raises OSError: where the handshake fails; the connection has ended then
        """
        if self._tls is not None or self._outgoing or self.awaited_count:
            raise ValueError("TLS begins once, and while no message is in flight")
        if not self._knows_what_followed:
            raise ValueError("after the login, ask for TLS without a tag: by bytes, or a command")
        self._is_shaking_hands = True
        self.is_end_reported = True  # by the row ``starttls``
        self._reader.stop()
        try:
            if not self._is_reply_last or self._read() > 0:
                raise PlaintextAfterStartTLS
            tls.handshake(self._socket, perf_counter() + self._client.timeout)
            if not self.is_open:
                raise ConnectionClosed
        except BaseException as error:  # a kill, too
            self.has_failed_login = True
            self.end(error if isinstance(error, (ChatError, OSError)) else None)
            self._socket.close()
            raise
        self._is_shaking_hands = False
        self.is_end_reported = False
        self._tls = tls
        self._framing = framing
        self._has_built_in_framing = type(framing) in BUILT_IN_FRAMINGS
        if not self._is_paused:
            self._reader.start(self._read)
        self._read_behind_handshake()
        self.flush()  # messages of other greenlets have waited

    # -- how exchanges end: they fail with an error, or finish; and the connection: it is closed
    # locally, or ended by an error. One row tells of that: of an exchange, or else ``disconnect``.

    def _finish(self, exchange: Exchange) -> None:
        """Let whoever waits for an exchange go on, or have it reported."""
        if exchange.error is not None:
            RUN.awaited += exchange.echo != "none"
        elif exchange.reply is not None:
            RUN.awaited += 1
            RUN.echoed += 1
        elif exchange.echo == "none" and exchange.sent_at:
            RUN.sent += 1
        if exchange.is_login and exchange.error is not None:
            self.has_failed_login = True
        SEND_BATCH.finish(exchange)

    def _fail(self, exchange: Exchange, error: Exception | None) -> None:
        """End an exchange with an error, or with none where the connection was closed locally."""
        exchange.reply = None
        exchange.error = error
        exchange.received_at = perf_counter()
        exchange.unsent = b""
        self._finish(exchange)

    def _stop_awaiting(self, exchange: Exchange) -> None:
        """Forget an exchange that was awaited."""
        if exchange.tag:
            del self._tagged[exchange.tag]
        else:
            self._untagged.remove(exchange)

    def _watch_deadline(self, seconds: float) -> None:
        """Look again when the oldest may be overdue: all have the same time-out."""
        self._deadline = self._loop.timer(seconds)
        self._deadline.start(self._on_deadline)

    def _on_deadline(self) -> None:
        """Fail what is overdue, after a look at what has come while the event loop was busy."""
        if self._deadline is not None:
            self._deadline.close()
            self._deadline = None
        if not self._is_shaking_hands:
            self._read_arrived()
            self.flush()  # the kernel may have room again
        latest = perf_counter() - self._client.timeout
        while (oldest := self._oldest_started()) is not None:
            if oldest.started_at > latest:
                if self._deadline is not None:  # of an exchange that ``flush`` has started
                    self._deadline.close()
                self._watch_deadline(oldest.started_at - latest)
                return
            self._time_out(oldest)

    def _oldest_started(self) -> Exchange | None:
        """Return the exchange that started first, or None where nothing is in flight."""
        firsts = [*self._outgoing[:1], *self._untagged[:1]]
        firsts += itertools.islice(self._tagged.values(), 1)
        started = [exchange for exchange in firsts if exchange.started_at]
        return min(started, key=lambda exchange: exchange.started_at, default=None)

    def _time_out(self, exchange: Exchange) -> None:
        """Fail an exchange, and end the connection where it is of no more use."""
        if exchange.unsent:
            self.end(TimeoutError("the server did not take the message within the time-out"))
            return
        self._stop_awaiting(exchange)
        self._fail(exchange, EchoTimeout())
        if not exchange.tag:  # a late reply could not be told from that to the next message
            self.is_end_reported = not exchange.is_abandoned
            self.end(ConnectionClosed())

    def close(self) -> None:
        """Send what was handed over, and close."""
        self.flush()
        self.end(None)

    def end(self, error: Exception | None) -> None:
        """Close, and fail what is in flight with the error, or with none for a local close."""
        if not self.is_open:
            return
        self.is_open = False
        self.end_error = error = self.end_error or error  # that of sending comes first
        self._reader.close()
        for watcher in (self._writer, self._deadline):
            if watcher is not None:
                watcher.close()
        self._writer = self._deadline = None
        if self.heartbeat is not None and self.heartbeat is not gevent.getcurrent():
            self.heartbeat.kill(block=False)
        self._close_socket()
        if self.end_error is None:
            RUN.in_flight += self.awaited_count
        unfinished = (*self._tagged.values(), *self._untagged, *self._outgoing)
        for exchange in dict.fromkeys(unfinished):  # one may be both outgoing and awaited
            self._fail(exchange, error)
            self.is_end_reported = self.is_end_reported or not exchange.is_abandoned
        self._outgoing.clear()
        self._tagged.clear()
        self._untagged.clear()
        self._client.on_connection_end(self)

    def _close_socket(self) -> None:
        """Close the socket, in an orderly way where the server has not."""
        if self._is_shaking_hands:  # lets the greenlet go on that waits for it, and closes it
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            return
        is_in_a_message = bool(self._outgoing) and self._outgoing[0].is_partly_sent
        if self._tls is not None and not is_in_a_message:
            with contextlib.suppress(OSError):  # without it the end looks cut (RFC 8446, 6.1)
                self._socket.send(self._tls.close())
        if self.end_error is None:
            with contextlib.suppress(OSError):  # to close with unread bytes is a reset
                for _ in range(DISCARDED_AT_CLOSE):
                    if not self._socket.recv(READ_SIZE):
                        break
        self._socket.close()


class SendBatch:
    """What the event loop does in its next iteration: all sends back to back, then wake users.

    A server that is woken for each message costs more than one that is at work already. So users
    that go on send in the next iteration, all together: but no more than MOST_WOKEN, as thousands
    of messages at once would wait in the queue of the server, and that wait would be in their
    round trips. docs/design.md has the measurements.
    """

    MOST_WOKEN = 100  # users

    def __init__(self) -> None:
        self._to_flush: deque[Connection] = deque()
        self._finished: deque[Exchange] = deque()
        self._is_scheduled = False

    def add(self, connection: Connection) -> None:
        """Let a connection send."""
        self._to_flush.append(connection)
        if not self._is_scheduled:
            self._schedule()

    def finish(self, exchange: Exchange) -> None:
        """Let whoever waits for the end of this exchange go on."""
        self._finished.append(exchange)
        if not self._is_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._is_scheduled = True
        gevent.get_hub().loop.run_callback(self._run)

    def _run(self) -> None:
        """Send, and wake. What this leads to comes in the next iteration."""
        try:
            for _ in range(len(self._to_flush)):
                self._to_flush.popleft().flush()
            for _ in range(min(len(self._finished), self.MOST_WOKEN)):
                exchange = self._finished.popleft()
                # Mostly a switch to the user, who comes back here with its next wait.
                exchange.on_done(exchange)
        finally:
            self._is_scheduled = False
            if self._to_flush or self._finished:
                self._schedule()


SEND_BATCH = SendBatch()

# ----------------------------------------------------------------------------------- the exchange

# A tag is the identity of its client and the number of the message: 3f9a1c20.17
TAG = re.compile(rb"[0-9a-f]{8}\.\d{1,9}(?!\d)")


class Exchange:
    """One message: what it awaits, when things happened, and how it ended. It does no I/O."""

    __slots__ = (
        "echo",
        "echo_row",
        "error",
        "expected",
        "is_abandoned",
        "is_login",
        "is_partly_sent",
        "on_done",
        "payload",
        "received_at",
        "reply",
        "sending_row",
        "sent_at",
        "size",
        "started_at",
        "tag",
        "text",
        "unsent",
    )

    def __init__(self, payload: bytes, echo: Echo, tag: bytes = b"") -> None:
        self.payload = payload
        self.echo = echo
        self.tag = tag  # empty: sent untagged
        self.text: str | bytes | None = None  # what the payload was made of, if that is UTF-8
        self.expected = payload  # what a ``full`` echo has to contain
        self.sending_row = "send_chat"
        self.echo_row = "echo_response"
        self.is_login = False  # sent by ``on_connect``
        self.unsent = b""  # framed, from its start on encrypted: what the kernel has not taken yet
        self.size = 0  # bytes, framed
        self.is_partly_sent = False  # the kernel has taken a part of it, or all
        self.started_at = 0.0  # ``perf_counter``, just before the first send
        self.sent_at = 0.0  # the kernel has taken the last byte
        self.received_at = 0.0  # the last byte of the reply arrived, or the exchange failed
        self.reply: bytes | None = None
        self.error: Exception | None = None  # neither reply nor error: closed locally
        self.is_abandoned = False  # its task gave it up: no echo row
        self.on_done: Callable[[Exchange], object]

    def name_rows(self, name: str | None) -> None:
        """Give the row that ends it a name of its own, or that of the login."""
        if self.is_login:
            self.echo_row = "login"
        if name is not None and self.echo == "none":
            self.sending_row = name
        elif name is not None:
            self.echo_row = name

    def accepts(self, payload: bytes, has_own_tag: bool) -> bool:
        """Return whether a payload is the reply to this untagged message.

        :raises EchoFunctionError: where the user's function raises anything
        """
        if not callable(self.echo):  # any: not the late echo of a message that was given up
            return not has_own_tag
        try:
            return bool(timed_hook("echo function", self.echo, payload))
        except HOOK_ERRORS as error:
            log_place_of(error)
            raise EchoFunctionError from error

    def judge(self, payload: bytes, received_at: float, tag_at: int = 0) -> None:
        """Take the reply, and set the error where it is not what ``full`` awaits.

        :param tag_at: where in the payload the tag is
        """
        self.reply = payload
        # Never before it was sent, whatever the clock of the kernel says.
        self.received_at = received_at if received_at > self.started_at else self.started_at
        if self.echo == "full" and payload != self.expected and self.expected not in payload:
            tag_in_expected = max(0, self.expected.find(self.tag))
            is_cut = self.expected.startswith(payload[tag_at:], tag_in_expected)
            self.error = EchoTruncated() if is_cut else EchoAltered()


# ------------------------------------------------------------------------ when bytes have arrived

# Linux, socket(7): the kernel says when it received the last byte that a read returns, on the clock
# of ``time()``. Python has no names for these.
SO_TIMESTAMPNS = 35
TIMESTAMP = struct.Struct("@ll")  # seconds, nanoseconds
TIMESTAMP_SPACE = 32  # bytes, with the header of ancillary data
CLOCK_STEP = 0.01  # seconds; ``time()`` has been set if it moves so far against ``perf_counter()``


class Arrivals:
    """Says when bytes arrived: when the kernel had them, however late this process reads them.

    The stamps are on the clock of ``time()``, which may be set during a run. What was stamped
    before it was set counts as arrived when it is read.
    """

    def __init__(self) -> None:
        self.clock_offset = time() - perf_counter()  # seconds; makes a ``time()`` of one
        self._set_at = -math.inf  # ``perf_counter`` when ``time()`` was seen to be set

    def receive(self, sock: socket.socket) -> tuple[bytes, float]:
        """Return what has arrived, and the ``perf_counter`` at which its last byte did.

        :raises OSError: as ``recv`` does
        """
        data, ancillary, _, _ = sock.recvmsg(READ_SIZE, TIMESTAMP_SPACE)
        if not ancillary:  # the end of the stream
            return data, perf_counter()
        seconds, nanoseconds = TIMESTAMP.unpack(ancillary[0][2])
        return data, self.arrived_at(seconds + nanoseconds * 1e-9)

    def arrived_at(self, stamp: float) -> float:
        """Return the ``perf_counter`` of a stamp of the kernel, at most now.

        ``time`` comes before ``perf_counter``: what happens between the two makes the time longer.
        """
        clock = time()
        now = perf_counter()
        RUN.reads += 1
        offset = clock - now
        if not -CLOCK_STEP < offset - self.clock_offset < CLOCK_STEP:
            self._set_at = now
        self.clock_offset = offset
        lag = clock - stamp
        arrived = now - lag
        if lag <= 0 or arrived < self._set_at:
            return now
        if lag > LATE_READ:
            RUN.late_reads += 1
        return arrived


class UnstampedArrivals(Arrivals):
    """For systems whose kernels do not say it: bytes arrive when they are read."""

    def receive(self, sock: socket.socket) -> tuple[bytes, float]:
        """Return what has arrived, and the ``perf_counter`` of now."""
        data = sock.recv(READ_SIZE)
        return data, perf_counter()


ARRIVALS = Arrivals() if sys.platform == "linux" else UnstampedArrivals()

# -------------------------------------------------------------------------------------------- TLS


def takes_self(function: object) -> bool:
    """Return whether a function has to be given an argument: in a class, it is a method."""
    if not inspect.isfunction(function):
        return False
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(each.kind in positional and each.default is each.empty for each in parameters)


def maker_of_tls_context(hooks: ChatHooks | type[ChatHooks]) -> Callable[[], ssl.SSLContext]:
    """Return the ``tls_context`` of hooks: a method, or a function that takes no ``self``."""
    attribute = inspect.getattr_static(hooks, "tls_context")
    if inspect.isfunction(attribute) and not takes_self(attribute):
        return attribute
    return hooks.tls_context


def tls_context_from(make_context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return a context: a function's is shared, as it takes 10 ms to read the authorities."""
    if inspect.ismethod(make_context):
        context: ssl.SSLContext = make_context()
        return context
    return shared_tls_context(make_context)


@functools.cache
def shared_tls_context(make_context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return the context that a function makes, made once."""
    return make_context()


class TLSLayer:
    """TLS between the bytes of the network and those of the framing, without a socket.

    :raises ValueError: for a host that cannot be the name in a certificate
    """

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self.is_ended = False  # the other side has said so
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        name = host.partition("%")[0].removesuffix(".")
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=name)

    def handshake(self, sock: socket.socket, ends_at: float) -> None:
        """Shake hands over a socket that does not block. Blocks the calling greenlet alone.

        :param ends_at: ``perf_counter`` of its deadline
        :raises OSError: where it fails, for a wrong certificate say
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                send_all(sock, self._to_send.read(), ends_at)
                data = receive_before(sock, ends_at)
                if data:
                    self._received.write(data)
                else:
                    self._received.write_eof()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    sock.send(self._to_send.read())  # the alert that says what is wrong
                raise
            else:
                send_all(sock, self._to_send.read(), ends_at)
                return

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return the bytes to send for the next bytes of the framing."""
        rest = memoryview(plaintext)
        while rest:
            rest = rest[self._tls.write(rest) :]
        return self._to_send.read()

    def decrypt(self, data: bytes) -> Iterator[bytes]:
        """Take received bytes, cut anywhere; yield what is complete for the framing.

        :raises OSError: where the stream is broken
        """
        self._received.write(data)
        while self._received.pending or self._tls.pending():
            try:
                plaintext = self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:  # only a part of a record, or nothing for the framing
                return
            if not plaintext:
                self.is_ended = True
                return
            yield plaintext

    def close(self) -> bytes:
        """Return the bytes of close_notify, which say that no more will come."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        return self._to_send.read()


def send_all(sock: socket.socket, data: bytes, ends_at: float) -> None:
    """Send bytes on a socket that does not block. Blocks the calling greenlet alone.

    :raises TimeoutError: at the deadline
    """
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            seconds = max(0.0, ends_at - perf_counter())
            error = TimeoutError(NO_HANDSHAKE)
            gevent.socket.wait_write(sock.fileno(), timeout=seconds, timeout_exc=error)


def receive_before(sock: socket.socket, ends_at: float) -> bytes:
    """Return the next bytes of a socket that does not block; empty at its end.

    :raises TimeoutError: where none have arrived at the deadline
    """
    while True:
        try:
            return sock.recv(READ_SIZE)
        except BlockingIOError:
            seconds = max(0.0, ends_at - perf_counter())
            error = TimeoutError(NO_HANDSHAKE)
            gevent.socket.wait_read(sock.fileno(), timeout=seconds, timeout_exc=error)


# --------------------------------------------------------------------------------------- framings


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


class DelimiterFraming:
    """A message ends with a delimiter of one byte, which it cannot contain."""

    delimiter = b"\0"
    dropped = b""
    """What is dropped before the delimiter of a message that arrives."""

    def __init__(self) -> None:
        self._incomplete = bytearray()

    def encode(self, payload: bytes) -> bytes:
        """Return payload and delimiter.

        :raises ValueError: for a payload that contains the delimiter
        """
        if self.delimiter in payload:
            raise ValueError("nul framing carries no NUL byte within a message")
        return payload + self.delimiter

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Return the messages that end in data.

        :raises MessageTooLong: for a message over the limit
        """
        # Nearly every read is one whole message, and READ_SIZE is far below the limit.
        end = data.find(self.delimiter)
        is_one_message = end >= 0 and end == len(data) - 1
        if is_one_message and not self._incomplete and len(data) <= MESSAGE_LIMIT:
            return (data[:-1].removesuffix(self.dropped),)
        return self._split(data)

    def _split(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that end in data, and keep the rest."""
        start = 0
        while (end := data.find(self.delimiter, start)) >= 0:
            self._extend(data[start:end])
            payload = bytes(self._incomplete)
            self._incomplete.clear()
            yield payload.removesuffix(self.dropped)
            start = end + 1
        self._extend(data[start:])

    def _extend(self, data: bytes) -> None:
        r"""Add data to the incomplete message, which may be as long as one and a ``\r``."""
        if len(self._incomplete) + len(data) > MESSAGE_LIMIT + 1:
            raise MessageTooLong
        self._incomplete += data


class NulFraming(DelimiterFraming):
    """A message ends with a NUL byte (STOMP, XMLSocket)."""


class LineFraming(DelimiterFraming):
    r"""A message ends with ``\n``; a ``\r`` before it is dropped."""

    delimiter = b"\n"
    dropped = b"\r"
    line_end = b"\n"
    r"""What is sent after a message: ``\n``, or what ends with it."""

    def encode(self, payload: bytes) -> bytes:
        r"""Return payload and line end.

        :raises ValueError: for a payload of which the other side would make something else
        """
        if b"\n" in payload or payload.endswith(b"\r"):
            raise ValueError(
                "line framing carries no line break, and no carriage return at the end of a message"
            )
        return payload + self.line_end


class CrlfFraming(LineFraming):
    r"""Lines, sent with ``\r\n``, for servers that wait for both (Twisted, telnet, muds)."""

    line_end = b"\r\n"


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


BUILT_IN_FRAMINGS = (RawFraming, NulFraming, LineFraming, CrlfFraming, LengthPrefixFraming)


def feed_until_error(framing: Framing, data: bytes) -> tuple[list[bytes], BaseException | None]:
    """Feed a framing; return its payloads, and what it raised behind them."""
    payloads: list[bytes] = []
    try:
        for payload in framing.feed(data):
            payloads.append(bytes(memoryview(payload)))  # text is a TypeError here
    except HOOK_ERRORS as error:
        return payloads, error
    return payloads, None


# ----------------------------------------------------------------------------------------- errors
# What a request fails with. Locust counts failures by their text, so each class has one fixed text,
# with nothing in it that the server sent.


class ChatError(Exception):
    """What a request can fail with, beside an ``OSError``."""

    text = "The chat failed."

    def __init__(self) -> None:
        super().__init__(self.text)


class EchoTimeout(ChatError, TimeoutError):
    """The server answered too late, or not at all."""

    text = "No echo came within the time-out."


class EchoTruncated(ChatError):
    """The echo carries the tag, but is cut."""

    text = "The echo ends before the message does."


class EchoAltered(ChatError):
    """The echo carries the tag, but other text."""

    text = "The echo is not what was sent."


class EchoRefused(ChatError):
    """The hook ``is_refusal`` has said so."""

    text = "The server answered with a refusal."


class EchoFunctionError(ChatError):
    """The function given as ``echo``, or the hook ``is_refusal``, has raised something."""

    text = "The function that judges an echo failed; level DEBUG logs where."


class ConnectionClosed(ChatError, ConnectionError):
    """The server hung up, or an untagged exchange that failed left nothing to go on with."""

    text = "The server closed the connection."


class MessageTooLong(ChatError):
    """A flood, or another framing than the server's."""

    text = "The server sent over 1 MiB without the end of a message."


class FramingError(ChatError):
    """A framing of the user's own has raised something."""

    text = "The framing failed on what the server sent; level DEBUG logs where."


class HandlerTooSlow(ChatError):
    """Messages wait for ``on_message``, and it takes none."""

    text = "The user's on_message is 10,000 messages or 16 MiB behind."


class PlaintextAfterStartTLS(ChatError, ConnectionError):
    """Somebody may have put it there (CVE-2011-0411)."""

    text = "The server sent plaintext where the TLS handshake had to begin."


class SettingError(argparse.ArgumentTypeError, ValueError):
    """A setting is wrong.

    :param written: what was written
    :param what: the name of the setting
    :param instead: what to write instead
    """

    def __init__(self, written: object, what: str, instead: str) -> None:
        shown = "an empty value" if written in ("", None) else repr(written)
        super().__init__(f"{shown} is not a valid {what}: use {instead}")


def log_place_of(error: BaseException) -> None:
    """Log at level DEBUG where user code failed, without its text, which may hold server bytes."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.debug("%s\n%s", type(error).__name__, where)


# ------------------------------------------------------------------------------- opening a socket

NO_CONNECTION = "no connection within the time-out"
NO_HANDSHAKE = "no TLS handshake within the time-out"
NO_LOOK_UP = "the name was not looked up within the time-out"
LOOK_UP_KEPT = 30.0  # seconds
LOOK_UP_GRACE = 0.02  # seconds after the deadline
# Linux, ip(7): choose the port when connecting, not when binding. Python 3.11 has no name for it.
IP_BIND_ADDRESS_NO_PORT = 24
TCP_USER_TIMEOUT = 60_000  # ms that sent bytes may stay unacknowledged: the machine has vanished
# Seconds of silence before the first probe, seconds between probes, lost probes.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 30, 10, 3

AddressInfo = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]


def open_socket(
    host: str,
    port: int,
    timeout: float,
    context: ssl.SSLContext | None,
    source: str | None,
) -> tuple[socket.socket, TLSLayer | None]:
    """Return a connected socket that does not block; the time-out covers look-up, TCP and TLS.

    :raises OSError: where there is no connection
    :raises ValueError: for a name that cannot be looked up
    """
    ends_at = perf_counter() + timeout
    sock = connect_socket(host, port, source, ends_at)
    try:
        if context is None:
            return sock, None
        tls = TLSLayer(context, host)
        tls.handshake(sock, ends_at)
        return sock, tls
    except BaseException:
        sock.close()
        raise


def connect_socket(host: str, port: int, source: str | None, ends_at: float) -> socket.socket:
    """Return a socket connected to one of the addresses of the host, which share the time.

    :raises OSError: of the last address that did not accept
    """
    failure = OSError("the host has no address of the same family as the source")
    addresses = [
        address
        for address in addresses_of(host, port, ends_at)
        if source is None or address[0] == family_of(source)
    ]
    for number, address in enumerate(addresses):
        share = (ends_at - perf_counter()) / (len(addresses) - number)
        try:
            return connect_to(address, source, max(0.001, share))
        except TimeoutError:
            failure = TimeoutError(NO_CONNECTION)
        except OSError as error:
            failure = error
    raise failure


def connect_to(address: AddressInfo, source: str | None, seconds: float) -> socket.socket:
    """Return a socket that is connected to an address and does not block.

    :raises OSError: where it does not accept
    """
    family, kind, protocol, _, target = address
    with socket.socket(family, kind, protocol) as sock:
        set_options(sock)
        if source is not None:
            bind_to_source(sock, source)
        sock.settimeout(seconds)
        # Where the time is over and the socket is connected in one iteration of the event loop, as
        # this process stood still, gevent lets the socket win. The same goes for the handshake.
        sock.connect(target)
        if sock.getsockname() == sock.getpeername():
            # Linux, on loopback, where nobody listens: by chance it has connected to itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        # The event loop reads and writes by itself: gevent's socket would only cost.
        plain_class = gevent.monkey.get_original("socket", "socket")
        plain: socket.socket = plain_class(fileno=sock.detach())
        plain.setblocking(False)
        return plain


def set_options(sock: socket.socket) -> None:
    """Send at once, have arrivals stamped, take as much as the server reads, notice its death."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no waiting as of RFC 896
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform != "linux":
        return
    keep_kernel_stamping()
    for level, option, value in (
        (socket.SOL_SOCKET, SO_TIMESTAMPNS, 1),
        # Else the kernel takes no more until a third of its megabytes is free: a slow, steady
        # reader would look as if it had stopped.
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, READ_SIZE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT),
    ):
        with contextlib.suppress(OSError):  # an old kernel, or one that only looks like Linux
            sock.setsockopt(level, option, value)


@functools.cache
def keep_kernel_stamping() -> socket.socket:
    """Return a socket that is open for the life of the process.

    Linux begins to stamp a moment after the first socket has asked for it, and ends with the last.
    So between two connections of a single user it would begin anew.
    """
    keeper = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError):  # a kernel that only looks like Linux
        keeper.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return keeper


class LookUp:
    """The look-up of a name, which all users share: a name server need not be asked by each."""

    def __init__(self, host: str, port: int) -> None:
        self.good_until = math.inf  # ``perf_counter``; while it is under way, all wait for it
        self.result = gevent.event.AsyncResult()
        self.users = itertools.count()
        # A greenlet of its own: who asked first may be stopped.
        gevent.spawn(self._look_up, host, port)

    def _look_up(self, host: str, port: int) -> None:
        try:
            addresses = resolve(host, port)
        except (OSError, ValueError) as error:
            self.good_until = 0.0
            self.result.set_exception(error)
        except Exception as error:  # gevent's resolver can start no thread, say
            log_place_of(error)
            self.good_until = 0.0
            self.result.set_exception(OSError("the look-up failed; level DEBUG logs where"))
        else:
            self.good_until = perf_counter() + LOOK_UP_KEPT
            self.result.set(addresses)


def resolve(host: str, port: int) -> list[AddressInfo]:
    """Return the addresses of a name. ``localhost.`` and the like are in no name server.

    :raises OSError: where it has none
    :raises ValueError: where it cannot be a name
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if not host.endswith("."):
            raise
        addresses = socket.getaddrinfo(host.removesuffix("."), port, type=socket.SOCK_STREAM)
    return list(addresses)


LOOK_UPS: dict[tuple[str, int], LookUp] = {}


def addresses_of(host: str, port: int, ends_at: float) -> list[AddressInfo]:
    """Return the addresses of a name. It is looked up again after half a minute, or a failure.

    Users begin in turn with those of the family that the resolver puts first: so the nodes of a
    cluster behind one name share the users.

    :raises OSError: where it has none, or the look-up takes too long
    :raises ValueError: where it cannot be a name
    """
    shared = LOOK_UPS.get((host, port))
    if shared is None or perf_counter() > shared.good_until:
        shared = LOOK_UPS[host, port] = LookUp(host, port)
    shared.result.wait(timeout=ends_at - perf_counter())
    if not shared.result.ready():  # it may be in its thread, where this process stood still
        shared.result.wait(timeout=LOOK_UP_GRACE)
    if not shared.result.ready():
        raise TimeoutError(NO_LOOK_UP)
    addresses: list[AddressInfo] = shared.result.get(block=False)
    first = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    start = next(shared.users) % len(first)
    return first[start:] + first[:start] + others


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


# -------------------------------------------------------------------------------------- open loop

STARTED_IN_TIME = 0.1  # seconds after it fell due


class Schedule:
    """Open loop: tasks start at fixed times, whether earlier ones have been answered or not.

    So a server that stands still is shown by every message that fell due meanwhile, not by one a
    user (Gil Tene, "How NOT to Measure Latency": coordinated omission).

    What falls due while there is no connection is left out: nothing piles up.

    :param rate: tasks a second
    :param client: whose connection is looked at
    """

    def __init__(self, rate: float, client: TCPSocketClient) -> None:
        self._interval = 1 / rate
        self._client = client
        self._connected_since: float | None = None
        self._due = perf_counter() + random.uniform(0, self._interval)  # a phase of its own
        self._skip_missed(perf_counter())

    def _skip_missed(self, now: float) -> None:
        """Go on with the next task that falls due from now on."""
        missed = math.ceil((now - self._due) / self._interval)
        self._due += max(0, missed) * self._interval
        self._connected_since = self._client.connected_since

    def first_pause(self) -> float:
        """Return the seconds until the first task is due, once the user is connected."""
        now = perf_counter()
        self._skip_missed(now)
        self._client.first_send_at = 0.0
        return max(0.0, self._due - now)

    def count_missed(self) -> None:
        """Count what fell due and did not start, as the user ends."""
        if self._client.first_send_at:
            self.next_pause()
        late = perf_counter() - self._due - STARTED_IN_TIME
        if late > 0 and self._is_connected_still():
            RUN.due += 1 + int(late / self._interval)

    def _is_connected_still(self) -> bool:
        """Return whether the connection is the one for which tasks have fallen due."""
        since = self._client.connected_since
        return since is not None and since == self._connected_since

    def next_pause(self) -> float:
        """Return the seconds until the next task is due; 0 where that is past."""
        now = perf_counter()
        sent_at = self._client.first_send_at
        if sent_at and self._is_connected_still():
            RUN.due += 1
            RUN.started_in_time += sent_at - self._due <= STARTED_IN_TIME
        self._client.first_send_at = 0.0
        self._due += self._interval
        if not self._is_connected_still():
            self._skip_missed(now)
        return max(0.0, self._due - now)


@functools.cache
def shared_wait(pause: Pause) -> Callable[[], float]:
    """Return what gives the seconds between two messages: one for all users."""
    return functools.partial(random.uniform, pause.shortest, pause.longest)


# ------------------------------------------------------- a run's answer, and the generator's faults

WATCH_INTERVAL = 0.1  # seconds between two looks at the clock
STOOD_STILL = 0.5  # seconds without an event-loop iteration
LATE_READ = 0.02  # seconds between the arrival of bytes and their read
LATE_READS_TOLERATED = 0.01  # of all reads
KEPT_SCHEDULE = 0.95  # of the messages due, started in time
ENOUGH = 100  # reads, or messages due, before a share of them says anything
SLOW_HOOK = 0.02  # seconds; a hook on the event loop holds up all users
SERVING_ROWS = ("connect", "send_chat")  # they only prepare a round trip: no tries of their own
ARRIVAL_ROWS = ("delivery", "received")  # of plugins: they tell of what others sent
ECHO_ROW = ("echo_response", "TCP")
END_MESSAGE = "chat_end"  # what a worker sends to its master when its run has stopped


class Totals(NamedTuple):
    """What the generator did in a run. All but ``in_flight`` and ``longest_stall`` are counts: the
    difference of two looks is what happened between them.
    """

    attempts: int = 0  # to connect
    connected: int = 0  # those of them that did
    awaited: int = 0  # exchanges that awaited an echo, and have ended
    echoed: int = 0  # those of them that got a good one
    in_flight: int = 0  # exchanges whose echo was awaited when their connection was closed locally
    sent: int = 0  # messages sent of which no echo was awaited
    due: int = 0  # messages of an open loop that fell due while their user was connected
    started_in_time: int = 0  # those of them that were handed over within 0.1 s
    reads: int = 0  # with a time of arrival by the kernel
    late_reads: int = 0  # those of them that were over 20 ms late
    stalls: int = 0  # times that the event loop stood still for over half a second
    longest_stall: float = 0.0  # seconds


class RunRecord:
    """What happened in the present run in this process, and, on a master, in its workers."""

    def __init__(self) -> None:
        self.environment: env.Environment | None = None
        self.result = ""  # the line of the run that has ended
        self._watcher: gevent.Greenlet | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.attempts = self.connected = 0
        self.awaited = self.echoed = self.in_flight = self.sent = 0
        self.due = self.started_in_time = 0
        self.reads = self.late_reads = 0
        self.stalls = 0
        self.longest_stall = 0.0
        self._watched_at = math.inf  # ``perf_counter``, when the event loop was seen to turn
        self._last_stall = (0.0, 0.0)  # when it began and ended
        self.is_traced = False  # a user of this process is
        self.workers: dict[str, Totals] = {}  # by the id of the worker, the latest that it said
        self.lost: set[str] = set()  # ids of workers that were seen to be missing
        self.unreported: set[str] = set()  # ids of workers that have still to report their end
        self.login_texts: set[str] = set()  # that ``bounded_error`` has let through
        self._warned: set[str] = set()

    def totals(self) -> Totals:
        """Return the figures of this process."""
        return Totals(
            self.attempts,
            self.connected,
            self.awaited,
            self.echoed,
            self.in_flight,
            self.sent,
            self.due,
            self.started_in_time,
            self.reads,
            self.late_reads,
            self.stalls,
            self.longest_stall,
        )

    def start_watching(self) -> None:
        """Watch the event loop of this process, or the workers of this master, until the end."""
        self.stop_watching()
        runner = self.environment.runner if self.environment else None
        if isinstance(runner, runners.MasterRunner):
            self._watcher = gevent.spawn(self._watch_workers, runner)
        else:
            self._watcher = gevent.spawn(self._watch_event_loop)

    def stop_watching(self) -> None:
        """End the watching."""
        if self._watcher is not None:
            self._watcher.kill(block=False)
            self._watcher = None

    def _watch_event_loop(self) -> None:
        """Notice when this process stands still, and warn of its faults."""
        self._watched_at = perf_counter()
        while True:
            gevent.sleep(WATCH_INTERVAL)
            now = perf_counter()
            pause = now - self._watched_at - WATCH_INTERVAL
            if pause > STOOD_STILL:
                self.stalls += 1
                self.longest_stall = max(self.longest_stall, pause)
                self._last_stall = (self._stall_began(), now)
            self._watched_at = now
            for fault in own_faults(self.totals()):
                self.warn_once(fault.kind, f"{fault.text}; {fault.remedy}")

    def earliest_arrival(self, received_at: float) -> float:
        """Return when bytes may have come that were read before others, which came at that time.

        It is earlier where this process stood still then, and could not look.
        """
        began, ended = self._last_stall
        if perf_counter() - self._watched_at > WATCH_INTERVAL + STOOD_STILL:  # not noticed yet
            began, ended = self._stall_began(), math.inf
        return began if began <= received_at <= ended else received_at

    def _stall_began(self) -> float:
        """Return when the event loop turned last; one iteration between two stalls is none."""
        began, ended = self._last_stall
        return began if ended == self._watched_at else self._watched_at

    def _watch_workers(self, runner: runners.MasterRunner) -> None:
        """Notice which workers are missing, each second: Locust forgets them after a minute."""
        while True:
            gevent.sleep(1)
            self.note_missing(runner)

    def note_missing(self, runner: runners.MasterRunner) -> None:
        """Count workers that are missing now as lost, and warn of it."""
        self.lost.update(worker.id for worker in runner.clients.missing)
        if self.lost:
            self.warn_once(
                "lost",
                f"{len(self.lost)} of {len(self.worker_ids(runner))} workers lost: "
                "its users are gone, and what it had not reported yet",
            )

    def worker_ids(self, runner: runners.MasterRunner) -> set[str]:
        """Return the ids of all workers that took part in the run."""
        return {*runner.clients, *self.workers, *self.lost, *self.unreported}

    def warn_once(self, kind: str, text: str) -> None:
        """Log a warning, unless this run has had one of this kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(text)


RUN = RunRecord()

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def timed_hook(
    name: str,
    hook: Callable[Parameters, Result],
    *arguments: Parameters.args,
    **keywords: Parameters.kwargs,
) -> Result:
    """Call a hook on the event loop, and warn once a run where it takes over 20 ms."""
    started_at = perf_counter()
    try:
        return hook(*arguments, **keywords)
    finally:
        seconds = perf_counter() - started_at
        if seconds > SLOW_HOOK:
            text = "%s took %.0f ms on the event loop, and held up all users: make it faster"
            RUN.warn_once(name, text % (name, seconds * 1000))


class Fault(NamedTuple):
    """Something that the generator did wrong."""

    kind: str
    size: float  # the larger, the worse, within a kind
    text: str
    remedy: str


MORE_MACHINES = "use --processes, more machines, or fewer users"


def own_faults(totals: Totals) -> list[Fault]:
    """Return what one process did wrong, as its totals say."""
    faults = []
    if totals.stalls:
        faults.append(
            Fault(
                "stood still",
                totals.longest_stall,
                f"the generator stood still for {totals.longest_stall:.1f} s",
                "the server was not asked anything then; look for what blocks, or takes the "
                "processor",
            )
        )
    if totals.late_reads > totals.reads * LATE_READS_TOLERATED and totals.reads >= ENOUGH:
        share = totals.late_reads / totals.reads
        faults.append(
            Fault(
                "late reads",
                share,
                f"{share:.1%} of the reads came over {LATE_READ * 1000:.0f} ms after the bytes "
                "(the round trips are corrected for it)",
                f"users go on late, and send less than they should: {MORE_MACHINES}",
            )
        )
    if totals.started_in_time < totals.due * KEPT_SCHEDULE and totals.due >= ENOUGH:
        kept = totals.started_in_time / totals.due
        faults.append(
            Fault(
                "schedule",
                1 - kept,
                f"this machine cannot keep the schedule: only {kept:.1%} of the messages due "
                f"started within {STARTED_IN_TIME * 1000:.0f} ms",
                f"{MORE_MACHINES}, a lower --chat-rate, and no task that waits",
            )
        )
    return faults


def totals_of_processes(environment: env.Environment) -> list[Totals]:
    """Return the totals of each process that has users."""
    if isinstance(environment.runner, runners.MasterRunner):
        return list(RUN.workers.values())
    return [RUN.totals()]


def run_totals(environment: env.Environment) -> Totals:
    """Return the totals of the present or the last run, of all its processes.

    On a master: what its workers said last, every few seconds and at their end.
    """
    processes = totals_of_processes(environment)
    if not processes:
        return Totals()
    sums = Totals._make(map(sum, zip(*processes, strict=True)))
    return sums._replace(longest_stall=max(each.longest_stall for each in processes))


def lost_workers(environment: env.Environment) -> int:
    """Return how many workers were lost: went missing, or did not report their end."""
    if not isinstance(environment.runner, runners.MasterRunner):
        return 0
    RUN.note_missing(environment.runner)
    return len(RUN.lost | RUN.unreported)


def generator_faults(environment: env.Environment) -> list[str]:
    """Return what the generator did wrong in the present or the last run, as parts of a sentence.

    For a distributed run, each is the worst of all workers.
    """
    texts = []
    runner = environment.runner
    count = 0  # of workers; in one process there are none
    if isinstance(runner, runners.MasterRunner):
        RUN.note_missing(runner)
        count = len(RUN.worker_ids(runner))
        if RUN.lost:
            texts.append(f"{len(RUN.lost)} of {count} workers lost")
        unreported = len(RUN.unreported - RUN.lost)
        if unreported:
            texts.append(f"{unreported} of {count} workers did not report their end")
    processes = totals_of_processes(environment)
    by_kind: dict[str, list[Fault]] = {}
    for totals in processes:
        for fault in own_faults(totals):
            by_kind.setdefault(fault.kind, []).append(fault)
    for faults in by_kind.values():
        where = f", in {len(faults)} of {count} workers" if count else ""
        worst = max(faults, key=lambda fault: fault.size)
        texts.append(worst.text + where)
    return texts


def tries_and_failures(rows: Iterable[stats.StatsEntry]) -> tuple[int, int]:
    """Return how often users tried something, and how often they failed.

    A message and its echo are one try. That the kernel has taken a message, or a connection was
    opened, does not show yet that the server serves: so ``connect`` and ``send_chat`` count only
    where they fail.
    """
    tries = 0
    failures = 0
    for row in rows:
        failures += row.num_failures
        tries += row.num_failures
        if row.name not in SERVING_ROWS:
            tries += row.num_requests - row.num_failures
    return tries, failures


def result_line(environment: env.Environment) -> str:
    """Return the answer of a run: what came, how fast, what failed, what was not looked at."""
    totals = run_totals(environment)
    rows = environment.stats.entries
    parts = [echo_figures(rows, totals)]
    tries, failures = tries_and_failures(r for r in rows.values() if r.name not in ARRIVAL_ROWS)
    lost_deliveries = sum(row.num_failures for row in rows.values() if row.name in ARRIVAL_ROWS)
    if tries + lost_deliveries:  # else only sending was tried, which is counted already
        parts.append(f"{failures + lost_deliveries:,} of {tries + lost_deliveries:,} tries failed")
    disconnects = sum(row.num_failures for row in rows.values() if row.name == "disconnect")
    parts.append(counted(disconnects, "disconnect"))
    if totals.in_flight:
        parts.append(f"{counted(totals.in_flight, 'echo', 'es')} still awaited at the end")
    parts += generator_faults(environment)
    return "chat: " + "; ".join(parts)


def echo_figures(rows: dict[tuple[str, str], stats.StatsEntry], totals: Totals) -> str:
    """Return count, rate and round trips, those of Locust's row ``echo_response``."""
    if not totals.connected:
        return "nobody connected"
    awaited = totals.awaited + totals.in_flight
    if awaited == 0:
        return sending_figures(rows, totals)
    row = rows.get(ECHO_ROW)
    echoed = row.num_requests - row.num_failures if row else 0
    if row is None or echoed == 0:
        where = f" ({other_rows(rows)})" if totals.echoed else ""
        return f"{totals.echoed:,} of {counted(awaited, 'message')} echoed{where}"
    rate = row.total_rps - row.total_fail_per_sec
    median, p95, p99 = (row.get_response_time_percentile(share) for share in (0.5, 0.95, 0.99))
    return (
        f"{counted(echoed, 'message')} echoed, {rate:,.1f} a second; "
        f"round trip median {in_digits(median)} ms, 95th percentile {in_digits(p95)}, "
        f"99th {in_digits(p99)}, maximum {in_digits(row.max_response_time)}"
    )


def sending_figures(rows: dict[tuple[str, str], stats.StatsEntry], totals: Totals) -> str:
    """Return count and rate of a run in which no echo was awaited."""
    row = rows.get(("send_chat", "TCP"))
    if row is not None and row.num_requests > row.num_failures:
        rate = row.total_rps - row.total_fail_per_sec
        count = row.num_requests - row.num_failures
        return f"no echo was awaited; {counted(count, 'message')} sent, {rate:,.1f} a second"
    where = " (in rows of other names)" if totals.sent else ""
    return f"no echo was awaited; {counted(totals.sent, 'message')} sent{where}"


def other_rows(rows: dict[tuple[str, str], stats.StatsEntry]) -> str:
    """Return where the good echoes are that are not in the row ``echo_response``."""
    good = {row.name for row in rows.values() if row.num_requests > row.num_failures}
    is_login_alone = good - {*SERVING_ROWS, "starttls"} == {"login"}
    return "of logins alone" if is_login_alone else "in rows of other names"


def counted(count: int, noun: str, plural_ending: str = "s") -> str:
    """Return a count with its noun, which is singular for one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{plural_ending}"


def in_digits(milliseconds: float) -> str:
    """Return a time with four digits, or with those before the point where these are more."""
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.4g}"


def why_nothing_came(environment: env.Environment) -> str:
    """Return why a run has shown nothing of its server, or an empty text where it has."""
    totals = run_totals(environment)
    if totals.attempts and not totals.connected:
        return "nobody connected"
    if totals.awaited + totals.in_flight and not totals.echoed:
        return "echoes were awaited, and none came"
    return ""


# ---------------------------------------------------------------------------------- the wire trace

TRACE_LENGTH = 200  # bytes shown of each send and each read


Trace = Callable[[Literal["sent", "received"], bytes], None]


def log_trace(direction: Literal["sent", "received"], data: bytes) -> None:
    """Log what the first user of a process sends and receives, for ``--chat-trace``.

    :param data: one message, or what one read returned, whether a message ends in it or not
    """
    logger.info("trace: %-8s %s", direction, escaped(data))


def escaped(data: bytes) -> str:
    """Return bytes as text that is safe to print, cut."""
    rest = len(data) - TRACE_LENGTH
    return repr(data[:TRACE_LENGTH])[1:] + (f" and {rest:,} bytes more" if rest > 0 else "")


# --------------------------------------------------------------------------- settings and address

EchoMode = Literal["full", "tag", "any", "none"]
ECHO_MODES: tuple[EchoMode, ...] = ("full", "tag", "any", "none")
EchoFunction = Callable[[bytes], bool]
Echo = EchoMode | EchoFunction
FramingFactory = Callable[[], Framing]

ASCII = bytes(range(128)).decode("ascii")
NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
PORT = re.compile(r"[1-9]\d{0,4}", re.ASCII)
LENGTH_FORMAT = re.compile(r"[@=<>!]?[BHILQ]")
LABEL = r"[^\s:;/()*%\[\]@?#\\.,]{1,63}"
ADDRESS = re.compile(
    rf"(?:(?P<scheme>tls|tcp)://)?"
    rf"(?:\[(?P<ipv6>[\w:.]+(?:%[\w.-]+)?)\]|(?P<name>{LABEL}(?:\.{LABEL})*\.?))"
    rf"(?::(?P<port>[^/]*))?",
    re.IGNORECASE,
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
    has_port = match is not None and (match["port"] is not None or port)
    if match is None or not has_port or not is_ipv6_or_none(match["ipv6"]):
        raise SettingError(
            host,
            "--host",
            "host:port, such as localhost:12345 or tls://[::1]:12345, or add --tcp-port",
        )
    is_tls = (match["scheme"] or "").lower() == "tls"
    name = match["ipv6"] or match["name"]
    if match["port"] is None:
        return Address(name, parse_port(port), is_tls)
    try:
        return Address(name, parse_port(match["port"]), is_tls)
    except SettingError:
        instead = "host:port with a port from 1 to 65535, such as localhost:12345"
        raise SettingError(host, "--host", instead) from None


def is_ipv6_or_none(text: str | None) -> bool:
    """Return whether what stood in brackets, if anything did, is an IPv6 address."""
    if text is None:
        return True
    try:
        ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def parse_addresses(host: str | None, port: str | None = None) -> tuple[Address, ...]:
    """Understand one server, or several with commas between them."""
    return tuple(parse_address(each, port) for each in (host or "").split(","))


def parse_port(value: object) -> int:
    """Return the number of a port."""
    text = str(value)
    if not PORT.fullmatch(text) or int(text) > 65535:
        raise SettingError(value, "port", "a port from 1 to 65535")
    return int(text)


def parse_framing(value: object) -> FramingFactory:
    """Return the factory of framings that a name means; a factory is returned as it is."""
    if callable(value):
        return value
    named: dict[object, FramingFactory] = {
        "line": LineFraming,
        "crlf": CrlfFraming,
        "nul": NulFraming,
        "raw": RawFraming,
    }
    if value in named:
        return named[value]
    if not LENGTH_FORMAT.fullmatch(str(value)):
        raise SettingError(
            value, "framing", "line (default), crlf, nul, raw, or a prefix like >I, <H"
        )
    return functools.partial(LengthPrefixFraming, str(value))


def parse_echo(value: object) -> EchoMode:
    """Return the mode that a name means."""
    for mode in ECHO_MODES:
        if value == mode:
            return mode
    raise SettingError(value, "echo", "full (default), tag, any or none")


def parse_encoding(value: object) -> str:
    """Return the name of an encoding of text that keeps ASCII as it is."""
    try:
        keeps_ascii = ASCII.encode(str(value)) == ASCII.encode("ascii")
        codecs.decode(b"", str(value))
    except (LookupError, ValueError):
        keeps_ascii = False
    if not keeps_ascii:
        raise SettingError(
            value, "encoding", "one that keeps ASCII as it is, such as utf-8, cp949 or gb18030"
        )
    return str(value)


def parse_timeout(value: object) -> float:
    """Return seconds above 0."""
    return parse_positive(value, "time-out", "seconds above 0 (default 5)")


def parse_rate(value: object) -> float:
    """Return messages a second, above 0."""
    return parse_positive(value, "rate", "messages a second above 0, such as 2 or 0.1")


def parse_heartbeat(value: object) -> float:
    """Return seconds above 0."""
    return parse_positive(value, "heartbeat", "seconds above 0, or None")


def parse_positive(value: object, what: str, instead: str) -> float:
    """Return a number above 0; raise ``SettingError``, which says what to write instead."""
    if isinstance(value, (int, float)) and 0 < value < float("inf"):  # of a user class
        return float(value)
    text = str(value)
    if not NUMBER.fullmatch(text) or float(text) == 0:
        raise SettingError(value, what, instead)
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
    raise SettingError(value, "wait", "seconds, such as 2, 0.5-2 or 0 (default 1-3)")


def parse_sources(value: object) -> tuple[str, ...]:
    """Understand the addresses of this machine, with commas between them."""
    addresses = tuple(str(value).split(","))
    for address in addresses:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            instead = "addresses of this machine, such as 127.0.0.1,127.0.0.2"
            raise SettingError(value, "source", instead) from None
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
        """Return the text as it is: argparse shows the ``SettingError`` of a wrong one."""
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
    Option(
        "chat-framing", parse_framing, "Framing: line (default), crlf, nul, raw, or a prefix >I, <H"
    ),
    Option(
        "chat-echo",
        parse_echo,
        "What counts as the echo: full (default), tag, any, none",
        ("", *ECHO_MODES),
    ),
    Option("chat-encoding", parse_encoding, "Encoding of text: utf-8 (default), cp949, gb18030, …"),
    Option("chat-timeout", parse_timeout, "Seconds for connecting, and for each echo (default 5)"),
    Option("chat-wait", parse_pause, "Seconds between messages: 2, 0.5-2 or 0 (default 1-3)"),
    Option("chat-rate", parse_rate, "Messages a second of each user, in open loop"),
    Option("chat-source", parse_sources, "Local addresses to connect from in turn: A,B,…"),
)


class Settings(NamedTuple):
    """What the options say, or else the user class."""

    addresses: tuple[Address, ...]
    framing: FramingFactory
    echo: EchoMode
    encoding: str
    timeout: float
    pause: Pause | None
    rate: float | None
    sources: tuple[str, ...]
    trace: bool


def given_options(environment: env.Environment) -> dict[str, str]:
    """Return the options of this file that were given, as text, after their checks.

    An empty one is a field of the web form that was left empty.

    :raises SettingError: for a wrong one, and for two that exclude each other
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    texts: dict[str, str] = {}
    for option in OPTIONS:
        text = str(options.get(option.key) or "")
        if text:
            texts[option.key] = option.check(text)
    if "chat_rate" in texts and "chat_wait" in texts:
        raise SettingError(
            f"--chat-rate={texts['chat_rate']} with --chat-wait={texts['chat_wait']}",
            "pair of options",
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
    if user_class.heartbeat is not None:
        parse_heartbeat(user_class.heartbeat)
    return Settings(
        addresses=parse_addresses(environment.host or user_class.host, options.get("tcp_port")),
        framing=parse_framing(options.get("chat_framing") or user_class.framing),
        echo=parse_echo(options.get("chat_echo") or user_class.echo),
        encoding=parse_encoding(options.get("chat_encoding") or user_class.encoding),
        timeout=parse_timeout(options.get("chat_timeout") or user_class.timeout),
        pause=None if pause is None else parse_pause(pause),
        rate=None if rate is None else parse_rate(rate),
        sources=parse_sources(options["chat_source"]) if "chat_source" in options else (),
        trace=bool(getattr(environment.parsed_options, "chat_trace", False)),
    )


USER_NUMBERS: dict[str, Iterator[int]] = {}  # by the name of the class


def next_address(addresses: tuple[Address, ...], user: TCPChatUser) -> Address:
    """Return the server of a new user: those of a class take them in turn.

    Each worker begins with another one.
    """
    runner = user.environment.runner
    first = 0
    if isinstance(runner, (runners.LocalRunner, runners.WorkerRunner)):
        first = max(0, runner.worker_index)
    numbers = USER_NUMBERS.setdefault(type(user).fullname(), itertools.count())
    return addresses[(first + next(numbers)) % len(addresses)]


# -------------------------------------------------------------------------------- Locust's events

default_bucket = stats.bucket_response_time


def bucket_response_time(milliseconds: float) -> float:
    """Keep two digits below 10 ms, where Locust counts whole ms.

    This is Locust's hook for it ("Customizing response time bucketing" in its documentation).
    """
    # ``// 1`` rounds down: several times as fast as round()
    if milliseconds < 0.1:
        return (milliseconds * 1000 + 0.5) // 1 / 1000
    if milliseconds < 1:
        return (milliseconds * 100 + 0.5) // 1 / 100
    if milliseconds < 10:
        return (milliseconds * 10 + 0.5) // 1 / 10
    return default_bucket(milliseconds)


stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]

# The web UI's chart is of all requests together, and every second one is a ``send_chat``, which
# takes microseconds. So these are the median, the 90th and the 98th percentile of the echoes.
stats.PERCENTILES_TO_CHART = [0.75, 0.95, 0.99]


# gevent need not print Ctrl-C as an error of the greenlet that happened to run.
gevent.hub.Hub.NOT_ERROR = (*gevent.hub.Hub.NOT_ERROR, KeyboardInterrupt)


@events.init_command_line_parser.add_listener
def add_options(parser: argument_parser.LocustArgumentParser) -> None:
    """Add this file's options to Locust's."""
    try:
        for option in OPTIONS:
            option.add_to(parser)
    except argparse.ArgumentError:  # a plugin has imported this file, and Locust loads it again
        sys.exit(
            "locust: error: locustfile.py was loaded twice: "
            "list it before its plugins, -f locustfile.py,plugins/verdict.py"
        )
    parser.add_argument(
        "--chat-trace",
        action="store_true",
        env_var="CHAT_TRACE",
        help="Log what the first user of each process sends and receives, passwords included",
    )
    parser.add_argument(
        "--echo-server",
        action="store_true",
        include_in_web_ui=False,
        help="Serve a built-in echo chat server during the test, on --host "
        f"({DEFAULT_HOST}:{DEFAULT_PORT} if none)",
    )


@events.init.add_listener
def prepare(environment: env.Environment, **_: object) -> None:
    """Start the echo server if asked for, and end Locust with one line where a setting is wrong."""
    RUN.environment = environment
    runner = environment.runner
    if isinstance(runner, runners.MasterRunner):
        runner.register_message(END_MESSAGE, on_worker_end)
    options = environment.parsed_options
    if options is None:
        return
    if isinstance(runner, runners.WorkerRunner):
        if os.getpid() != LOADING_PROCESS:
            gevent.spawn(leave_with_master, runner)
        return  # its settings come from the master
    try:
        if options.echo_server:
            start_echo_server(environment, options.tcp_port)
        check_settings(environment, options)
    except (OSError, ValueError) as error:
        refuse_to_start(environment, error)


WORKERS_CONNECT = 10.0  # seconds, at most, that the forked workers of a busy machine may take


def refuse_to_start(environment: env.Environment, reason: object) -> NoReturn:
    """End Locust before the run, with one line, from a listener of ``init``.

    The workers that ``--processes`` has forked connect first: then they see that their master has
    ended (``leave_with_master``). Else Locust would let them look for it for five minutes.
    """
    logging.disable()  # else Locust goes on to tell of workers
    runner = environment.runner
    options = environment.parsed_options
    if isinstance(runner, runners.MasterRunner) and options is not None and options.processes:
        ends_at = perf_counter() + WORKERS_CONNECT
        while len(runner.clients) < options.processes and perf_counter() < ends_at:
            gevent.sleep(0.05)
        gevent.sleep(0.1)  # the acknowledgements are on their way
    sys.exit(f"locust: error: {reason}")


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
            if options.processes or not isinstance(environment.runner, runners.MasterRunner):
                check_sources(settings.sources)
            if any(address.tls for address in settings.addresses):
                make_context = maker_of_tls_context(user_class)
                if not takes_self(make_context):  # a method needs a user
                    tls_context_from(make_context)
            if settings.rate is not None:
                warn_of_tasks_without_pace(user_class)


def check_sources(sources: tuple[str, ...]) -> None:
    """Raise ``SettingError`` for an address that this machine does not have."""
    for source in sources:
        with socket.socket(family_of(source)) as probe:
            try:
                probe.bind((source, 0))
            except OSError:
                instead = "an address that this machine has"
                raise SettingError(source, "source", instead) from None


def warn_of_tasks_without_pace(user_class: type[User]) -> None:
    """Warn of task sets that go on by themselves, whatever the open loop's schedule says."""
    for task_set in task_sets_of(user_class.tasks):
        own_wait = task_set.wait_time is not TaskSet.wait_time
        interrupts = any("interrupt" in names_in(each) for each in task_set.tasks)
        if own_wait or interrupts:
            what = "has a wait_time of its own" if own_wait else "interrupts"
            logger.warning("%s %s: so --chat-rate does not pace its tasks", task_set.__name__, what)


def task_sets_of(tasks: Iterable[object]) -> Iterator[type[TaskSet]]:
    """Yield the task sets among tasks, and those within them, each once."""
    for each in dict.fromkeys(tasks):
        if isinstance(each, type) and issubclass(each, TaskSet):
            yield each
            yield from task_sets_of(each.tasks)


def names_in(function: object) -> tuple[str, ...]:
    """Return the names that the code of a function uses; none where it has no code."""
    code = getattr(function, "__code__", None)
    return code.co_names if isinstance(code, types.CodeType) else ()


@events.test_start.add_listener
def begin_run(environment: env.Environment, **_: object) -> None:
    """Begin the record of a run."""
    RUN.environment = environment
    RUN.reset()
    RUN.start_watching()


@events.report_to_master.add_listener
def report_totals(data: dict[str, object], **_: object) -> None:
    """Send the totals of a worker along with its statistics."""
    data["chat_totals"] = list(RUN.totals())


@events.worker_report.add_listener
def take_totals(client_id: str, data: dict[str, object], **_: object) -> None:
    """Keep what a worker says of its run so far."""
    totals = data.get("chat_totals")
    if isinstance(totals, list):
        RUN.workers[client_id] = Totals(*totals)


@events.test_stopping.add_listener
def expect_reports(environment: env.Environment, **_: object) -> None:
    """Note which workers have to report their end: one that has quit before has left in order."""
    if isinstance(environment.runner, runners.MasterRunner):
        RUN.note_missing(environment.runner)
        RUN.unreported = set(environment.runner.clients)


def on_worker_end(msg: Message, **_: object) -> None:
    """Note that the users of a worker have stopped. Called on the master."""
    RUN.unreported.discard(msg.node_id)


@events.test_stop.add_listener
def end_run(environment: env.Environment, **_: object) -> None:
    """Report the end to the master, or log the result in the web UI."""
    RUN.stop_watching()
    runner = environment.runner
    if isinstance(runner, runners.WorkerRunner):
        # The last rows and totals first: so they are there when the end is reported.
        data: dict[str, object] = {}
        environment.events.report_to_master.fire(client_id=runner.client_id, data=data)
        runner.send_message("stats", data)
        runner.send_message(END_MESSAGE)
    elif not is_headless(environment):
        log_result(environment)


def is_headless(environment: env.Environment) -> bool:
    """Return whether the result is printed at the end of the process, and not logged before."""
    return bool(getattr(environment.parsed_options, "headless", False))


def log_result(environment: env.Environment) -> None:
    """Log the result of a run, as a warning where it has shown nothing of its server."""
    level = logging.WARNING if why_nothing_came(environment) else logging.INFO
    logger.log(level, result_line(environment))


@events.quitting.add_listener
def decide_exit_code(environment: env.Environment, **_: object) -> None:
    """Fail a run in which nobody connected, or echoes were awaited and none came."""
    runner = environment.runner
    if runner is None or isinstance(runner, runners.WorkerRunner):
        return
    runner.stop()  # after Ctrl-C the users of one process are still there
    gevent.sleep(0.01)  # rows that no user waits for are fired by the greenlet pool
    reason = why_nothing_came(environment)
    if reason:
        logger.warning(reason)
        environment.process_exit_code = environment.process_exit_code or 1
    if is_headless(environment):
        RUN.result = result_line(environment)  # with --json, Locust empties its tables in between


@events.quit.add_listener
def print_result(**_: object) -> None:
    """Print the result of a headless run behind Locust's tables."""
    if RUN.result:
        print(RUN.result, file=sys.stderr)


# ------------------------------------------------------------------------------- the sample texts

SENTENCES = (
    "오늘 저녁에 시간 되시면 같이 식사해요 🍜",
    r"""She said "it's 100 % done" & left <smiling> \o/ again""",
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
    "Tom & Jerry: 50% <3",
    "👍",
)
LONG_TEXTS = tuple(
    " ".join(SENTENCES[first:] + SENTENCES[:first]) for first in range(len(SENTENCES))
)
VERY_LONG_TEXTS = tuple(f"{text} {text}" for text in LONG_TEXTS)


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
            "--host",
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

BANNER_TIME = 0.2  # seconds that a server has to greet, before the first message
SHOWN_CHARACTERS = 80  # of what came instead of an echo
RECORDED_BYTES = 10_000  # of it that are kept to find a hint
TLS_ALERT = b"\x15\x03"  # content type and version: RFC 8446, 5.1


class StandaloneRow(NamedTuple):
    """A request event, as the standalone mode prints it."""

    name: str
    milliseconds: float
    size: int
    error: Exception | None


class Standalone:
    """Sends messages without Locust's engine, and prints a line for each."""

    def __init__(self, environment: env.Environment) -> None:
        self._settings = settings_of(ChatClient, environment)
        self._client = ChatClient(environment).client
        self._log_trace = self._client.trace  # where --chat-trace asks for it
        self._client.trace = self._record
        self._received = b""  # since it was cleared
        self._rows: list[StandaloneRow] = []
        self._has_echoes = False  # of messages before
        self._banner = b""  # what the server sent before the first message
        self._hints: set[str] = set()
        environment.events.request.add_listener(self._take_row)

    def _record(self, direction: Literal["sent", "received"], data: bytes) -> None:
        if self._log_trace is not None:
            self._log_trace(direction, data)
        if direction == "received":
            self._received = (self._received + data)[:RECORDED_BYTES]

    def _take_row(
        self,
        name: str,
        response_time: float,
        response_length: int,
        exception: Exception | None,
        **_: object,
    ) -> None:
        self._rows.append(StandaloneRow(name, response_time, response_length, exception))

    def send(self, texts: Sequence[str]) -> int:
        """Send texts, one after the other, until no connection is to be had.

        Return 0 if all came back (were sent, where no echo is awaited), else 1.
        """
        self._print_target()
        times: list[float] = []
        for text in texts:
            if self._client.connected_since is None and not self._client.connect():
                print_error(self._rows[-1])
                break
            if text is texts[0]:
                gevent.sleep(BANNER_TIME)
                self._banner = self._received
            self._received = b""
            echo = self._client.send_chat(text, wait=True)
            row = self._rows[-1]
            if row.error is None:
                self._has_echoes = True
                times.append(row.milliseconds)
                # Escaped, as a terminal acts on some characters that a server can send.
                shown = "" if echo is None else repr(echo[:40])
                print(f"{row.size:5} bytes {row.milliseconds:9.3f} ms  {shown}".rstrip())
            else:
                print_error(row)
                self._print_what_came(row.error)
        self._client.close()
        summary = f"{len(times)} of {len(texts)} messages "
        summary += "sent" if self._settings.echo == "none" else "came back"
        if times:
            summary += f", median {statistics.median(times):.3f} ms"
        print(summary)
        return 0 if len(times) == len(texts) else 1

    def _print_target(self) -> None:
        """Print where it connects, and what it expects there."""
        address = self._settings.addresses[0]
        tls = " with TLS" if address.tls else ""
        framing = name_of_framing(self._settings.framing)
        print(
            f"connecting to {bracketed(address.host)}:{address.port}{tls}, "
            f"framing {framing}, echo {self._settings.echo}"
        )

    def _print_what_came(self, error: Exception) -> None:
        """Print what the server sent instead of the echo, and a hint by what that is."""
        data = self._received
        came = data or self._banner
        text = came.decode(self._client.encoding, "backslashreplace")[:SHOWN_CHARACTERS]
        what = "what came instead" if data else "what came instead before the first message"
        print(f"  {what}: {text!r}" if came else "  nothing came instead")
        hint = self._hint(error, data)
        if hint not in self._hints:
            self._hints.add(hint)
            print(f"  hint: {hint}")

    def _hint(self, error: Exception, data: bytes) -> str:
        """Return what to try, by what came instead of an echo."""
        host, port = self._client.host, self._client.port
        diagnose = f"python plugins/diagnose.py {host} {port} finds out what the server speaks"
        has_tag = self._client.identity.encode() in data
        has_line = b"\n" in data
        if (data or self._banner).startswith(b"HTTP/"):
            return "the server speaks HTTP, which is no chat: is it the right port?"
        if data.startswith(TLS_ALERT):
            return f"the server speaks TLS: use --host=tls://{bracketed(host)}:{port}"
        if isinstance(error, EchoTruncated):
            return "the server cuts the message: to accept that, use --chat-echo=tag"
        if isinstance(error, EchoAltered) and not is_valid(data, self._client.encoding):
            return (
                f"the tag came back with text that is no {self._client.encoding}: "
                "use --chat-encoding=cp949 or what else the server has"
            )
        if isinstance(error, EchoAltered):
            return "the tag came back with other text: use --chat-echo=tag"
        if self._banner or isinstance(error, ConnectionError):
            return diagnose
        if not is_printable(data, self._client.encoding):
            return diagnose
        if has_tag and not has_line:
            return "no line end came: use --chat-framing=raw --chat-echo=tag"
        if has_line and not has_tag and self._has_echoes:
            return (
                "others came back: the server may refuse some texts, "
                "see docs/troubleshooting.md, EchoTimeout, only some texts"
            )
        if has_line and not has_tag:
            return "lines came without the tag: if they are no refusals, use --chat-echo=any"
        return diagnose


def print_error(row: StandaloneRow) -> None:
    """Print what failed."""
    print(f"{row.name} failed after {row.milliseconds:.1f} ms: {row.error!r}")


def name_of_framing(framing: FramingFactory) -> str:
    """Return the name of a framing, as the option has it."""
    for name in ("line", "crlf", "nul", "raw"):
        if parse_framing(name) is framing:
            return name
    if isinstance(framing, functools.partial):
        return str(framing.args[0])  # the format of a length prefix
    return getattr(framing, "__name__", "of its own")


def bracketed(host: str) -> str:
    """Return a host as an address has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_valid(data: bytes, encoding: str) -> bool:
    """Return whether bytes are text in an encoding."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def is_printable(data: bytes, encoding: str) -> bool:
    """Return whether bytes are text without control characters, but for those of a line end."""
    text = data.decode(encoding, "replace")
    return bool(text) and all(c.isprintable() or c in "\r\n\t" for c in text.rstrip("\ufffd"))


def has_port(address: str) -> bool:
    """Return whether an address names a port."""
    match = ADDRESS.fullmatch(address)
    return match is not None and match["port"] is not None


def main(arguments: list[str] | None = None) -> int:
    """Run without Locust's engine: five messages, or the echo server. Return the exit code."""
    parser = argument_parser.LocustArgumentParser(
        description="Send five messages to a TCP chat server, or be one."
    )
    parser.add_argument("address", nargs="?", metavar="host", help="host or host:port")
    parser.add_argument("port", nargs="?", help=f"default TCP_PORT or {DEFAULT_PORT}")
    parser.add_argument("-H", "--host", help=f"the same as host (default {DEFAULT_HOST})")
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.address and options.host:
        parser.error(f"two hosts, {options.address} and {options.host}: give one")
    if options.port and has_port(options.address):
        parser.error(f"two ports, in {options.address} and {options.port}: give one")
    options.host = options.host or options.address or DEFAULT_HOST
    options.tcp_port = options.port or options.tcp_port or str(DEFAULT_PORT)
    if options.chat_trace:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know Korean
    environment = env.Environment(host=options.host, parsed_options=options, events=events)
    try:
        if not options.echo_server:
            texts = (*SHORT_TEXTS[:3], LONG_TEXTS[0], VERY_LONG_TEXTS[0])
            return Standalone(environment).send(texts)
        server = start_echo_server(environment, options.tcp_port)
        address = f"{server.server_host}:{server.server_port}"
        print(f"echo server on {address}, Ctrl-C ends it", flush=True)
        server.serve_forever()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
