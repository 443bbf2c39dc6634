"""One client and its connection: what servers do wrong, connecting again, closing."""

from __future__ import annotations

import gc
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from locust.event import EventHook
from programs import wait_until
from rows import Rows
from servers import Server, answers, deaf, echo, echo_after, free_port, lines, reset, silent

import locustfile
from locustfile import (
    MESSAGE_LIMIT,
    EchoMode,
    Exchange,
    FaultyClient,
    SettingError,
    TCPSocketClient,
)

Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]

LARGE = "x" * 8_000_000  # more than the buffers of the kernel hold


def texts(rows: Rows) -> set[str]:
    """Return the texts of the failures, as Locust counts them."""
    return {repr(row["exception"]) for row in rows if row["exception"]}


# ----------------------------------------------------------------------------- there is no server


def test_a_refused_connection_is_a_failed_connect(connect: Connect, rows: Rows) -> None:
    client = connect(free_port())
    assert client.connect() is False
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect: ConnectionRefusedError": 2}
    assert texts(rows) == {"ConnectionRefusedError(111, 'Connection refused')"}


def test_a_name_that_does_not_resolve_is_a_failed_connect_with_a_fixed_text(
    connect: Connect, rows: Rows
) -> None:
    for host in ("no-such-host.invalid", "another-one.invalid"):
        assert connect(12345, host=host, timeout=3).connect() is False
    assert len(texts(rows)) == 1
    assert ".invalid" not in texts(rows).pop()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """Return the port of a listener whose queue is full: the kernel drops who wants to connect."""
    sockets = [socket.socket()]
    sockets[0].bind(("127.0.0.1", 0))
    sockets[0].listen(0)
    for _ in range(8):
        filler = socket.socket()
        filler.settimeout(0)
        filler.connect_ex(sockets[0].getsockname())
        sockets.append(filler)
    gevent.sleep(0.1)
    yield sockets[0].getsockname()[1]
    for sock in sockets:
        sock.close()


def test_a_black_hole_is_a_failed_connect_at_the_timeout(
    black_hole: int, connect: Connect, rows: Rows
) -> None:
    assert connect(black_hole, timeout=0.6).connect() is False
    assert rows.counts() == {"connect: TimeoutError": 1}
    assert 600 <= rows[0]["response_time"] < 6000  # the kernel would try for two minutes


def test_a_wrong_setting_is_a_failed_connect_that_says_it(
    connect: Connect, request_event: EventHook, rows: Rows
) -> None:
    request_event.add_listener(lambda **row: rows.append(row))
    fault = SettingError("http://x", "--host=host:port")
    assert FaultyClient(request_event, fault).connect() is False
    assert texts(rows) == {"SettingError(\"'http://x' will not do: write --host=host:port\")"}


# ------------------------------------------------------------------------------ the server stalls


