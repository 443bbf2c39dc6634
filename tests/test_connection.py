"""One client and its connection: what servers do wrong, connecting again, closing."""

from __future__ import annotations

import gc
import socket
import time
from typing import Any

import gevent
import pytest
from clients import Connect, at_once, text_of
from gevent.event import Event
from locust.event import EventHook
from programs import wait_until
from rows import Rows
from servers import (
    Answers,
    Serve,
    after,
    black_hole,
    deaf,
    echo,
    echo_after,
    echo_bytewise,
    echo_once,
    free_port,
    hang_up,
    lines,
    port_of,
    reset,
    says,
    silent,
    with_nothing,
)

import locustfile
from locustfile import (
    MESSAGE_LIMIT,
    EchoMode,
    Exchange,
    MisconfiguredClient,
    SettingError,
    TCPSocketClient,
)

LARGE = "x" * 8_000_000  # more than the buffers of the kernel hold


# ----------------------------------------------------------------------------- there is no server


def test_a_refused_connection_is_a_failed_connect(connect: Connect, rows: Rows) -> None:
    client = connect(free_port())
    assert client.connect() is False
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect: ConnectionRefusedError": 2}
    assert rows.error_texts() == {"ConnectionRefusedError(111, 'Connection refused')"}


def test_a_name_that_does_not_resolve_is_a_failed_connect_with_a_fixed_text(
    connect: Connect, rows: Rows
) -> None:
    for host in ("no-such-host.invalid", "another-one.invalid"):
        client = connect(12345, host=host, timeout=3)
        assert client.connect() is False
    (text,) = rows.error_texts()
    assert ".invalid" not in text


