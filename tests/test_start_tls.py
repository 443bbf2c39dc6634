"""``start_tls``: TLS from the middle of a connection on, and the ways in which it fails."""

from __future__ import annotations

import logging
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from certificates import Context, secure, server_context
from clients import Connect, Inbox, text_of
from gevent.event import Event
from programs import wait_until
from rows import Rows, RunUsers
from servers import (
    Answers,
    Handler,
    Serve,
    deaf,
    echo,
    hang_up,
    lines,
    reset,
    send_garbage,
    silent,
    with_the_line,
)

from locustfile import TCPChatUser, TCPSocketClient


def agrees(
    then: Handler, go_ahead: bytes = b"OK\n", before: Callable[[], object] = lambda: None
) -> Handler:
    """Return a handler that reads one line, agrees, and does what another one does."""

    def handler(connection: socket.socket) -> None:
        next(lines(connection))
        connection.sendall(go_ahead)
        before()
        then(connection)

    return handler


def ask(client: TCPSocketClient) -> object:
    """Ask for TLS; return what the server says."""
    return client.send_chat(b"STARTTLS", echo=is_answer)


def is_answer(line: bytes) -> bool:
    """Return whether the server has said yes or no."""
    return line in (b"OK", b"NO")


class Login:
    """An ``on_connect`` that asks for TLS, and keeps what ``start_tls`` returned each time."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.client: TCPSocketClient
        self.returned: list[bool] = []
        self._before = before

    def __call__(self) -> None:
        """Log in."""
        if ask(self.client) != b"OK":
            raise PermissionError("no TLS")
        self._before()
        is_secure = self.client.start_tls()
        self.returned.append(is_secure)
        if not is_secure:
            raise PermissionError("TLS failed")


@pytest.fixture
def log_in(connect: Connect, trusting: Context) -> Callable[..., TCPSocketClient]:
    """Return a function that makes a client of a port, whose login is the one given."""

    def make(port: int, login: Login, **keywords: Any) -> TCPSocketClient:
        login.client = connect(port, on_connect=login, tls_context=trusting, **keywords)
        return login.client

    return make


LogIn = Callable[..., TCPSocketClient]


# ----------------------------------------------------------------------------- it works


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("framing", ["line", "crlf"])
def test_messages_go_over_tls_after_the_servers_go_ahead(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext, version: Any, framing: str
) -> None:
    identity.maximum_version = version
    login = Login()
    server = serve(agrees(secure(echo, identity)))
    client = log_in(server.port, login, framing=framing)
    several_records = "x" * 100_000
    for text in ("안녕하세요 👋", several_records):
        echoed = client.send_chat(text)
        assert text_of(echoed) == text
    assert login.returned == [True]
    assert rows.counts() == {
        "connect": 1,
        "login": 1,
        "starttls": 1,
        "send_chat": 3,
        "echo_response": 2,
    }
    (row,) = rows.named("starttls")
    assert row["response_time"] > 0
    assert row["response_length"] == 0


def test_it_may_begin_wherever_nothing_is_in_flight(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context, identity: ssl.SSLContext
) -> None:
    server = serve(agrees(secure(echo, identity)))
    client = connect(server.port, tls_context=trusting)
    assert ask(client) == b"OK"
    assert client.start_tls()
    assert client.send_chat("hello") is not None
    assert rows.counts()["starttls"] == 1


def shake_hands_and_say(text: bytes, context: ssl.SSLContext) -> Handler:
    """Return a handler that sends the end of the handshake and a text together."""

    def handler(connection: socket.socket) -> None:
        received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(received, to_send, server_side=True)
        is_done = False
        while not is_done:
            try:
                tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                connection.sendall(to_send.read())
                received.write(connection.recv(65536))
        tls.write(text)
        connection.sendall(to_send.read())
        silent(connection)

    return handler


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_the_server_says_together_with_the_end_of_the_handshake_is_handled(
    serve: Serve, log_in: LogIn, identity: ssl.SSLContext, version: Any
) -> None:
    identity.maximum_version = version
    heard = Inbox()
    greeting = shake_hands_and_say(b"welcome\nto the room\n", identity)
    server = serve(agrees(greeting))
    client = log_in(server.port, Login(), on_message=heard.take)
    assert client.connect()
    wait_until(lambda: heard == [b"welcome", b"to the room"])


def test_a_message_handed_over_during_the_handshake_goes_over_tls(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context, identity: ssl.SSLContext
) -> None:
    go_on = Event()
    answers = Answers(with_the_line)
    server = serve(agrees(secure(answers, identity), before=go_on.wait))
    client = connect(server.port, timeout=600, tls_context=trusting)
    assert ask(client) == b"OK"
    starting = gevent.spawn(client.start_tls)
    gevent.sleep(0)
    client.send_chat("hello", wait=False)
    gevent.sleep(0.05)
    go_on.set()
    assert starting.get(timeout=60)
    wait_until(lambda: rows.counts()["echo_response"] == 2)
    (received,) = answers.received
    assert text_of(received) == "hello"


def test_every_connection_begins_without_tls_and_gets_its_own(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext
) -> None:
    login = Login()
    server = serve(agrees(secure(echo, identity)))
    client = log_in(server.port, login)
    assert client.send_chat("hello") is not None
    client.close()
    assert client.send_chat("hello again") is not None
    assert login.returned == [True, True]
    assert rows.counts()["starttls"] == 2


def test_the_trace_shows_what_was_sent_before_it_was_encrypted(
    serve: Serve,
    run_users: RunUsers,
    trusting: Context,
    identity: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Member(TCPChatUser):
        tls_context = staticmethod(trusting)

        def on_connect(self) -> None:
            assert ask(self.client) == b"OK"
            assert self.client.start_tls()
            self.client.send_chat(b"PASS secret", echo="any")

    caplog.set_level(logging.INFO)
    server = serve(agrees(secure(echo, identity)))
    run_users(Member, server.address, is_recorded=True, chat_trace="1")
    wait_until(lambda: caplog.text.count("PASS secret") == 2)
    shown = re.findall(r"(sent|received) +'(\S+)", caplog.text)
    assert shown[:4] == [
        ("sent", r"STARTTLS\n'"),
        ("received", r"OK\n'"),
        ("sent", "PASS"),
        ("received", "PASS"),
    ]


# ----------------------------------------------------------------------------- it fails


def in_the_handshake(ending: Handler) -> Handler:
    """Return a handler that waits for the begin of a handshake, and does what another one does."""

    def handler(connection: socket.socket) -> None:
        connection.recv(65536)  # all of it: closing with the rest unread would be a reset
        ending(connection)

    return handler


def refuse_late(connection: socket.socket) -> None:
    connection.sendall(b"secret: no TLS here\n")
    silent(connection)


def check_failure(rows: Rows, login: Login, error: str) -> None:
    """See that the login has failed once, by the row ``starttls``, with no text of the server's."""
    assert login.returned == [False]
    assert login.client.connected_since is None
    gevent.sleep(0.05)  # for a row too many
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login": 1,
        f"starttls: {error}": 1,
    }
    (row,) = rows.named("starttls")
    assert row["response_length"] == 0
    text = repr(row["exception"])
    assert "secret" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("ending", [hang_up, reset, send_garbage, refuse_late])
