"""Refusals without a tag, heartbeats, encodings, several servers, the trace, what rows say."""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import ssl
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import pytest
from certificates import Context, secure
from clients import Connect, Inbox, at_once, text_of
from gevent.event import Event
from locust import constant, task
from locust.event import EventHook
from programs import ROOT, STANDALONE, Start, rows_of, wait_until
from rows import Rows, RunUsers
from servers import (
    Answers,
    Handler,
    Serve,
    after,
    echo,
    hang_up,
    lines,
    port_of,
    says,
    with_the_line,
)

from locustfile import (
    LONG_TEXTS,
    SHORT_TEXTS,
    VERY_LONG_TEXTS,
    ChatClient,
    SettingError,
    TCPChatUser,
    TCPSocketClient,
)

# ----------------------------------------------------------------------------- refusals


class Refusing:
    """A handler that refuses lines with ``no`` in them, without their tag, and echoes others.

    It answers when it is let go on.
    """

    def __init__(self) -> None:
        self.go_on = Event()
        self.go_on.set()
        self.chat = Answers(self._answer)

    def _answer(self, line: bytes) -> bytes:
        self.go_on.wait()
        if b"no" in line:
            return b"ERR flood\n"
        return with_the_line(line)


def is_error(payload: bytes) -> bool:
    """Return whether the server has refused something."""
    return payload.startswith(b"ERR ")


def test_a_refusal_that_nobody_awaits_fails_the_message_at_once_and_is_taken(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    heard = Inbox()
    client = connect(
        serve(Refusing().chat).port,
        timeout=600,
        is_refusal=is_error,
        on_message=heard.take,
    )
    assert client.send_chat("no") is None
    assert client.send_chat("yes") is not None  # over the same connection
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 2,
        "echo_response: EchoRefused": 1,
        "echo_response": 1,
    }
    refused, _ = rows.named("echo_response")
    assert refused["response_length"] == len("ERR flood")
    assert heard == []


def test_a_refusal_fails_the_oldest_that_awaits_an_echo_and_its_echo_goes_to_on_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    heard = Inbox()
    refusing = Refusing()
    refusing.go_on.clear()
    client = connect(
        serve(refusing.chat).port,
        timeout=600,
        is_refusal=is_error,
        on_message=heard.take,
    )
    client.send_chat("nothing awaited, said no to", echo="none")
    client.send_chat("the oldest", wait=False, name="oldest")
    client.send_chat("the next", wait=False, name="next")
    wait_until(lambda: refusing.chat.received)
    refusing.go_on.set()
    wait_until(lambda: heard and len(rows) == 6)
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 3,
        "oldest: EchoRefused": 1,
        "next": 1,
    }
    (payload,) = heard
    assert text_of(payload) == "the oldest"


@pytest.mark.parametrize("names", [("tagged", "untagged"), ("untagged", "tagged")])
def test_the_oldest_is_refused_whether_it_has_a_tag_or_not(
    serve: Serve, connect: Connect, rows: Rows, names: tuple[str, str]
) -> None:
    refusing = Refusing()
    refusing.go_on.clear()
    server = serve(refusing.chat)
    client = connect(server.port, timeout=600, is_refusal=is_error)
    echoes = {"tagged": None, "untagged": lambda line: line == b"never"}
    for name in names:
        client.send_chat("no", echo=echoes[name], wait=False, name=name)
        wait_until(lambda: rows.named("connect"))
        gevent.sleep(0)
    refusing.go_on.set()
    wait_until(lambda: len(rows.failures()) == 2)
    first, second = names
    assert rows.failures() == [f"{first}: EchoRefused", f"{second}: EchoRefused"]


