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
from clients import Connect
from gevent.event import Event
from programs import wait_until
from rows import Rows, RunUsers
from servers import Handler, Serve, deaf, echo, lines, reset, silent, with_the_line

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
    return client.send_chat(b"STARTTLS", echo=lambda line: line in (b"OK", b"NO"))


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
        self.returned.append(self.client.start_tls())
        if not self.returned[-1]:
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
    assert str(client.send_chat("안녕하세요 👋")).endswith("안녕하세요 👋")
    assert str(client.send_chat("x" * 100_000)).endswith("x" * 100_000)  # several records
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
    client = connect(serve(agrees(secure(echo, identity))).port, tls_context=trusting)
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
    heard: list[bytes] = []
    server = serve(agrees(shake_hands_and_say(b"welcome\nto the room\n", identity)))
    client = log_in(server.port, Login(), on_message=lambda payload, arrived: heard.append(payload))
    assert client.connect()
    wait_until(lambda: heard == [b"welcome", b"to the room"])


def test_a_message_handed_over_during_the_handshake_goes_over_tls(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context, identity: ssl.SSLContext
) -> None:
    go_on = Event()
    received: list[bytes] = []

    def server(connection: ssl.SSLSocket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(with_the_line(line))

    handler = agrees(secure(server, identity), before=go_on.wait)
    client = connect(serve(handler).port, timeout=600, tls_context=trusting)
    assert ask(client) == b"OK"
    starting = gevent.spawn(client.start_tls)
    gevent.sleep(0)
    client.send_chat("hello", wait=False)
    gevent.sleep(0.05)
    go_on.set()
    assert starting.get(timeout=60)
    wait_until(lambda: rows.counts()["echo_response"] == 2)
    assert [line.partition(b"] ")[2] for line in received] == [b"hello"]


def test_every_connection_begins_without_tls_and_gets_its_own(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext
) -> None:
    login = Login()
    client = log_in(serve(agrees(secure(echo, identity))).port, login)
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
            if ask(self.client) != b"OK" or not self.client.start_tls():
                raise PermissionError("no TLS")
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


def send_garbage(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"\x1b[31mHTTP/1.1 400 Bad Request secret\r\n\r\n")
    silent(connection)


def refuse_late(connection: socket.socket) -> None:
    connection.recv(1)
    connection.sendall(b"secret: no TLS here\n")
    silent(connection)


def hang_up(connection: socket.socket) -> None:
    connection.recv(1)
    connection.close()


def reset_it(connection: socket.socket) -> None:
    connection.recv(1)
    reset(connection)


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
    assert "secret" not in repr(row["exception"])
    assert "\x1b" not in repr(row["exception"])


@pytest.mark.parametrize("ending", [hang_up, reset_it, send_garbage, refuse_late])
def test_a_handshake_that_breaks_off_is_a_failed_starttls_and_a_closed_connection(
    serve: Serve, log_in: LogIn, rows: Rows, ending: Handler
) -> None:
    login = Login()
    server = serve(agrees(ending))
    assert not log_in(server.port, login, timeout=60).connect()
    error = rows.named("starttls")[0]["exception"]
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
    assert not log_in(serve(server).port, login, timeout=60).connect()
    gevent.sleep(0.05)  # for a row too many
    assert login.returned == [False]
    assert sum(row["exception"] is not None for row in rows) == 1


def test_a_handshake_that_never_ends_fails_at_the_timeout(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    login = Login()
    server = serve(agrees(silent))
    with gevent.Timeout(60):
        assert not log_in(server.port, login, timeout=1).connect()
    check_failure(rows, login, "TimeoutError")
    assert rows.named("starttls")[0]["response_time"] >= 1000
    wait_until(lambda: server.open == 0)


def test_a_certificate_of_another_name_fails_it(
    serve: Serve, log_in: LogIn, rows: Rows, certificates: Path
) -> None:
    login = Login()
    server = serve(agrees(secure(echo, server_context(certificates / "other.pem"))))
    assert not log_in(server.port, login).connect()
    check_failure(rows, login, "SSLCertVerificationError")
    assert "IP address mismatch" in repr(rows.named("starttls")[0]["exception"])
    wait_until(lambda: server.open == 0)


def test_a_server_that_says_no_is_a_failed_login_and_not_a_failed_starttls(
    serve: Serve, log_in: LogIn, rows: Rows
) -> None:
    login = Login()
    assert not log_in(serve(agrees(silent, go_ahead=b"NO\n")).port, login).connect()
    assert login.returned == []
    assert rows.counts() == {"connect": 1, "send_chat": 1, "login": 1, "login: PermissionError": 1}


def test_the_next_message_after_a_failure_begins_anew(
    serve: Serve, log_in: LogIn, rows: Rows, identity: ssl.SSLContext
) -> None:
    endings = iter((send_garbage, secure(echo, identity)))
    login = Login()
    client = log_in(serve(agrees(lambda connection: next(endings)(connection))).port, login)
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
    is_asked, is_sent = Event(), Event()
    heard: list[bytes] = []

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

    def keep(payload: bytes, arrived: float) -> None:
        heard.append(payload)

    login = Login(let_it_come)
    go_ahead = b"OK\n" + (injected if is_one_read else b"")
    hooks = {"on_message": keep} if handles else {}
    handler = serve(agrees(server, go_ahead=go_ahead))
    assert not log_in(handler.port, login, timeout=60, **hooks).connect()
    check_failure(rows, login, "PlaintextAfterStartTLS")
    wait_until(lambda: handler.open == 0)
    assert received == []  # not even the begin of a handshake


def test_plain_text_before_the_go_ahead_does_no_harm(
    serve: Serve, log_in: LogIn, identity: ssl.SSLContext
) -> None:
    heard: list[bytes] = []
    handler = agrees(secure(echo, identity), go_ahead=b"welcome\nOK\n")
    client = log_in(
        serve(handler).port, Login(), on_message=lambda payload, arrived: heard.append(payload)
    )
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
    client = log_in(serve(agrees(secure(echo, identity))).port, Login())
    assert client.connect()
    with pytest.raises(ValueError, match="once"):
        client.start_tls()
    assert client.send_chat("hello") is not None
    assert rows.counts()["starttls"] == 1


def test_it_is_an_error_of_the_caller_where_the_connection_began_with_tls(
    serve: Serve, connect: Connect, rows: Rows, identity: ssl.SSLContext, trusting: Context
) -> None:
    client = connect(serve(secure(echo, identity)).port, tls=trusting)
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