def test_a_handshake_that_breaks_off_is_a_failed_starttls_and_a_closed_connection(
    serve: Serve, log_in: LogIn, rows: Rows, ending: Handler
) -> None:
    login = Login()
    server = serve(agrees(in_the_handshake(ending)))
    client = log_in(server.port, login, timeout=60)
    assert not client.connect()
    (row,) = rows.named("starttls")
    error = row["exception"]
    assert isinstance(error, OSError)
    check_failure(rows, login, type(error).__name__)
    wait_until(lambda: server.open == 0)


def test_a_hang_up_before_the_handshake_is_one_failure(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    is_over = Event()

    def server(connection: socket.socket) -> None:
        next(lines(connection))
        connection.sendall(b"OK\n")
        connection.shutdown(socket.SHUT_RDWR)
        is_over.set()

    login = Login(is_over.wait)
    client = log_in(serve(server).port, login, timeout=60)
    assert not client.connect()
    gevent.sleep(0.05)  # for a row too many
    assert login.returned == [False]
    assert len(rows.failures()) == 1


def test_a_handshake_that_never_ends_fails_at_the_timeout(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    login = Login()
    server = serve(agrees(silent))
    client = log_in(server.port, login, timeout=1)
    with gevent.Timeout(60):
        assert not client.connect()
    check_failure(rows, login, "TimeoutError")
    assert min(rows.times("starttls")) >= 1000
    wait_until(lambda: server.open == 0)


def test_a_certificate_of_another_name_fails_it(
    serve: Serve, log_in: LogIn, rows: Rows, certificates: Path
) -> None:
    login = Login()
    identity = server_context(certificates / "other.pem")
    server = serve(agrees(secure(echo, identity)))
    client = log_in(server.port, login)
    assert not client.connect()
    check_failure(rows, login, "SSLCertVerificationError")
    (text,) = rows.error_texts()
    assert "IP address mismatch" in text
    wait_until(lambda: server.open == 0)


def test_a_server_that_says_no_is_a_failed_login_and_not_a_failed_starttls(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    login = Login()
    server = serve(agrees(silent, go_ahead=b"NO\n"))
    client = log_in(server.port, login)
    assert not client.connect()
    assert login.returned == []
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login": 1,
        "login: PermissionError": 1,
    }


def test_the_next_message_after_a_failure_begins_anew(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext
) -> None:
    endings = iter((in_the_handshake(send_garbage), secure(echo, identity)))

    def handler(connection: socket.socket) -> None:
        ending = next(endings)
        ending(connection)

    login = Login()
    server = serve(agrees(handler))
    client = log_in(server.port, login)
    assert client.send_chat("hello") is None
    assert client.send_chat("hello") is not None
    assert login.returned == [False, True]
    assert rows.counts()["starttls"] == 1


# ----------------------------------------------------------------------------- injected plain text
# CVE-2011-0411: what an attacker puts behind the go-ahead must not count as said over TLS.


@pytest.mark.parametrize("handles", [False, True], ids=["dropped", "handed to on_message"])
@pytest.mark.parametrize("injected", [b"secret\n", b"secr", b"\n"], ids=["line", "half", "empty"])
@pytest.mark.parametrize("is_one_read", [True, False], ids=["same read", "a moment later"])
def test_plain_text_behind_the_go_ahead_fails_it_before_the_handshake(
    serve: Serve, log_in: LogIn, rows: Rows, handles: bool, injected: bytes, is_one_read: bool
) -> None:
    received: list[bytes] = []
    is_asked = Event()
    is_sent = Event()
    heard = Inbox()

    def server(connection: socket.socket) -> None:
        if not is_one_read:
            is_asked.wait()
            connection.sendall(injected)
        is_sent.set()
        while data := connection.recv(65536):
            received.append(data)

    def let_it_come() -> None:
        is_asked.set()
        is_sent.wait()
        if handles and injected.endswith(b"\n"):
            wait_until(lambda: heard)

    login = Login(let_it_come)
    go_ahead = b"OK\n" + (injected if is_one_read else b"")
    hooks = {"on_message": heard.take} if handles else {}
    listening = serve(agrees(server, go_ahead=go_ahead))
    client = log_in(listening.port, login, timeout=60, **hooks)
    assert not client.connect()
    check_failure(rows, login, "PlaintextAfterStartTLS")
    wait_until(lambda: listening.open == 0)
    assert received == []  # not even the begin of a handshake


def test_plain_text_before_the_go_ahead_does_no_harm(
    serve: Serve, log_in: LogIn, identity: ssl.SSLContext
) -> None:
    heard = Inbox()
    server = serve(agrees(secure(echo, identity), go_ahead=b"welcome\nOK\n"))
    client = log_in(server.port, Login(), on_message=heard.take)
    assert client.send_chat("hello") is not None
    assert heard == [b"welcome"]


# ----------------------------------------------------------------------------- wrong calls


def test_it_is_an_error_of_the_caller_while_a_message_is_in_flight(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context
) -> None:
    go_on = Event()

    def server(connection: socket.socket) -> None:
        line = next(lines(connection))
        go_on.wait()
        connection.sendall(with_the_line(line))
        silent(connection)

    client = connect(serve(server).port, timeout=60, tls_context=trusting)
    client.send_chat("hello", wait=False)
    for _ in range(2):  # handed over, and on its way
        with pytest.raises(ValueError, match="in flight"):
            client.start_tls()
        wait_until(lambda: rows.counts()["connect"] == 1)
        gevent.sleep(0.05)
    go_on.set()
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1})
    assert client.connected_since is not None


def test_it_is_an_error_of_the_caller_to_begin_twice(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext
) -> None:
    server = serve(agrees(secure(echo, identity)))
    client = log_in(server.port, Login())
    assert client.connect()
    with pytest.raises(ValueError, match="once"):
        client.start_tls()
    assert client.send_chat("hello") is not None
    assert rows.counts()["starttls"] == 1


def test_it_is_an_error_of_the_caller_where_the_connection_began_with_tls(
    serve: Serve, connect: Connect, rows: Rows, identity: ssl.SSLContext, trusting: Context
) -> None:
    server = serve(secure(echo, identity))
    client = connect(server.port, tls=trusting)
    assert client.connect()
    with pytest.raises(ValueError, match="once"):
        client.start_tls()
    assert client.send_chat("hello") is not None
    assert "starttls" not in rows.counts()


def test_a_greenlet_that_is_stopped_in_the_handshake_leaves_no_connection(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    login = Login()
    server = serve(agrees(deaf))
    client = log_in(server.port, login, timeout=60)
    connecting = gevent.spawn(client.connect)
    wait_until(lambda: rows.counts()["login"] == 1)
    gevent.sleep(0.05)
    connecting.kill()
    assert client.connected_since is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "login": 1}