@pytest.fixture
def longest_delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of how long each delay between two attempts could be; none takes any time."""
    longest_delays: list[float] = []

    def shortest_of(shortest: float, longest: float) -> float:
        assert shortest == 0
        longest_delays.append(longest)
        return shortest

    monkeypatch.setattr("random.uniform", shortest_of)
    return longest_delays


def test_a_black_hole_is_a_failed_connect_at_the_timeout(connect: Connect, rows: Rows) -> None:
    with black_hole() as port:
        client = connect(port, timeout=0.6)
        assert client.connect() is False
    assert rows.counts() == {"connect: TimeoutError": 1}
    assert 500 <= rows[0]["response_time"] < 6000  # the kernel would try for two minutes


def test_a_wrong_setting_is_a_failed_connect_that_says_it(
    connect: Connect, request_event: EventHook, rows: Rows
) -> None:
    request_event.add_listener(lambda **row: rows.append(row))
    fault = SettingError("http://x", "--host", "host:port")
    assert MisconfiguredClient(request_event, fault).connect() is False
    (text,) = rows.error_texts()
    assert text == "SettingError(\"'http://x' is not a valid --host: use host:port\")"


# ------------------------------------------------------------------------------ the server stalls


def test_a_server_that_never_answers_times_out_each_time_on_one_connection(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(silent)
    client = connect(server.port, timeout=0.2)
    for _ in range(3):
        assert client.send_chat("hello") is None
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 3,
        "echo_response: EchoTimeout": 3,
    }
    for echo_time in rows.times("echo_response"):
        assert 200 <= echo_time < 5000
    assert server.opened == 1


def test_messages_that_began_one_after_the_other_time_out_one_after_the_other(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(silent).port, timeout=0.4)
    client.connect()
    client.send_chat("first", wait=False)
    gevent.sleep(0.2)
    assert client.send_chat("second") is None
    wait_until(lambda: rows.counts()["echo_response: EchoTimeout"] == 2)
    assert min(rows.times("echo_response")) >= 400


def test_one_deadline_covers_the_exchange_however_the_bytes_trickle(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    all_in_three_seconds = echo_bytewise(0.05)
    server = serve(all_in_three_seconds)
    connect(server.port, timeout=0.4).send_chat("hello" * 10)
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: EchoTimeout": 1,
    }


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
    (row,) = rows.named("send_chat")
    assert row["response_length"] == len(received)
    assert LARGE.encode() in received


def answer_the_first_byte(connection: socket.socket) -> None:
    """Answer before the message is there."""
    byte = connection.recv(1)
    connection.sendall(byte + b" is what I answer\n")


def test_an_answer_before_the_end_of_the_message_counts_once_all_is_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        answer_the_first_byte(connection)
        gevent.sleep(0.2)
        while data := connection.recv(1 << 20):
            received.extend(data)

    client = connect(serve(server).port, echo="any", timeout=60)
    assert client.send_chat(LARGE) == "x is what I answer"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
    (send_time,) = rows.times("send_chat")
    (echo_time,) = rows.times("echo_response")
    assert echo_time < send_time
    wait_until(lambda: len(received) == len(LARGE))


def test_the_event_loop_rests_after_a_large_message(serve: Serve, connect: Connect) -> None:
    client = connect(serve(silent).port, echo="none", timeout=60)
    client.send_chat(LARGE)
    gevent.sleep(0.2)
    loop = gevent.get_hub().loop
    iterations = loop.iteration
    gevent.sleep(0.2)
    assert loop.iteration - iterations < 50


def test_an_answer_does_not_excuse_a_server_that_never_takes_the_rest_of_the_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        answer_the_first_byte(connection)
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
        connection.recv(1)
        reset(connection)

    client = connect(serve(server).port, timeout=60)
    assert client.send_chat(LARGE) is None
    _, row = rows
    assert row["name"] == "send_chat"
    assert isinstance(row["exception"], ConnectionError)  # and no time-out


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
    assert rows.counts() == {
        "connect": 2,
        "send_chat": 2,
        "echo_response: ConnectionClosed": 2,
    }
    assert rows.error_texts() == {"ConnectionClosed('The server closed the connection.')"}


def test_a_server_that_resets_mid_message_fails_the_echo(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    connect(serve(after(1, reset)).port).send_chat("hello")
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: ConnectionResetError": 1,
    }
    assert rows.error_texts() == {"ConnectionResetError(104, 'Connection reset by peer')"}


def test_a_server_that_closes_while_idle_is_a_failed_disconnect_and_the_next_message_connects_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo_once).port)
    for _ in range(2):
        assert client.send_chat("hello") is not None
        wait_until(lambda: client.connected_since is None)
    wait_until(lambda: len(rows.named("disconnect")) == 2)
    assert rows.counts() == {
        "connect": 2,
        "send_chat": 2,
        "echo_response": 2,
        "disconnect: ConnectionClosed": 2,
    }
    for row in rows.named("disconnect"):
        assert row["response_time"] == row["response_length"] == 0


def test_a_connection_that_is_lost_before_the_message_is_sent_fails_the_sending(
    connect: Connect, rows: Rows
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(port_of(listener), echo="any")
        client.connect()
        connection, _ = listener.accept()
        connection.close()  # nothing has let the event loop run since
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat: ConnectionClosed": 1}
    assert rows[-1]["response_time"] == 0


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
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: MessageTooLong": 1,
    }
    assert client.connected_since is None
    assert len(flooded) < 20


def test_a_flood_while_idle_is_a_failed_disconnect(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    flood = b"x" * (MESSAGE_LIMIT + 100_000)
    server = serve(says(flood))
    connect(server.port).connect()
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
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: MessageTooLong": 1,
    }


def test_hostile_bytes_do_not_get_into_an_error_text(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def with_hostile_bytes(line: bytes) -> bytes:
        return line.replace(b"hello", b"\xff\xfe\x1b[31m") + b"\n"

    server = serve(Answers(with_hostile_bytes))
    client = connect(server.port)
    for number in range(3):
        client.send_chat(f"hello {number}")
    assert rows.error_texts() == {"EchoAltered('The echo is not what was sent.')"}


def test_a_listener_that_blocks_does_no_harm_to_the_event_loop(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    server = serve(lambda connection: gevent.sleep(0.1))
    client = connect(server.port)
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

    server = serve(after(1, hang_up))
    client: TCPSocketClient = connect(server.port, on_connect=login)
    assert client.send_chat("hello") is None
    assert server.opened == 1
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login: ConnectionClosed": 1,
    }


def test_a_login_that_raises_closes_the_connection_and_the_task_sees_the_error(
    serve: Serve, connect: Connect
) -> None:
    def login() -> None:
        raise LookupError("no password for this user")

    server = serve(echo)
    client = connect(server.port, on_connect=login)
    with pytest.raises(LookupError):
        client.send_chat("hello")
    wait_until(lambda: server.opened == 1)
    wait_until(lambda: server.open == 0)


@pytest.mark.parametrize("error", [PermissionError("refused"), ValueError("refused")])
def test_a_login_that_is_refused_is_a_failed_login_and_is_tried_again_ever_later(
    serve: Serve, connect: Connect, rows: Rows, longest_delays: list[float], error: Exception
) -> None:
    def login() -> None:
        assert client.send_chat("LOGIN", echo="any")  # it is answered, so this resets no back-off
        raise error

    server = serve(echo)
    client: TCPSocketClient = connect(server.port, on_connect=login)
    for _ in range(4):
        assert client.send_chat("hello") is None
    assert rows.failures() == [f"login: {type(error).__name__}"] * 4
    assert server.opened == 4
    assert longest_delays == [0.1, 0.2, 0.4, 0.8]
    wait_until(lambda: server.open == 0)


# ------------------------------------------------------------------------------- connecting again


def test_the_delays_between_attempts_double_up_to_five_seconds(
    connect: Connect, longest_delays: list[float]
) -> None:
    client = connect(free_port())
    for _ in range(20):
        client.connect()
    assert longest_delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2] + [5.0] * 14


def test_an_attempt_waits_until_its_delay_is_over(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda shortest, longest: 0.3)
    client = connect(free_port())
    started = time.perf_counter()
    client.connect()
    client.connect()
    assert time.perf_counter() - started > 0.2


def test_users_do_not_come_back_together(connect: Connect) -> None:
    port = free_port()
    moments: list[float] = []

    def attempt(client: TCPSocketClient) -> None:
        for _ in range(3):
            client.connect()
        moments.append(time.perf_counter())

    clients = [connect(port) for _ in range(30)]
    at_once(attempt, clients)
    assert max(moments) - min(moments) > 0.05  # of up to 0.3


def test_an_echo_starts_with_the_shortest_delay_again(
    serve: Serve, connect: Connect, longest_delays: list[float]
) -> None:
    port = free_port()
    client = connect(port)
    for _ in range(3):
        client.connect()
    server = serve(echo, port)
    assert client.send_chat("hello") is not None
    server.stop()
    wait_until(lambda: client.connected_since is None)
    assert longest_delays == [0.1, 0.2, 0.4, 0.1]


@pytest.mark.parametrize(("lasts", "next_delay"), [(True, 0.1), (False, 0.2)])
def test_a_connection_that_lasted_starts_with_the_shortest_delay_again(
    serve: Serve,
    connect: Connect,
    longest_delays: list[float],
    monkeypatch: pytest.MonkeyPatch,
    lasts: bool,
    next_delay: float,
) -> None:
    """One that was open for longer than the longest delay has lasted."""
    monkeypatch.setattr(locustfile, "LONGEST_DELAY", 0.2 if lasts else 60.0)
    port = free_port()
    client = connect(port)
    client.connect()
    server = serve(silent, port)
    assert client.connect()
    gevent.sleep(0.4)
    server.stop()
    wait_until(lambda: client.connected_since is None)
    assert longest_delays == [0.1, next_delay]


def test_a_server_that_accepts_and_closes_is_not_stormed(
    serve: Serve, connect: Connect, longest_delays: list[float]
) -> None:
    server = serve(hang_up)
    client = connect(server.port)
    for _ in range(4):
        client.connect()
        wait_until(lambda: client.connected_since is None)
    assert server.opened == 4
    assert longest_delays == [0.1, 0.2, 0.4, 0.8]


def test_a_server_that_comes_up_again_is_connected_again(serve: Serve, connect: Connect) -> None:
    first = serve(echo)
    client = connect(first.port)
    assert client.send_chat("hello") is not None
    first.stop()
    assert client.send_chat("hello") is None
    serve(echo, first.port)
    wait_until(lambda: client.send_chat("hello") is not None)


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


def test_a_greenlet_that_is_stopped_before_its_message_is_sent_sends_and_reports_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    handler = Answers(with_nothing)
    server = serve(handler)
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
    (only_line,) = handler.received
    assert only_line.endswith(b"still of use")


def exchanges_in_memory() -> int:
    """Return how many messages anything still refers to."""
    gc.collect()
    return sum(isinstance(thing, Exchange) for thing in gc.get_objects())


def test_messages_that_have_ended_are_forgotten_however_they_ended(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    before = exchanges_in_memory()
    server = serve(echo_after(0.01))
    client = connect(server.port, timeout=60)
    late = connect(serve(silent).port, timeout=0.02)
    wait_until(late.connect)  # that has the same time-out
    for _ in range(10):
        client.send_chat("echoed")
        client.send_chat("nothing awaited", echo="none")
        client.send_chat("not waited for", wait=False)
        late.send_chat("timed out")
        stopped = gevent.spawn(client.send_chat, "stopped")
        gevent.sleep(0.001)
        stopped.kill()
    wait_until(lambda: exchanges_in_memory() - before < 5)  # greenlets may hold what woke them last
    assert rows.counts()["echo_response: EchoTimeout"] == 10
    assert rows.counts()["send_chat"] >= 40
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
    (echoed,) = echoes
    assert text_of(echoed) == "hello"


def test_a_login_that_closes_instead_of_raising_is_not_made_in_a_storm(
    serve: Serve, connect: Connect, longest_delays: list[float]
) -> None:
    client: TCPSocketClient = connect(serve(silent).port, on_connect=lambda: client.close())
    for _ in range(4):
        assert client.connect() is False
    assert longest_delays == [0.1, 0.2, 0.4, 0.8]


def test_no_login_is_made_on_a_connection_that_has_ended_already(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    def wait_for_the_end(name: str, **_: Any) -> None:
        if name == "connect":
            wait_until(lambda: client.connected_since is None)

    logins: list[str] = []
    client = connect(serve(hang_up).port, on_connect=lambda: logins.append("login"))
    request_event.add_listener(wait_for_the_end)
    assert client.connect() is False
    assert logins == []


def test_what_is_handed_over_goes_out_before_a_local_close(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(with_nothing)
    client = connect(serve(server).port)
    client.connect()
    client.send_chat("/quit", echo="none", wait=False)
    client.close()
    wait_until(lambda: server.received == [b"/quit"])
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 1})


def test_the_next_message_connects_after_a_close_in_the_middle_of_an_attempt(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port)
    attempt = gevent.spawn(client.connect)
    gevent.sleep(0)  # it is under way
    client.close()
    echoed = client.send_chat("hello")
    assert text_of(echoed) == "hello"
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