def test_an_untagged_message_can_be_refused_before_its_function_is_true(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(Refusing().chat)
    client = connect(server.port, timeout=600, is_refusal=is_error)
    answer = client.send_chat(b"no login", echo=lambda line: line == b"welcome")
    assert answer is None
    assert rows.failures() == ["echo_response: EchoRefused"]
    assert client.send_chat("yes") is not None


def test_a_refusal_while_nothing_is_in_flight_goes_to_on_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    heard = Inbox()
    client = connect(
        serve(Refusing().chat).port,
        is_refusal=is_error,
        on_message=heard.take,
    )
    client.send_chat("no", echo="none")
    wait_until(lambda: heard == [b"ERR flood"])
    assert rows.failures() == []


# ----------------------------------------------------------------------------- heartbeat


class Patient(TCPChatUser):
    """Sends heartbeats; logs in slowly, and has nothing to say."""

    heartbeat = 0.02
    wait_time = constant(600)
    errors = 0

    def on_connect(self) -> None:
        """Take several times as long as a heartbeat."""
        gevent.sleep(0.3)
        self.client.send_chat(b"LOGIN", echo="any")

    def on_heartbeat(self) -> None:
        """Say something; fail every second time."""
        self.client.send_chat(b"PING", echo="none", name="ping")
        self.errors += 1
        if self.errors % 2:
            raise LookupError("no such heartbeat")


def test_heartbeats_begin_after_the_login_go_on_after_an_error_and_end_with_the_connection(
    serve: Serve, run_users: RunUsers
) -> None:
    connections: list[list[bytes]] = []
    is_first_over = Event()

    def server(connection: socket.socket) -> None:
        mine: list[bytes] = []
        connections.append(mine)
        for line in lines(connection):
            mine.append(line)
            if line == b"LOGIN":
                connection.sendall(b"welcome\n")
            if len(connections) == 1 and len(mine) == 4:
                break

    class Reconnecting(Patient):
        """Connects again where its connection has ended."""

        @task
        def come_back(self) -> None:
            is_first_over.wait()
            self.client.connect()

    running = serve(server)
    chat = run_users(Reconnecting, running.address)
    wait_until(lambda: running.opened == 1)
    wait_until(lambda: running.open == 0)
    (received,) = connections
    assert len(received) == 4
    gevent.sleep(0.2)  # ten heartbeats, if they went on
    assert running.opened == 1
    is_first_over.set()
    wait_until(lambda: len(connections) == 2 and len(connections[1]) >= 4)
    chat.runner.quit()
    wait_until(lambda: running.open == 0)
    for received in connections:
        assert received[0] == b"LOGIN"
        assert set(received[1:]) == {b"PING"}
    assert "no such heartbeat" in str(chat.runner.exceptions)
    assert chat.count("ping") >= 6


@pytest.mark.parametrize("loop", [{"chat_wait": "0.01"}, {"chat_rate": "100"}])
def test_a_user_without_a_heartbeat_sends_none(
    serve: Serve, run_users: RunUsers, loop: dict[str, str]
) -> None:
    class Quiet(ChatClient):
        """Has a heartbeat that it does not ask for."""

        def on_heartbeat(self) -> None:
            self.client.send_chat(b"PING", echo="none")

    answers = Answers(with_the_line)
    chat = run_users(Quiet, serve(answers).address, **loop)
    wait_until(lambda: chat.count("echo_response") > 20)
    assert b"PING" not in answers.received


# ----------------------------------------------------------------------------- nul


def test_nul_framing_ends_messages_with_a_nul_byte_and_carries_none_within(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received = b""
    heard = Inbox()

    def server(connection: socket.socket) -> None:
        nonlocal received
        while data := connection.recv(65536):
            received += data
            if received.endswith(b"\0"):
                connection.sendall(b"two\nlines\0")
                connection.sendall(received + b"cut ")
                connection.sendall(b"off\0")

    client = connect(serve(server).port, framing="nul", on_message=heard.take)
    with pytest.raises(ValueError, match="NUL"):
        client.send_chat("a\0b")
    echoed = client.send_chat("first\nsecond")
    assert text_of(echoed) == "first\nsecond"
    wait_until(lambda: heard == [b"two\nlines", b"cut off"])
    assert received.count(b"\0") == 1
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


# ----------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(("encoding", "keeps_emoji"), [("cp949", False), ("gb18030", True)])
def test_an_encoding_is_that_of_text_both_ways_and_what_it_lacks_is_a_question_mark(
    serve: Serve, run_users: RunUsers, encoding: str, keeps_emoji: bool
) -> None:
    texts: list[str] = []
    returned: list[str | bytes | None] = []

    def through_text(line: bytes) -> bytes:
        text = line.decode(encoding)
        texts.append(text)
        return with_the_line(text.encode(encoding))

    class Talker(TCPChatUser):
        """Says one text after the other."""

        wait_time = constant(0)
        said = iter((*SHORT_TEXTS, *LONG_TEXTS, *VERY_LONG_TEXTS, *["the end"] * 1000))

        def expected(self, tag: str, message: str) -> str:
            return f"{tag}] {message}"

        @task
        def say(self) -> None:
            text = next(self.said)
            returned.append(self.client.send_chat(text))

    server = serve(Answers(through_text))
    chat = run_users(Talker, server.address, chat_encoding=encoding)
    wait_until(lambda: "the end" in str(returned[-1:]))
    chat.runner.stop()
    assert not chat.errors
    everything = " ".join(texts)
    noodles = "🍜" if keeps_emoji else "?"
    assert f"점심 드셨어요? {noodles}" in everything
    assert ("👍" in everything) is keeps_emoji
    count = len(SHORT_TEXTS)
    assert returned[:count] == texts[:count]


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-32", "utf-7", "cp037", "hz", "base64", "rot13", "nonsense", "a\0b"]
)
def test_an_encoding_that_does_not_keep_ascii_or_that_is_none_is_refused(
    request_event: EventHook, run_users: RunUsers, encoding: str
) -> None:
    with pytest.raises(SettingError, match="one that keeps ASCII as it is, such as utf-8"):
        TCPSocketClient("127.0.0.1", 1, request_event, encoding=encoding)
    chat = run_users(ChatClient, "127.0.0.1:1", chat_encoding=encoding)
    wait_until(lambda: chat.errors)
    assert "keeps ASCII" in str(chat.errors)


@pytest.mark.together
def test_an_encoding_is_refused_on_the_command_line_with_one_line(start: Start) -> None:
    running = start(*STANDALONE, "--chat-encoding=utf-16")
    assert running.ends() == 2
    assert "'utf-16' is not a valid encoding: use one that keeps ASCII" in running.output
    assert "Traceback" not in running.output


# ----------------------------------------------------------------------------- several servers


def test_users_take_several_servers_in_turn(serve: Serve, run_users: RunUsers) -> None:
    first = serve(echo)
    second = serve(echo)
    third = serve(echo)
    chat = run_users(
        ChatClient,
        f"{first.address},tcp://{second.address},127.0.0.1",
        users=9,
        tcp_port=str(third.port),
        chat_wait="0.02",
    )
    wait_until(lambda: first.opened + second.opened + third.opened == 9)
    wait_until(lambda: chat.count("echo_response") > 30)
    assert not chat.errors
    urls = {row["url"] for row in chat.rows}
    assert urls == {first.address, second.address, third.address}
    for server in (first, second, third):
        assert server.open == 3


def test_a_user_stays_with_its_server_when_it_connects_again(
    serve: Serve, run_users: RunUsers
) -> None:
    class Restless(ChatClient):
        """Connects again and again."""

        wait_time = constant(0)

        @task(10)
        def come_back(self) -> None:
            self.client.close()
            self.client.connect()
            ports.add((id(self), self.client.port))

    ports: set[tuple[int, int]] = set()
    first = serve(echo)
    second = serve(echo)
    chat = run_users(Restless, f"{first.address},{second.address}", users=2)
    wait_until(lambda: first.opened > 5)
    wait_until(lambda: second.opened > 5)
    chat.runner.stop()
    ports_of_users = sorted(port for _, port in ports)
    assert ports_of_users == sorted([first.port, second.port])


@pytest.mark.parametrize("host", ["127.0.0.1:1,", "127.0.0.1:1,,127.0.0.1:2", "127.0.0.1:1,a b"])
def test_a_wrong_one_among_several_servers_is_refused(run_users: RunUsers, host: str) -> None:
    chat = run_users(ChatClient, host)
    wait_until(lambda: chat.errors)
    assert "is not a valid --host: use host:port" in str(chat.errors)


# ----------------------------------------------------------------------------- the trace


def test_the_trace_is_of_one_user_escaped_cut_and_shows_what_lacks_its_end(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"\x1b[31mlogin: ")  # without the end of a line
        echo(connection)

    class Member(ChatClient):
        """Logs in with a long password."""

        def on_connect(self) -> None:
            self.client.send_chat(b"PASS " + b"x" * 300, echo="any")

    caplog.set_level(logging.INFO)
    chat = run_users(
        Member,
        serve(server).address,
        users=5,
        is_recorded=True,
        chat_trace="1",
        chat_wait="0.01",
    )
    wait_until(lambda: chat.count("echo_response") > 100)
    chat.runner.stop()
    warning, *shown = [text for text in caplog.messages if text.startswith("trace: ")]
    assert "passwords included" in warning
    assert "PASS xxx" in shown[0]
    assert shown[0].endswith("' and 106 bytes more")  # with the end of the line
    for text in shown:
        assert re.match(r"trace: +(sent|received) ", text)
        assert len(text) < 4 * 200 + 60
    everything = " ".join(shown)
    assert " sent " in everything
    assert r" received '\x1b[31mlogin: " in everything
    identities = re.findall(r"\[([0-9a-f]{8})\.\d+\]", everything)
    assert len(set(identities)) == 1
    assert re.search(r"\\xec\\x95\\x88|\\xf0\\x9f", everything)
    assert "\x1b" not in everything


def test_without_the_option_nothing_is_traced(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    chat = run_users(ChatClient, serve(echo).address, is_recorded=True, chat_wait="0.01")
    wait_until(lambda: chat.count("echo_response") > 10)
    assert "trace" not in caplog.text


# ----------------------------------------------------------------------------- logged_in_since


def test_logged_in_since_is_when_on_connect_had_ended_and_nothing_before_and_after(
    serve: Serve, connect: Connect
) -> None:
    within: list[float | None] = []

    def log_in() -> None:
        within.append(client.logged_in_since)
        assert client.connected_since is not None
        client.send_chat(b"login", echo="any")
        gevent.sleep(0.05)
        within.append(client.logged_in_since)

    client = connect(serve(echo).port, on_connect=log_in)
    assert client.logged_in_since is None
    for _ in range(2):
        assert client.connect()
        assert within == [None, None]
        assert client.connected_since is not None
        assert client.logged_in_since is not None
        assert client.logged_in_since >= client.connected_since + 0.05
        assert client.logged_in_since <= time.perf_counter()
        client.close()
        assert client.logged_in_since is None
        within.clear()


def test_logged_in_since_is_nothing_after_a_refused_login(serve: Serve, connect: Connect) -> None:
    def log_in() -> None:
        raise PermissionError("not let in")

    client = connect(serve(echo).port, on_connect=log_in)
    assert not client.connect()
    assert client.logged_in_since is None


# ----------------------------------------------------------------------------- one failure each


def reset_at_once(connection: socket.socket) -> None:
    """Close a connection with a reset, without letting the event loop run."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    plain_socket = gevent.monkey.get_original("socket", "socket")
    plain_socket(fileno=connection.detach()).close()


@pytest.mark.parametrize("is_reset", [False, True], ids=["hang-up", "reset"])
@pytest.mark.parametrize(
    "message",
    [
        {"message": "/command"},
        {"message": b"binary"},
        {"message": "hello", "echo": "any"},
        {"message": "hello", "echo": lambda line: True},
        {"message": "hello", "echo": "none"},
        {"message": "hello"},
    ],
    ids=["command", "bytes", "any", "function", "none", "tagged"],
)
def test_a_hang_up_that_a_message_meets_before_it_is_read_is_one_failure(
    connect: Connect, rows: Rows, message: dict[str, Any], is_reset: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(port_of(listener), timeout=60)
        assert client.connect()
        connection, _ = listener.accept()
        if is_reset:
            reset_at_once(connection)
        else:
            connection.shutdown(socket.SHUT_RDWR)
        client.send_chat(**message)
        wait_until(lambda: client.connected_since is None)
        assert client.connect()  # by now all of the first connection is reported
        gevent.sleep(0.05)
        assert len(rows.failures()) == 1, rows.counts()


@pytest.mark.parametrize(
    "server",
    [
        says(b"ERR server full\n"),
        after(1, says(b"ERR no\n")),
        after(1, hang_up),
    ],
    ids=["at once", "after the login", "silently"],
)
def test_a_server_that_hangs_up_on_a_login_is_one_failure_a_connection(
    serve: Serve, connect: Connect, rows: Rows, server: Handler
) -> None:
    def log_in() -> None:
        answer = client.send_chat("login", echo=lambda line: line == b"welcome")
        if answer is None:
            raise PermissionError("no login")

    client = connect(serve(server).port, timeout=60, on_connect=log_in)
    for _ in range(4):
        assert not client.connect()
    gevent.sleep(0.05)
    assert rows.counts()["connect"] == 4
    assert len(rows.failures()) == 4, rows.counts()


def test_each_refused_login_is_a_row_also_while_the_failure_of_the_last_is_reported(
    serve: Serve, connect: Connect, rows: Rows, request_event: EventHook
) -> None:
    """The first login hands its message over, and is hung up on; a listener delays that row."""
    go_on = Event()

    def delay(exception: Exception | None, **_: object) -> None:
        if isinstance(exception, ConnectionError):
            go_on.wait()

    def log_in() -> None:
        client.send_chat("login", wait=False)
        logins.append(1)
        if len(logins) > 1:
            raise PermissionError("not let in")

    logins: list[int] = []
    request_event.add_listener(delay)
    server = serve(after(1, hang_up))
    client = connect(server.port, timeout=60, on_connect=log_in)
    client.connect()
    wait_until(lambda: client.connected_since is None)
    for _ in range(3):
        assert not client.connect()
    go_on.set()
    wait_until(lambda: len(rows.failures()) >= 4)
    gevent.sleep(0.05)
    assert sorted(rows.failures()) == [
        "login: ConnectionClosed",
        "login: PermissionError",
        "login: PermissionError",
        "login: PermissionError",
    ]


JUNK_LOGIN = """
import os
import locustfile

class Member(locustfile.ChatClient):
    timeout = 60
    numbers = iter(range(10**6))

    def on_connect(self):
        number = next(self.numbers)
        said = self.client.send_chat(b"login", echo="any")
        if number % 3 == 0:
            said.decode()
        kind = OSError if number % 3 == 1 else ValueError
        raise kind(f"{number}: " + said.decode("latin-1"))
"""


def with_junk(line: bytes) -> bytes:
    """Answer a line with a control character and what is no UTF-8, and never twice the same."""
    junk = os.urandom(900).hex().encode()
    return b"\xff\x1b=cmd|" + junk + b"\n"


@pytest.mark.together
def test_what_a_login_raises_is_told_bounded_escaped_and_in_few_kinds(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """Also without docstrings, which ``-OO`` takes away."""
    (tmp_path / "junk.py").write_text(JUNK_LOGIN)
    server = serve(Answers(with_junk))
    running = start(
        *(sys.executable, "-OO", "-m", "locust"),
        *("-f", f"{ROOT}/locustfile.py,junk.py", "Member"),
        f"--host={server.address}",
        *("--headless", "--users=60", "--spawn-rate=60", "--run-time=3s"),
        *("--only-summary", "--loglevel=ERROR"),
        cwd=tmp_path,
    )
    assert running.ends() == 1
    assert rows_of(running.output)["login"].failures >= 60
    _, _, report = running.output.partition("Error report")
    assert re.fullmatch(r"[ -~\n…]+", report)  # escaped, but for the mark of what was cut
    kinds = re.findall(r"^ *(\d+) +TCP login: (.*)$", report, re.MULTILINE)
    assert 1 <= len(kinds) <= 40
    occurrences = 0
    for count, text in kinds:
        occurrences += int(count)
        assert len(text) < 200
    assert occurrences >= 60
    assert re.search("TCP login: .*UnicodeDecodeError.*invalid start byte", report)
    assert "Traceback" not in running.output


# ----------------------------------------------------------------------------- small promises


def test_a_login_that_joins_senders_of_its_own_ends_in_a_row(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    sent: list[object] = []

    def log_in() -> None:
        sent.extend(at_once(client.send_chat, ["hello", "hello"]))

    chat = Answers(with_the_line)
    client = connect(serve(chat).port, timeout=0.5, on_connect=log_in)
    with gevent.Timeout(60):
        client.connect()
    assert sent == [None, None]
    assert set(rows.failures()) == {"login: TimeoutError"}
    assert min(rows.times("login")) >= 500
    assert chat.received == []


@pytest.mark.parametrize("error", [gevent.Timeout, gevent.GreenletExit, LookupError])
def test_an_echo_function_that_raises_whatever_it_is_ends_its_connection_alone(
    serve: Serve, connect: Connect, rows: Rows, error: type[BaseException]
) -> None:
    def fails(line: bytes) -> bool:
        raise error("secret")

    port = serve(echo).port
    other = connect(port, timeout=60)
    client = connect(port, timeout=60)
    assert other.connect()
    assert client.send_chat("hello", echo=fails) is None
    assert rows.failures() == ["echo_response: EchoFunctionError"]
    assert "secret" not in repr(rows[-1]["exception"])
    assert client.connected_since is None
    assert other.connected_since is not None
    assert other.send_chat("hello") is not None
    assert client.send_chat("hello") is not None


@pytest.mark.parametrize("kind", ["method", "function", "static method"])
def test_tls_context_may_be_a_method_or_a_function(
    serve: Serve,
    run_users: RunUsers,
    trusting: Context,
    identity: ssl.SSLContext,
    kind: str,
) -> None:
    """A function makes one context for all users, a method one for each."""
    made: list[object] = []

    def make(owner: object) -> ssl.SSLContext:
        made.append(owner)
        return trusting()

    def method(user: TCPChatUser) -> ssl.SSLContext:
        return make(user)

    def function() -> ssl.SSLContext:
        return make(None)

    kinds = {
        "method": method,
        "function": function,
        "static method": staticmethod(function),
    }
    secure_class = type("Secure", (ChatClient,), {"tls_context": kinds[kind]})
    server = serve(secure(echo, identity))
    chat = run_users(secure_class, f"tls://{server.address}", users=3, chat_wait="0.01")
    wait_until(lambda: chat.count("echo_response") > 20)
    assert not chat.errors
    if kind == "method":
        assert len(made) == len(set(made)) == 3
        assert all(isinstance(owner, ChatClient) for owner in made)
    else:
        assert made == [None]


@pytest.mark.parametrize("composed", [None, 5, ["text"], bytearray(b"text")])
@pytest.mark.parametrize("hook", ["compose", "expected"])
def test_a_compose_that_returns_neither_text_nor_bytes_is_an_error_and_nothing_is_sent(
    serve: Serve, connect: Connect, rows: Rows, composed: object, hook: str
) -> None:
    if hook == "expected" and composed is None:
        pytest.skip("it means all that was sent")
    chat = Answers(with_the_line)
    client = connect(serve(chat).port, **{hook: lambda tag, message: composed})
    with pytest.raises(ValueError, match="return text or bytes"):
        client.send_chat("hello")
    assert client.send_chat(b"fine", echo="any") == b"fine"
    assert chat.received == [b"fine"]
    assert rows.failures() == []


def test_a_message_of_exactly_the_limit_comes_back_and_one_byte_more_is_too_long(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(
        serve(echo).port,
        timeout=60,
        compose=lambda tag, message: tag + message,
    )
    limit = 1024 * 1024
    size = limit - len(f"{client.identity}.1")
    echoed = client.send_chat("x" * size)
    assert len(str(echoed)) == limit
    assert rows.failures() == []
    client.send_chat("x" * (size + 2))
    assert rows.failures() == ["echo_response: MessageTooLong"]


def test_the_characters_that_servers_stumble_over_come_back_as_they_were(
    serve: Serve, connect: Connect
) -> None:
    text = r"""& < > " ' \ % %s \n &amp; 100% 'a"b' <b> C:\new \x00"""
    built_in_texts = "".join(SHORT_TEXTS + LONG_TEXTS)
    for sign in "&<>\"'\\%":
        assert sign in built_in_texts
    client = connect(serve(echo).port)
    echoed = client.send_chat(text)
    assert text_of(echoed) == text


def test_every_row_has_context_url_response_and_the_time_of_its_begin(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for line in itertools.islice(lines(connection), 2):
            gevent.sleep(0.05)
            connection.sendall(with_the_line(line))
        connection.recv(65536)  # and hang up

    def log_in() -> None:
        client.send_chat(b"login", echo="any")

    seen: dict[str, object] = {"account": 7}
    began = time.time()
    client = connect(
        serve(server).port,
        timeout=60,
        context=lambda: seen,
        on_connect=log_in,
    )
    client.send_chat("hello")
    client.send_chat("bye", echo="none")
    wait_until(lambda: rows.named("disconnect"))
    ended = time.time()
    assert rows.names() == [
        "connect",
        "send_chat",
        "login",
        "send_chat",
        "echo_response",
        "send_chat",
        "disconnect",
    ]
    for row in rows:
        assert row["request_type"] == "TCP"
        assert row["context"] == seen
        assert row["url"] == f"127.0.0.1:{client.port}"
        assert row["response"] is None
        assert isinstance(row["response_length"], int)
        row_began = row["start_time"]
        row_ended = row_began + row["response_time"] / 1000
        assert began - 0.01 <= row_began
        assert row_ended <= ended + 0.01
    (login,) = rows.named("login")
    (echoed,) = rows.named("echo_response")
    assert login["response_time"] >= 50
    assert echoed["response_time"] >= 50
    assert echoed["start_time"] >= login["start_time"] + 0.045


def test_on_echo_has_each_good_echo_after_its_row_with_the_tag_if_there_is_one(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    taken: list[tuple[str, bytes]] = []
    times: list[float] = []
    last_rows: list[str] = []

    def on_echo(tag: str, payload: bytes, arrived: float) -> None:
        taken.append((tag, payload))
        times.append(arrived)
        last_rows.append(rows[-1]["name"])

    def answer(line: bytes) -> bytes:
        return line.replace(b"] bad", b"] changed") + b"\n"

    before = time.perf_counter()
    client = connect(serve(Answers(answer)).port, on_echo=on_echo)
    client.send_chat("good")
    client.send_chat("bad")
    client.send_chat("untagged", echo="any")
    client.send_chat(b"binary")
    client.send_chat("not awaited", echo="none")
    client.send_chat("not waited for", wait=False)
    wait_until(lambda: len(taken) == 4)
    name = client.identity
    assert taken == [
        (f"{name}.1", f"[{name}.1] good".encode()),
        ("", b"untagged"),
        ("", b"binary"),
        (f"{name}.4", f"[{name}.4] not waited for".encode()),
    ]
    assert last_rows == ["echo_response"] * 4
    moments = [before, *times, time.perf_counter()]
    assert moments == sorted(moments)


@pytest.mark.together
def test_error_texts_are_there_without_docstrings(start: Start, serve: Serve) -> None:
    coming = iter(("cut", "altered", "hang up", "good", "good"))

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            match next(coming):
                case "cut":
                    connection.sendall(line[:-1] + b"\n")
                case "altered":
                    connection.sendall(line[:-1] + b"?\n")
                case "good":
                    connection.sendall(line + b"\n")
                case _:
                    return

    running = start(sys.executable, "-OO", *STANDALONE[1:], serve(server).address)
    assert running.ends() == 1
    assert "EchoTruncated('The echo ends before the message does.')" in running.output
    assert "EchoAltered('The echo is not what was sent.')" in running.output
    assert "ConnectionClosed('The server closed the connection.')" in running.output
    assert "2 of 5 messages came back" in running.output