def test_a_server_that_never_answers_times_out_each_time_on_one_connection(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(silent)
    client = connect(server.port, timeout=0.2)
    for _ in range(3):
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response: EchoTimeout": 3}
    assert all(200 <= row["response_time"] < 5000 for row in rows.named("echo_response"))
    assert server.opened == 1


def test_one_deadline_covers_the_exchange_however_the_bytes_trickle(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            for byte in line + b"\n":  # all of it takes three seconds
                connection.sendall(bytes([byte]))
                gevent.sleep(0.05)

    connect(serve(server).port, timeout=0.4).send_chat("hello" * 10)
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoTimeout": 1}


def test_a_server_that_never_reads_fails_the_send_at_the_deadline(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(deaf).port, timeout=0.4)
    assert client.send_chat(LARGE) is None
    assert rows.counts() == {"connect": 1, "send_chat: TimeoutError": 1}
    assert rows[-1]["response_time"] >= 400
    assert client.connected_since is None  # half a message has gone out


@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_large_message_to_a_slow_reader_goes_out_whole(
    serve: Serve, connect: Connect, rows: Rows, mode: EchoMode
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        gevent.sleep(0.2)
        while data := connection.recv(1 << 20):
            received.extend(data)
            connection.sendall(b"noise, not the answer\n")

    client = connect(serve(server).port, echo=mode, timeout=60)
    sender = gevent.spawn(client.send_chat, LARGE)
    wait_until(lambda: received.endswith(b"\n"))
    client.close()
    sender.join()
    assert rows.counts() == {"connect": 1, "send_chat": 1}
    assert rows.named("send_chat")[0]["response_length"] == len(received)
    assert LARGE.encode() in received


def test_an_answer_before_the_end_of_the_message_counts_once_all_is_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1) + b" is what I answer\n")
        gevent.sleep(0.2)
        while data := connection.recv(1 << 20):
            received.extend(data)

    client = connect(serve(server).port, echo="any", timeout=60)
    assert client.send_chat(LARGE) == "x is what I answer"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
    sending = rows.named("send_chat")[0]["response_time"]
    assert rows.named("echo_response")[0]["response_time"] < sending
    wait_until(lambda: len(received) == len(LARGE))


def test_the_event_loop_rests_after_a_large_message(serve: Serve, connect: Connect) -> None:
    connect(serve(silent).port, echo="none", timeout=60).send_chat(LARGE)
    gevent.sleep(0.2)
    iterations = gevent.get_hub().loop.iteration
    gevent.sleep(0.2)
    assert gevent.get_hub().loop.iteration - iterations < 50


def test_an_answer_does_not_excuse_a_server_that_never_takes_the_rest_of_the_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1) + b" is what I answer\n")
        deaf(connection)

    client = connect(serve(server).port, echo="any", timeout=0.3)
    assert client.send_chat(LARGE) is None
    assert rows.counts() == {"connect": 1, "send_chat: TimeoutError": 1}
    assert rows[-1]["response_time"] >= 300
    assert rows[-1]["response_length"] == len(LARGE) + 1


# -------------------------------------------------------------------------------- the server ends


def test_a_server_that_resets_while_it_is_sent_to_fails_the_send_at_once(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        gevent.sleep(0.2)
        reset(connection)

    assert connect(serve(server).port, timeout=60).send_chat(LARGE) is None
    (row,) = rows[1:]
    assert row["name"] == "send_chat"
    assert isinstance(row["exception"], ConnectionError)  # and no time-out
    assert row["response_time"] >= 150


@pytest.mark.parametrize("mode", ["full", "any"])
def test_a_server_that_answers_and_hangs_up_before_it_has_read_all_fails_the_send(
    serve: Serve, connect: Connect, rows: Rows, mode: EchoMode
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(512) + b"\n")
        gevent.sleep(0.2)

    client = connect(serve(server).port, echo=mode, timeout=60)
    assert client.send_chat(LARGE) is None
    (row,) = (row for row in rows if row["exception"])
    assert row["name"] == "send_chat"
    assert isinstance(row["exception"], ConnectionError)


def test_a_server_that_closes_mid_message_fails_the_echo_and_the_next_message_connects_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(next(lines(connection))[:10])

    client = connect(serve(server).port)
    for _ in range(2):
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response: ConnectionClosed": 2}
    assert texts(rows) == {"ConnectionClosed('The server closed the connection.')"}


def test_a_server_that_resets_mid_message_fails_the_echo(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        next(lines(connection))
        reset(connection)

    connect(serve(server).port).send_chat("hello")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: ConnectionResetError": 1}
    assert texts(rows) == {"ConnectionResetError(104, 'Connection reset by peer')"}


def test_a_connection_that_ends_fails_all_that_is_in_flight_with_its_own_error(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        received = lines(connection)
        for _ in range(3):
            next(received)
        reset(connection)

    client = connect(serve(server).port)
    client.connect()
    assert client.send_chat("not waited for", wait=False) is None
    gevent.joinall([gevent.spawn(client.send_chat, "hello", echo=echo) for echo in ("full", "any")])
    wait_until(lambda: len(rows) == 7)
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response: ConnectionResetError": 3}


def test_a_server_that_closes_while_idle_is_a_failed_disconnect_and_the_next_message_connects_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(next(lines(connection)) + b"\n")

    client = connect(serve(server).port)
    for count in (1, 2):
        assert client.send_chat("hello") is not None
        wait_until(lambda count=count: len(rows.named("disconnect")) == count)  # type: ignore[misc]
    expected = {"connect": 2, "send_chat": 2, "echo_response": 2, "disconnect: ConnectionClosed": 2}
    assert rows.counts() == expected
    for row in rows.named("disconnect"):
        assert row["response_time"] == row["response_length"] == 0


def test_a_connection_that_is_lost_before_the_message_is_sent_fails_the_sending(
    connect: Connect, rows: Rows
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(listener.getsockname()[1], echo="any")
        client.connect()
        listener.accept()[0].close()  # nothing has let the event loop run since
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat: ConnectionClosed": 1}
    assert rows[-1]["response_time"] == 0


def test_after_a_time_out_of_an_untagged_message_the_others_in_flight_fail_as_closed(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(silent).port, timeout=0.5)
    client.connect()
    untagged = gevent.spawn(client.send_chat, "untagged", echo="any")
    gevent.sleep(0.2)
    client.send_chat("tagged")
    untagged.join()
    assert rows.counts()["echo_response: EchoTimeout"] == 1
    assert rows.counts()["echo_response: ConnectionClosed"] == 1


# --------------------------------------------------------------------------- the server is hostile


def test_a_flood_without_a_delimiter_ends_the_connection_and_memory_stays_bounded(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    flooded: list[int] = []

    def server(connection: socket.socket) -> None:
        next(lines(connection))
        while len(flooded) < 100:
            connection.sendall(b"x" * 1_000_000)
            flooded.append(1)

    client = connect(serve(server).port)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: MessageTooLong": 1}
    assert client.connected_since is None
    assert len(flooded) < 20


def test_a_flood_while_idle_is_a_failed_disconnect(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"x" * (MESSAGE_LIMIT + 100_000))

    connect(serve(server).port).connect()
    wait_until(lambda: rows.named("disconnect"))
    assert rows.counts() == {"connect": 1, "disconnect: MessageTooLong": 1}


def test_a_length_prefix_that_lies_fails_the_echo_at_once(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"\xff\xff\xff\xff")
        deaf(connection)

    connect(serve(server).port, framing=">I").send_chat("hello")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: MessageTooLong": 1}


def test_hostile_bytes_do_not_get_into_an_error_text(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            tag = line.split(b" ")[0]
            connection.sendall(tag + b" \xff\xfe\x1b[31m" + str(number).encode() + b"\n")

    client = connect(serve(server).port)
    for _ in range(3):
        client.send_chat("hello")
    assert texts(rows) == {"EchoAltered('The echo is not what was sent.')"}


def test_a_listener_that_blocks_does_no_harm_to_the_event_loop(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    client = connect(serve(lambda connection: gevent.sleep(0.1)).port)
    reported: list[str] = []

    def listener(name: str, **row: Any) -> None:
        gevent.sleep(0.05)
        reported.append(name)

    request_event.add_listener(listener)
    client.connect()
    wait_until(lambda: "disconnect" in reported)
    assert reported == ["connect", "disconnect"]


# -------------------------------------------------------------------------------------- the login


def test_a_login_that_loses_the_connection_does_not_connect_again_by_itself(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def login() -> None:
        for _ in range(3):
            client.send_chat("LOGIN", echo="any")

    def server(connection: socket.socket) -> None:
        next(lines(connection))

    server_ = serve(server)
    client: TCPSocketClient = connect(server_.port, on_connect=login)
    assert client.send_chat("hello") is None
    assert server_.opened == 1
    assert rows.counts() == {"connect": 1, "send_chat": 1, "login: ConnectionClosed": 1}


def test_a_login_that_raises_closes_the_connection_and_the_task_sees_the_error(
    serve: Serve, connect: Connect
) -> None:
    def login() -> None:
        raise LookupError("no password for this user")

    server = serve(echo)
    client = connect(server.port, on_connect=login)
    with pytest.raises(LookupError):
        client.send_chat("hello")
    wait_until(lambda: server.opened == 1 and server.open == 0)


@pytest.mark.parametrize("error", [PermissionError("refused"), ValueError("refused")])
def test_a_login_that_is_refused_is_a_failed_login_and_is_tried_again_ever_later(
    serve: Serve, connect: Connect, rows: Rows, error: Exception
) -> None:
    def login() -> None:
        assert client.send_chat("LOGIN", echo="any")  # it is answered, so this resets no back-off
        raise error

    server = serve(echo)
    client: TCPSocketClient = connect(server.port, on_connect=login)
    limit = time.monotonic() + 1.5
    while time.monotonic() < limit:
        assert client.send_chat("hello") is None
    refused = rows.counts()[f"login: {type(error).__name__}"]
    assert 2 <= refused <= 12
    assert rows.counts()["connect"] == refused == server.opened
    wait_until(lambda: server.open == 0)


# ------------------------------------------------------------------------------- connecting again


@pytest.fixture
def longest_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chance take every pause for as long as it can be."""
    monkeypatch.setattr("random.uniform", lambda shortest, longest: longest)


def seconds_of(action: Callable[[], object], times: int = 1) -> float:
    """Return how long it takes to do something so many times."""
    started = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - started


@pytest.mark.usefixtures("longest_pauses")
def test_the_pauses_between_attempts_double(connect: Connect) -> None:
    client = connect(free_port())
    assert seconds_of(client.connect, 5) >= 0.1 + 0.2 + 0.4 + 0.8


@pytest.mark.usefixtures("longest_pauses")
def test_the_pauses_do_not_grow_for_ever(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locustfile, "LONGEST_PAUSE", 0.2)
    client = connect(free_port())
    assert seconds_of(client.connect, 11) < 0.1 + 9 * 0.2 + 20  # without the limit, 100 seconds


def test_users_do_not_come_back_together(connect: Connect) -> None:
    port = free_port()
    moments: list[float] = []

    def attempt(client: TCPSocketClient) -> None:
        for _ in range(3):
            client.connect()
        moments.append(time.perf_counter())

    gevent.joinall([gevent.spawn(attempt, connect(port)) for _ in range(30)])
    assert max(moments) - min(moments) > 0.05  # of up to 0.3


@pytest.mark.usefixtures("longest_pauses")
def test_an_echo_starts_the_pauses_anew(serve: Serve, connect: Connect) -> None:
    port = free_port()
    client = connect(port)
    assert seconds_of(client.connect, 5) >= 1.5
    server = serve(echo, port)
    assert client.send_chat("hello") is not None
    server.stop()
    wait_until(lambda: client.connected_since is None)
    assert seconds_of(client.connect) < 1.6  # 0.1; without the echo it were 3.2 seconds


@pytest.mark.usefixtures("longest_pauses")
def test_a_connection_that_lasted_starts_the_pauses_anew(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locustfile, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(locustfile, "LONGEST_PAUSE", 1.0)
    port = free_port()
    client = connect(port)
    assert seconds_of(client.connect, 8) >= 1.27
    server = serve(lambda connection: gevent.sleep(1.5), port)
    assert client.connect()
    wait_until(lambda: client.connected_since is None)
    server.stop()
    assert seconds_of(client.connect, 3) < 2.0  # 0.07; three times the longest pause otherwise


def test_a_server_that_accepts_and_closes_is_not_stormed(serve: Serve, connect: Connect) -> None:
    server = serve(lambda connection: None)
    client = connect(server.port)
    limit = time.monotonic() + 1.5
    while time.monotonic() < limit:
        client.send_chat("hello")
    assert 2 <= server.opened <= 12


def test_a_server_that_comes_up_again_is_connected_again(serve: Serve, connect: Connect) -> None:
    first = serve(echo)
    client = connect(first.port)
    assert client.send_chat("hello") is not None
    first.stop()
    assert client.send_chat("hello") is None
    serve(echo, first.port)
    wait_until(lambda: client.send_chat("hello") is not None)


def test_several_greenlets_share_one_attempt_also_when_it_fails(
    connect: Connect, rows: Rows
) -> None:
    client = connect(free_port())
    users = [gevent.spawn(client.send_chat, "hello") for _ in range(10)]
    assert [user.get() for user in users] == [None] * 10
    assert rows.counts() == {"connect: ConnectionRefusedError": 1}


# ---------------------------------------------------------------------------- closing and stopping


def test_connect_when_connected_does_nothing(serve: Serve, connect: Connect, rows: Rows) -> None:
    client = connect(serve(echo).port)
    assert client.connect() is client.connect() is True
    assert rows.counts() == {"connect": 1}


def test_connected_since_says_when_and_nothing_while_there_is_no_connection(
    serve: Serve, connect: Connect
) -> None:
    client = connect(serve(echo).port)
    assert client.connected_since is None
    before = time.perf_counter()
    client.connect()
    assert client.connected_since is not None
    assert before < client.connected_since < time.perf_counter()
    client.close()
    assert client.connected_since is None


def test_close_can_be_called_at_any_time_and_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(echo)
    client = connect(server.port)
    client.close()
    client.connect()
    client.close()
    client.close()
    assert client.send_chat("hello") is not None  # connects again
    client.close()
    wait_until(lambda: server.open == 0)
    assert rows.counts() == {"connect": 2, "send_chat": 1, "echo_response": 1}


def test_after_an_own_close_no_message_in_flight_has_an_echo_row(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received = Event()

    def server(connection: socket.socket) -> None:
        connection.recv(1)
        received.set()
        silent(connection)

    client = connect(serve(server).port)
    waiting = gevent.spawn(client.send_chat, "hello")
    received.wait(60)
    client.close()
    assert waiting.get(timeout=60) is None
    assert rows.counts() == {"connect": 1, "send_chat": 1}


def test_a_greenlet_that_is_stopped_mid_message_has_no_echo_row_and_the_connection_goes_on(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            gevent.sleep(0.2)
            connection.sendall(line + b"\n")

    server_ = serve(server)
    client = connect(server_.port)
    user = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: received)
    user.kill()
    assert str(client.send_chat("still of use")).endswith("still of use")
    assert server_.opened == server_.open == 1
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 1}


def test_a_greenlet_that_is_stopped_before_its_message_is_sent_sends_and_reports_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received: list[bytes] = []
    server = serve(lambda connection: received.extend(lines(connection)))
    client = connect(server.port)
    client.connect()
    user = gevent.spawn(client.send_chat, "hello")
    # The event loop runs this once the message is handed over, before it sends.
    gevent.get_hub().loop.run_callback(user.throw, gevent.GreenletExit)
    user.join()
    assert client.send_chat("still of use", echo="none") is None
    client.close()
    wait_until(lambda: server.open == 0)
    assert rows.counts() == {"connect": 1, "send_chat": 1}
    assert [line.endswith(b"still of use") for line in received] == [True]


def exchanges_in_memory() -> int:
    """Return how many messages anything still refers to."""
    gc.collect()
    return sum(isinstance(thing, Exchange) for thing in gc.get_objects())


def test_messages_that_have_ended_are_forgotten_however_they_ended(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    before = exchanges_in_memory()
    client = connect(serve(echo_after(0.01)).port, timeout=60)
    late = connect(serve(answers(b"no echo\n")).port, timeout=0.01)
    for _ in range(20):
        client.send_chat("echoed")
        client.send_chat("nothing awaited", echo="none")
        client.send_chat("not waited for", wait=False)
        late.send_chat("timed out")
        stopped = gevent.spawn(client.send_chat, "stopped")
        gevent.sleep(0.001)
        stopped.kill()
    wait_until(lambda: rows.counts()["send_chat"] == 100)
    assert exchanges_in_memory() - before < 5  # a greenlet may hold what woke it last
    assert client.connected_since is not None
    assert late.connected_since is not None


# ----------------------------------------------------- in the middle of connecting and of sending


def test_a_listener_of_the_connect_row_may_use_the_client(
    serve: Serve, connect: Connect, rows: Rows, request_event: EventHook
) -> None:
    client = connect(serve(echo).port)
    echoes: list[object] = []

    def greet(name: str, **_: Any) -> None:
        if name == "connect":
            echoes.append(client.send_chat("hello"))

    request_event.add_listener(greet)
    with gevent.Timeout(60):
        assert client.connect()
    assert str(echoes[0]).endswith("hello")


def test_a_login_that_closes_instead_of_raising_is_not_made_in_a_storm(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    clients: list[TCPSocketClient] = []
    client = connect(serve(silent).port, on_connect=lambda: clients[0].close())
    clients.append(client)
    started = time.perf_counter()
    for _ in range(4):
        assert client.connect() is False
    assert time.perf_counter() - started >= 0.1 + 0.2 + 0.4  # the pauses between them


def test_no_login_is_made_on_a_connection_that_has_ended_already(
    serve: Serve, connect: Connect, rows: Rows, request_event: EventHook
) -> None:
    def wait_for_the_end(name: str, **_: Any) -> None:
        if name == "connect":
            wait_until(lambda: client.connected_since is None)

    logins: list[int] = []
    client = connect(serve(lambda connection: None).port, on_connect=lambda: logins.append(1))
    request_event.add_listener(wait_for_the_end)
    assert client.connect() is False
    assert logins == []


def test_what_is_handed_over_goes_out_before_an_own_close(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received: list[bytes] = []
    client = connect(serve(lambda connection: received.extend(lines(connection))).port)
    client.connect()
    client.send_chat("/quit", echo="none", wait=False)
    client.close()
    wait_until(lambda: received == [b"/quit"])
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 1})


def test_the_next_message_connects_after_a_close_in_the_middle_of_an_attempt(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port)
    attempt = gevent.spawn(client.connect)
    gevent.sleep(0)  # it is under way
    client.close()
    assert str(client.send_chat("hello")).endswith("hello")
    assert attempt.get(timeout=60) is False


def test_what_came_before_the_kernel_took_an_untagged_message_is_not_its_answer(
    serve: Serve, connect: Connect
) -> None:
    may_read = Event()

    def server(connection: socket.socket) -> None:
        connection.sendall(b"said before\n")
        may_read.wait()
        for line in lines(connection):
            if line == b"question":
                connection.sendall(b"answer\n")

    client = connect(serve(server).port, timeout=60)
    client.connect()
    client.send_chat(LARGE, echo="none", wait=False)
    question = gevent.spawn(client.send_chat, b"question", echo="any")
    gevent.sleep(0.1)  # what was said before has come, and the kernel is full
    may_read.set()
    assert question.get(timeout=60) == b"answer"


class Careless:
    """A framing that returns text instead of bytes."""

    def encode(self, payload: bytes) -> str:
        return payload.decode()

    def feed(self, data: bytes) -> list[bytes]:
        return [data]


def test_a_framing_that_returns_no_bytes_is_an_error_of_the_caller(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port, framing=Careless)
    with pytest.raises(TypeError):
        client.send_chat("hello")
    assert rows.counts() == {"connect": 1}
