"""One client against servers that answer in every way that servers do."""

from __future__ import annotations

import itertools
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

import gevent
import pytest
from conftest import Rows, Server, echo, free_port, lines, wait_until
from gevent.event import Event
from locust.event import EventHook

import locustfile
from locustfile import MESSAGE_LIMIT, LineFraming, TCPSocketClient

Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]
TAGGED = re.compile(rb"\[([0-9a-f]{8}\.\d+)\] (.*)", re.DOTALL)


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ------------------------------------------------------------------------------------------ a message


def test_a_message_gives_three_rows_and_returns_the_echoed_text(serve: Serve, connect: Connect, rows: Rows) -> None:
    received = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line + b"\r\n")

    client = connect(serve(server).port)
    echoed = client.send_chat("안녕하세요")
    tag, text = TAGGED.fullmatch(received[0]).groups()  # type: ignore[union-attr]
    assert text.decode() == "안녕하세요"
    assert echoed == f"[{tag.decode()}] 안녕하세요"
    assert [row["name"] for row in rows] == ["connect", "send_chat", "echo_response"]
    assert {row["request_type"] for row in rows} == {"TCP"}
    assert all(row["exception"] is None for row in rows)
    assert [row["response_length"] for row in rows] == [0, len(received[0]) + 1, len(received[0])]
    assert all(type(row["response_length"]) is int for row in rows)
    assert all(row["response_time"] > 0 for row in rows)
    assert rows[2]["response_time"] >= rows[1]["response_time"]


def test_a_listener_as_in_locusts_documentation_can_be_called(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    client, called = connect(serve(echo).port), []

    def on_request(request_type, name, response_time, response_length, exception, context, **kwargs):  # type: ignore[no-untyped-def]
        called.append(name)

    request_event.add_listener(on_request)
    client.send_chat("hello")
    assert called == ["connect", "send_chat", "echo_response"]


def test_the_round_trip_is_the_servers_time_in_milliseconds(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            gevent.sleep(0.05)
            connection.sendall(line + b"\n")

    connect(serve(server).port).send_chat("hello")
    assert 50 <= rows.named("echo_response")[0]["response_time"] < 1000
    assert rows.named("send_chat")[0]["response_time"] < 50


def test_tags_are_unique_across_clients_and_messages(serve: Serve, connect: Connect) -> None:
    server = serve(echo)
    clients = [connect(server.port) for _ in range(20)]
    echoes = [client.send_chat("hello") for _ in range(10) for client in clients]
    assert len({TAGGED.match(text.encode())[1] for text in echoes if text}) == 200  # type: ignore[index]


def test_the_echo_may_come_with_other_text_around_it(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(b"<alice> " + line + " (방금)\n".encode())

    assert connect(serve(server).port).send_chat("hello").endswith("hello (방금)")  # type: ignore[union-attr]
    assert not any(row["exception"] for row in rows)


def test_a_timeout_of_another_type_or_mode_is_refused(connect: Connect) -> None:
    for settings in ({"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"echo": "maybe"}, {"framing": ">i"}):
        with pytest.raises(ValueError, match="will not do: write"):
            connect(1, **settings)
    with pytest.raises(ValueError, match=r"write full \(default\), tag, any or none"):
        connect(1).send_chat("hello", echo="maybe")  # type: ignore[arg-type]


def test_a_message_that_the_framing_cannot_carry_is_an_error_before_anything_is_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port)
    with pytest.raises(ValueError, match="line break"):
        client.send_chat("two\nlines")
    assert rows.counts() == {"connect": 1}
    assert client.send_chat("one line") is not None


def test_two_greenlets_cannot_use_one_client_at_a_time(serve: Serve, connect: Connect) -> None:
    client = connect(serve(lambda connection: echo_after(connection, 0.2)).port)
    first = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: client._exchange)
    with pytest.raises(RuntimeError, match="one message at a time"):
        client.send_chat("hello")
    assert first.get() is not None


def echo_after(connection: socket.socket, seconds: float) -> None:
    """Send every line back after a pause."""
    for line in lines(connection):
        gevent.sleep(seconds)
        connection.sendall(line + b"\n")


# ------------------------------------------------------------------------------------------- the truth


def test_an_echo_in_pieces_of_one_byte_passes(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for line in lines(connection):
            for byte in line + b"\n":
                connection.sendall(bytes([byte]))
                gevent.sleep(0)

    client = connect(serve(server).port)
    assert client.send_chat("안녕하세요, 여러분") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_multi_byte_character_cut_in_two_passes(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            cut = line.index("한".encode()) + 1
            connection.sendall(line[:cut])
            gevent.sleep(0.02)
            connection.sendall(line[cut:] + b"\n")

    assert connect(serve(server).port).send_chat("한").endswith("한")  # type: ignore[union-attr]
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_banner_and_other_peoples_messages_are_never_taken_for_the_echo(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"Welcome to the chat!\r\n250 users\n")
        for line in lines(connection):
            connection.sendall(b"[00000000.1] hello\nbob: hello\n" * 10)
            gevent.sleep(0.05)
            connection.sendall(b"[00000000.2] hello\n" + line + b"\n[00000000.3] hello\n")

    client = connect(serve(server).port)
    for _ in range(3):
        assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 3}
    assert min(row["response_time"] for row in rows.named("echo_response")) >= 50


def test_in_a_room_that_broadcasts_no_echo_reads_below_the_servers_delay_and_none_fails(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    room: list[socket.socket] = []

    def server(connection: socket.socket) -> None:
        room.append(connection)
        for line in lines(connection):
            for other in room:
                if other is not connection:
                    other.sendall(b"someone: " + line + b"\n")
            gevent.spawn_later(0.05, connection.sendall, line + b"\n")

    port = serve(server).port
    clients = [connect(port) for _ in range(10)]
    for client in clients:
        client.connect()
    gevent.joinall([gevent.spawn(lambda c=c: [c.send_chat("all the same") for _ in range(10)]) for c in clients])
    assert rows.counts() == {"connect": 10, "send_chat": 100, "echo_response": 100}
    assert min(row["response_time"] for row in rows.named("echo_response")) >= 50


@pytest.mark.parametrize("size", [400, 1000])
def test_an_echo_cut_at_512_bytes_fails_each_time_it_happens_and_only_then(
    serve: Serve, connect: Connect, rows: Rows, size: int
) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(line[:512] + b"\n")

    client = connect(serve(server).port)
    for _ in range(3):
        client.send_chat("x" * size)
        client.send_chat("short")
    cut = {"echo_response": 3, "echo_response: EchoTruncated": 3} if size > 512 else {"echo_response": 6}
    assert rows.counts() == {"connect": 1, "send_chat": 6, **cut}
    assert all(row["response_time"] < 1000 for row in rows)  # at once, not at the deadline


@pytest.mark.parametrize("position", [15, 40, -1])
def test_an_echo_with_one_byte_changed_fails_as_altered(
    serve: Serve, connect: Connect, rows: Rows, position: int
) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            damaged = bytearray(line)
            damaged[position] ^= number % 2
            connection.sendall(bytes(damaged) + b"\n")

    client = connect(serve(server).port)
    results = [client.send_chat("a" * 60) is not None for _ in range(6)]
    assert results == [True, False] * 3
    assert rows.counts() == {"connect": 1, "send_chat": 6, "echo_response": 3, "echo_response: EchoAltered": 3}


def test_an_echo_that_lacks_a_byte_in_the_middle_is_altered_not_truncated(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(line[:20] + line[21:] + b"\n")

    connect(serve(server).port).send_chat("abcdefghijklmnopqrstuvwxyz")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoAltered": 1}


def test_the_work_of_another_user_is_not_in_the_measured_time(serve: Serve, connect: Connect, rows: Rows) -> None:
    waiting: list[tuple[socket.socket, bytes]] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            waiting.append((connection, line + b"\n"))
            if len(waiting) == 2:
                for other, text in waiting:  # both in one go
                    other.sendall(text)

    port = serve(server).port
    clients = [connect(port), connect(port)]

    def user(client: TCPSocketClient) -> None:
        client.send_chat("hello")
        until = time.perf_counter() + 0.2
        while time.perf_counter() < until:  # busy, and letting nobody else run
            pass

    gevent.joinall([gevent.spawn(user, client) for client in clients])
    assert max(row["response_time"] for row in rows.named("echo_response")) < 200


def test_a_message_is_not_held_back_for_an_acknowledgement(serve: Serve, connect: Connect) -> None:
    client = connect(serve(echo).port)
    client.connect()
    assert client._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_late_echo_is_not_credited_to_a_later_message(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            gevent.sleep(0.3 if number == 0 else 0.05)
            connection.sendall(line + b"\n")

    client = connect(serve(server).port, timeout=0.2)
    assert client.send_chat("hello") is None
    assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response: EchoTimeout": 1, "echo_response": 1}
    assert rows.named("echo_response")[1]["response_time"] > 100  # the rest of the first pause, and the second


def test_a_timer_that_was_set_for_an_earlier_message_does_not_end_a_later_one(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            gevent.sleep(0.3 if number == 1 else 0)
            connection.sendall(line + b"\n")

    client = connect(serve(server).port, timeout=0.4)
    client.send_chat("quick")
    gevent.sleep(0.3)
    client.send_chat("slow")
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}


def test_messages_that_arrive_while_idle_are_read_and_dropped(serve: Serve, connect: Connect, rows: Rows) -> None:
    sent = Event()

    def server(connection: socket.socket) -> None:
        for line in itertools.islice(lines(connection), 1):
            connection.sendall(line + b"\n")
        for _ in range(2000):  # more than socket buffers hold, so that the server could not send it to a deaf client
            connection.sendall(b"someone: " + b"x" * 4000 + b"\n")
        sent.set()
        echo(connection)

    client = connect(serve(server).port)
    client.send_chat("hello")
    assert sent.wait(10)
    assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}


# ---------------------------------------------------------------------------------------------- modes


def answers(*texts: bytes) -> Callable[[socket.socket], None]:
    """Return a server that answers each line with the next of the texts, line breaks included."""

    def server(connection: socket.socket) -> None:
        for _, text in zip(lines(connection), itertools.cycle(texts), strict=False):
            connection.sendall(text)

    return server


def test_mode_tag_accepts_a_reformatted_message_and_waits_for_the_tag(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(b"noise\n<b>" + line.upper().replace(b"HELLO", b"***").lower() + b"</b>\n")

    echoed = connect(serve(server).port, echo="tag").send_chat("hello")
    assert echoed is not None and echoed.startswith("<b>[") and echoed.endswith("] ***</b>")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_mode_any_sends_untagged_and_takes_the_next_message(serve: Serve, connect: Connect, rows: Rows) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(b"OK\n")

    client = connect(serve(server).port, echo="any")
    assert client.send_chat("hello") == "OK"
    assert received == [b"hello"]
    assert rows[-1]["response_length"] == 2


def test_mode_any_does_not_take_what_came_before_the_send(serve: Serve, connect: Connect) -> None:
    server = serve(answers(b"first\nsecond\n", b"third\n"))
    client = connect(server.port, echo="any")
    assert client.send_chat("hello") == "first"
    gevent.sleep(0.05)
    assert client.send_chat("hello") == "third"


def test_mode_any_does_not_take_what_the_kernel_had_already_received(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(listener.getsockname()[1], echo="any")
        client.connect()
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"early\n")  # not read yet, as nothing has let the event loop run since
            gevent.spawn(lambda: connection.sendall(connection.recv(100).upper()))
            assert client.send_chat("hello") == "HELLO"


def test_a_command_in_mode_none_awaits_nothing(serve: Serve, connect: Connect, rows: Rows) -> None:
    assert connect(serve(answers(b"OK\n")).port, echo="none").send_chat("/away") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1}


def test_mode_none_awaits_nothing_and_drops_what_comes(serve: Serve, connect: Connect, rows: Rows) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(b"chatter\n" * 100)

    client = connect(serve(server).port, echo="none")
    assert [client.send_chat(f"hello {n}") for n in range(3)] == [None] * 3
    wait_until(lambda: len(received) == 3)
    assert received == [b"hello 0", b"hello 1", b"hello 2"]
    assert rows.counts() == {"connect": 1, "send_chat": 3}


def test_the_mode_of_one_call_wins_over_the_clients(serve: Serve, connect: Connect, rows: Rows) -> None:
    client = connect(serve(answers(b"OK\n")).port, timeout=0.2)
    assert client.send_chat("hello", echo="any") == "OK"
    assert client.send_chat("hello", echo="none") is None
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 1, "echo_response: EchoTimeout": 1}


@pytest.mark.parametrize("mode", ["full", "tag", "any"])
def test_a_command_is_sent_untouched_and_any_message_answers_it(serve: Serve, connect: Connect, mode: str) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(b"3 users online\n")

    assert connect(serve(server).port, echo=mode).send_chat("/who all") == "3 users online"
    assert received == [b"/who all"]


def test_after_a_timeout_a_tagged_connection_stays_and_an_untagged_one_is_closed(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)] and None)
    tagged, untagged = connect(server.port, timeout=0.1), connect(server.port, timeout=0.1, echo="any")
    for client in (tagged, untagged):
        client.send_chat("hello")
        client.send_chat("hello")
    assert server.opened == 3
    assert rows.counts() == {"connect": 3, "send_chat": 4, "echo_response: EchoTimeout": 4}


# -------------------------------------------------------------------------------- framing, composing


@pytest.mark.parametrize("name", [">I", "<H"])
def test_a_length_prefix_frames_both_ways(serve: Serve, connect: Connect, rows: Rows, name: str) -> None:
    client = connect(serve(echo).port, framing=name)
    assert client.send_chat("two\nlines").endswith("two\nlines")  # type: ignore[union-attr]
    assert rows.named("send_chat")[0]["response_length"] == rows.named("echo_response")[0]["response_length"] + (
        struct.calcsize(name)
    )


def test_raw_framing_works_with_a_server_without_any(serve: Serve, connect: Connect, rows: Rows) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            received.append(data)
            connection.sendall(data)

    assert connect(serve(server).port, framing="raw").send_chat("hello") is not None
    assert not received[0].endswith(b"\n")


class Telegram:
    """A custom framing: messages end with STOP."""

    def __init__(self) -> None:
        self.rest = b""

    def encode(self, payload: bytes) -> bytes:
        return payload + b" STOP "

    def feed(self, data: bytes) -> Iterable[bytes]:
        *complete, self.rest = (self.rest + data).split(b" STOP ")
        return complete


def test_a_custom_framing_is_made_anew_for_each_connection(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1024) + b"half a mess")

    client = connect(serve(server).port, framing=Telegram)
    assert client.send_chat("hello") is not None
    wait_until(lambda: client._socket is None)
    assert client.send_chat("hello") is not None
    assert rows.counts()["echo_response"] == 2


class Broken(LineFraming):
    """A framing with a bug, whose error text holds what the server sent."""

    def feed(self, data: bytes) -> list[bytes]:
        raise UnicodeDecodeError("utf-8", data, 0, 1, "hostile bytes")


def test_an_error_in_a_custom_framing_is_a_failed_request_without_the_servers_bytes(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port, framing=Broken)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: FramingError": 1}
    assert "hello" not in repr(rows[-1]["exception"])
    assert client._socket is None


def test_compose_and_on_connect_make_another_protocol(serve: Serve, connect: Connect, rows: Rows) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            word, _, text = line.partition(b" ")
            connection.sendall({b"LOGIN": b"OK welcome\n"}.get(word, b"server PONG " + text + b"\n"))

    client: TCPSocketClient = connect(
        serve(server).port,
        echo="tag",
        compose=lambda tag, message: f"PING :{tag} {message}",
        on_connect=lambda: client.send_chat("LOGIN alice", echo="any"),
    )
    assert client.send_chat("hello").startswith("server PONG :")  # type: ignore[union-attr]
    assert received[0] == b"LOGIN alice"
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}


def test_a_login_that_loses_the_connection_does_not_connect_again_by_itself(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        next(lines(connection))

    def login() -> None:
        for _ in range(3):
            client.send_chat("LOGIN", echo="any")

    server_ = serve(server)
    client = connect(server_.port, on_connect=login)
    assert client.send_chat("hello") is None
    assert server_.opened == 1
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: ConnectionClosed": 1}


def test_a_login_that_raises_closes_the_connection_and_the_task_sees_the_error(serve: Serve, connect: Connect) -> None:
    server = serve(echo)

    def login() -> None:
        raise LookupError("no password for this user")

    client = connect(server.port, on_connect=login)
    with pytest.raises(LookupError):
        client.send_chat("hello")
    wait_until(lambda: server.opened == 1 and server.open == 0)


@pytest.mark.parametrize("error", [PermissionError("refused"), ValueError("refused")])
def test_a_login_that_is_refused_is_a_failed_login_and_is_tried_again_ever_later(
    serve: Serve, connect: Connect, rows: Rows, error: Exception
) -> None:
    server = serve(echo)

    def login() -> None:
        assert client.send_chat("LOGIN", echo="any")  # it is answered, so this resets no back-off
        raise error

    client = connect(server.port, on_connect=login)
    started = time.monotonic()
    while time.monotonic() - started < 1.5:
        assert client.send_chat("hello") is None
    assert rows.counts()["connect"] == rows.counts()[f"login: {type(error).__name__}"] == server.opened <= 12
    assert rows.counts()["connect"] >= 2
    wait_until(lambda: server.open == 0)


# ---------------------------------------------------------------------------------------------- faults


def texts(rows: Rows) -> set[str]:
    return {repr(row["exception"]) for row in rows if row["exception"]}


def test_a_refused_connection_is_a_failed_connect(connect: Connect, rows: Rows) -> None:
    client = connect(free_port())
    assert client.connect() is False
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect: ConnectionRefusedError": 2}
    assert texts(rows) == {"ConnectionRefusedError(111, 'Connection refused')"}


def test_a_name_that_does_not_resolve_is_a_failed_connect_with_a_fixed_text(connect: Connect, rows: Rows) -> None:
    for host in ("no-such-host.invalid", "another-one.invalid"):
        assert connect(12345, host=host, timeout=3).connect() is False
    assert len(texts(rows)) == 1
    assert ".invalid" not in texts(rows).pop()


def black_hole() -> tuple[socket.socket, list[socket.socket]]:
    """Return a listener whose queue is full, so that the kernel drops what else wants to connect."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = []
    for _ in range(8):
        filler = socket.socket()
        filler.settimeout(0)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    gevent.sleep(0.1)
    return listener, fillers


def test_a_black_hole_is_a_failed_connect_at_the_timeout(connect: Connect, rows: Rows) -> None:
    listener, fillers = black_hole()
    try:
        assert connect(listener.getsockname()[1], timeout=0.6).connect() is False
    finally:
        for sock in (listener, *fillers):
            sock.close()
    assert rows.counts() == {"connect: TimeoutError": 1}
    assert 600 <= rows[0]["response_time"] < 1700


def test_a_server_that_never_answers_times_out_each_time_on_one_connection(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)] and None)
    client = connect(server.port, timeout=0.2)
    for _ in range(3):
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response: EchoTimeout": 3}
    assert all(200 <= row["response_time"] < 1000 for row in rows.named("echo_response"))
    assert server.opened == 1


def test_one_deadline_covers_the_exchange_however_the_bytes_trickle(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            for byte in line:
                connection.sendall(bytes([byte]))
                gevent.sleep(0.05)

    connect(serve(server).port, timeout=0.4).send_chat("hello" * 10)
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoTimeout": 1}
    assert 400 <= rows[-1]["response_time"] < 1000


def test_a_server_that_never_reads_fails_the_send_at_the_deadline(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(lambda connection: gevent.sleep(30))
    client = connect(server.port, timeout=0.4, framing=">I")
    assert client.send_chat("x" * 8_000_000) is None
    assert rows.counts() == {"connect": 1, "send_chat: TimeoutError": 1}
    assert 400 <= rows[-1]["response_time"] < 1500
    assert client._socket is None  # half a message has gone out


def test_a_server_that_closes_while_it_is_sent_to_fails_the_send_at_once(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        gevent.sleep(0.2)
        reset(connection)

    assert connect(serve(server).port, framing=">I").send_chat("x" * 8_000_000) is None
    assert len(rows) == 2
    assert rows[1]["name"] == "send_chat" and isinstance(rows[1]["exception"], OSError)
    assert 200 <= rows[1]["response_time"] < 2000


@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_large_message_to_a_slow_reader_goes_out_whole(serve: Serve, connect: Connect, rows: Rows, mode: str) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        gevent.sleep(0.2)
        while data := connection.recv(1 << 20):
            received.extend(data)
            connection.sendall(b"noise, not the answer\n")
        connection.close()

    client = connect(serve(server).port, echo=mode, timeout=10)
    message = "x" * 8_000_000
    sender = gevent.spawn(client.send_chat, message)
    wait_until(lambda: rows.named("send_chat") or (client._exchange and client._exchange.sent))
    wait_until(lambda: received.endswith(b"\n"))
    client.close()
    sender.join()
    assert len(received) == rows.named("send_chat")[0]["response_length"]
    assert message.encode() in received
    assert rows.named("send_chat")[0]["exception"] is None


@pytest.mark.parametrize("mode", ["full", "any"])
def test_a_server_that_answers_and_hangs_up_before_it_has_read_all_fails_the_send_and_raises_nothing(
    serve: Serve, connect: Connect, rows: Rows, mode: str
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(512) + b"\n")
        gevent.sleep(0.2)

    client = connect(serve(server).port, echo=mode, timeout=3)
    assert client.send_chat("x" * 9_000_000) is None
    (row,) = (row for row in rows if row["exception"])
    assert row["name"] == "send_chat" and isinstance(row["exception"], ConnectionError)
    assert row["response_time"] < 2000


def test_an_echo_in_time_counts_even_if_its_user_gets_to_run_only_after_the_time_out(
    serve: Serve, connect: Connect, rows: Rows, request_event: EventHook
) -> None:
    client = connect(serve(echo).port, timeout=0.2)
    request_event.add_listener(lambda name, **_: gevent.sleep(0.5) if name == "send_chat" else None)
    assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
    assert rows.named("echo_response")[0]["response_time"] < 200


def test_a_server_that_closes_mid_message_fails_the_echo_and_the_next_message_connects_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(next(lines(connection))[:10])

    server_ = serve(server)
    client = connect(server_.port)
    for _ in range(2):
        assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response: ConnectionClosed": 2}
    assert texts(rows) == {"ConnectionClosed('The server closed the connection.')"}


def test_a_server_that_resets_mid_message_fails_the_echo(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        next(lines(connection))
        reset(connection)

    connect(serve(server).port).send_chat("hello")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: ConnectionResetError": 1}
    assert texts(rows) == {"ConnectionResetError(104, 'Connection reset by peer')"}


def test_a_server_that_closes_while_idle_is_a_failed_disconnect_and_the_next_message_connects_again(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        line = next(lines(connection))
        connection.sendall(line + b"\n")

    client = connect(serve(server).port)
    assert client.send_chat("hello") is not None
    wait_until(lambda: rows.named("disconnect"))
    assert client._next_attempt > 0  # spaced, as after every loss
    assert client.send_chat("hello") is not None
    wait_until(lambda: len(rows.named("disconnect")) == 2)
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response": 2, "disconnect: ConnectionClosed": 2}
    assert all(row["response_time"] == row["response_length"] == 0 for row in rows.named("disconnect"))


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


def test_a_flood_without_a_delimiter_ends_the_connection_and_memory_stays_bounded(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    flooded: list[int] = []

    def server(connection: socket.socket) -> None:
        next(lines(connection))
        try:
            while len(flooded) < 100:
                connection.sendall(b"x" * 1_000_000)
                flooded.append(1)
        finally:
            connection.close()

    client = connect(serve(server).port)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: MessageTooLong": 1}
    assert client._socket is None
    assert len(flooded) < 20


def test_a_flood_while_idle_is_a_failed_disconnect(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"x" * (MESSAGE_LIMIT + 100_000))

    connect(serve(server).port).connect()
    wait_until(lambda: rows.named("disconnect"))
    assert rows.counts() == {"connect": 1, "disconnect: MessageTooLong": 1}


def test_a_length_prefix_that_lies_fails_the_echo_at_once(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"\xff\xff\xff\xff")
        gevent.sleep(10)

    connect(serve(server).port, framing=">I").send_chat("hello")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: MessageTooLong": 1}
    assert rows[-1]["response_time"] < 1000


def test_a_half_open_connection_times_out_each_time(serve: Serve, connect: Connect, rows: Rows) -> None:
    stop = Event()

    def server(connection: socket.socket) -> None:
        stop.wait()  # neither reads nor closes, as a machine that has lost its power

    client = connect(serve(server).port, timeout=0.2)
    client.send_chat("hello")
    client.send_chat("hello")
    stop.set()
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response: EchoTimeout": 2}


def test_hostile_bytes_do_not_get_into_an_error_text(serve: Serve, connect: Connect, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            tag = line.split(b" ")[0]
            connection.sendall(tag + b" \xff\xfe\x1b[31m" + str(number).encode() + b"\n")

    client = connect(serve(server).port)
    for _ in range(3):
        client.send_chat("hello")
    assert texts(rows) == {"EchoAltered('The echo is not what was sent.')"}


def test_bytes_that_are_no_utf_8_are_returned_as_replacement_characters(serve: Serve, connect: Connect) -> None:
    assert connect(serve(answers(b"\xff\xfe ok\n")).port, echo="any").send_chat("hello") == "\ufffd\ufffd ok"


# ------------------------------------------------------------------------------ connecting again, closing


def test_attempts_against_a_dead_port_are_spaced(connect: Connect, rows: Rows, monkeypatch: Any) -> None:
    monkeypatch.setattr(locustfile, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(locustfile, "LONGEST_PAUSE", 0.5)
    port, limit = free_port(), time.monotonic() + 1.0
    clients = [connect(port) for _ in range(30)]

    def attempts(client: TCPSocketClient) -> None:
        while time.monotonic() < limit:
            client.send_chat("hello")

    gevent.joinall([gevent.spawn(attempts, client) for client in clients])
    # A tenth of the real pauses: so a user's attempts here in 1 s are those of 10 s there.
    assert 5 <= len(rows) / len(clients) <= 12
    started = sorted(client._next_attempt for client in clients)
    assert started[-1] - started[0] > 0.1  # full jitter: they do not come back together


def test_pauses_double_up_to_the_longest_and_an_echo_starts_them_anew(serve: Serve, connect: Connect) -> None:
    port = free_port()
    client = connect(port)
    longest: list[float] = []
    for _ in range(9):
        client._drop()
        longest.append(client._next_attempt - time.perf_counter())
    assert all(pause <= 0.1 * 2**number and pause <= 5 for number, pause in enumerate(longest))
    client._next_attempt = 0
    serve(echo, port)
    assert client.send_chat("hello") is not None
    client._drop()
    assert client._next_attempt - time.perf_counter() <= 0.1


def test_a_connection_that_lasted_starts_the_pauses_anew(serve: Serve, connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setattr(locustfile, "LONGEST_PAUSE", 0.1)
    client = connect(serve(lambda connection: gevent.sleep(0.2)).port)
    for _ in range(9):
        client._drop()
    assert client.connect()
    wait_until(lambda: client._socket is None)
    assert client._failures == 1


def test_a_server_that_accepts_and_closes_is_not_stormed(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(lambda connection: None)
    client, limit = connect(server.port), time.monotonic() + 1.5
    while time.monotonic() < limit:
        client.send_chat("hello")
    assert server.opened <= 12


def test_a_server_that_comes_up_again_is_connected_again(serve: Serve, connect: Connect, rows: Rows) -> None:
    first = serve(echo)
    client = connect(first.port)
    assert client.send_chat("hello") is not None
    first.stop()
    assert client.send_chat("hello") is None
    serve(echo, first.port)
    wait_until(lambda: client.send_chat("hello") is not None, 8)


def test_all_messages_that_are_ready_are_sent_before_anything_is_reported(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    server = serve(echo)
    clients = [connect(server.port) for _ in range(20)]
    for client in clients:
        client.connect()
    sent: list[bool] = []

    def on_request(**_: Any) -> None:
        exchanges = [client._exchange for client in clients]  # None: the one that is just reported
        sent.append(all(exchange is None or exchange.sent for exchange in exchanges))

    request_event.add_listener(on_request)
    gevent.joinall([gevent.spawn(client.send_chat, "hello") for client in clients])
    assert sent[0]
    assert len(sent) == 40


def ready_to_send(client: locustfile.TCPSocketClient, **settings: Any) -> gevent.Greenlet:
    """Return a user whose message stands in the outbox: the event loop has not sent it yet."""
    client.connect()
    user = gevent.spawn(client.send_chat, "hello", **settings)
    gevent.sleep(0)
    assert client._exchange is not None
    assert not client._exchange.started
    return user


def test_what_comes_while_a_message_waits_to_be_sent_is_not_its_answer(serve: Serve, connect: Connect) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"news\n")
        for _ in lines(connection):
            connection.sendall(b"answer\n")

    client = connect(serve(server).port, echo="any")
    client.connect()
    client._reader.stop()  # as if nobody had found the time to read
    gevent.sleep(0.1)
    user = ready_to_send(client)
    while client._on_readable():
        pass
    client._reader.start(client._on_readable)
    assert user.get(timeout=5) == "answer"


def test_a_user_that_is_stopped_before_its_message_is_sent_sends_and_reports_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received: list[bytes] = []
    server = serve(lambda connection: received.extend(lines(connection)))
    client = connect(server.port)
    client.connect()
    user = gevent.spawn(client.send_chat, "hello")
    gevent.get_hub().loop.run_callback(user.throw, gevent.GreenletExit)  # the turn of this comes before the sending
    wait_until(lambda: server.opened and not server.open)
    assert rows.counts() == {"connect": 1}
    assert not received
    assert client.send_chat("the client is still of use", echo="none") is None
    wait_until(lambda: received)


@pytest.mark.parametrize("mode", ["full", "any", "none"])
def test_a_connection_that_is_lost_before_the_message_is_sent_fails_the_sending_at_once(
    serve: Serve, connect: Connect, rows: Rows, mode: Any
) -> None:
    server = serve(lambda connection: None)
    client = connect(server.port, echo=mode)
    client.connect()
    client._reader.stop()
    wait_until(lambda: server.opened and not server.open)
    user = ready_to_send(client)
    wait_until(lambda: user.ready() or not client._on_readable())
    assert user.get(timeout=5) is None
    assert rows.counts() == {"connect": 1, "send_chat: ConnectionClosed": 1}
    assert rows.named("send_chat")[0]["response_time"] == 0


def test_an_answer_before_the_end_of_the_message_counts_once_all_is_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1) + b" is what I answer\n")
        gevent.sleep(0.2)
        while data := connection.recv(1 << 20):
            received.extend(data)

    client = connect(serve(server).port, echo="any")
    assert client.send_chat("x" * 8_000_000) == "x is what I answer"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
    assert rows.named("echo_response")[0]["response_time"] < 200 <= rows.named("send_chat")[0]["response_time"]
    wait_until(lambda: len(received) == 8_000_000)
    assert not client._writer.active  # else it would go on for ever


def test_an_answer_does_not_excuse_a_server_that_never_takes_the_rest_of_the_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1) + b" is what I answer\n")
        gevent.sleep(10)

    client = connect(serve(server).port, echo="any", timeout=0.3)
    assert client.send_chat("x" * 8_000_000) is None
    assert rows.counts() == {"connect": 1, "send_chat: TimeoutError": 1}
    assert 300 <= rows.named("send_chat")[0]["response_time"] < 3000
    assert rows.named("send_chat")[0]["response_length"] == 8_000_001


def test_a_user_that_sends_without_a_pause_asks_for_one_turn_a_message(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, take_turns = list[float](), locustfile.take_turns

    def counted() -> None:
        turns.append(time.perf_counter())
        take_turns()

    monkeypatch.setattr(locustfile, "take_turns", counted)
    client = connect(serve(lambda connection: [None for _ in lines(connection)]).port, echo="none")
    for _ in range(300):
        client.send_chat("hello")
    gevent.sleep(0.05)
    assert 300 <= len(turns) < 310


def test_close_can_be_called_at_any_time_and_again(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(echo)
    client = connect(server.port)
    client.close()
    client.connect()
    client.close()
    client.close()
    assert client.send_chat("hello") is not None  # connects again, at once, as nothing has failed
    client.close()
    wait_until(lambda: server.open == 0)
    assert rows.counts() == {"connect": 2, "send_chat": 1, "echo_response": 1}


def test_an_exchange_that_has_ended_waits_for_no_deadline(serve: Serve, connect: Connect) -> None:
    client = connect(serve(lambda connection: echo_after(connection, 0.05)).port, timeout=4.5)
    client.send_chat("hello")
    gevent.spawn(client.send_chat, "hello").kill()
    assert not client._exchanges


def test_connect_when_connected_does_nothing(serve: Serve, connect: Connect, rows: Rows) -> None:
    client = connect(serve(echo).port)
    assert client.connect() is client.connect() is True
    assert rows.counts() == {"connect": 1}


def test_closing_from_another_greenlet_ends_the_exchange(serve: Serve, connect: Connect, rows: Rows) -> None:
    client = connect(serve(lambda connection: gevent.sleep(10)).port)
    waiting = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: client._exchange and client._exchange.sent)
    client.close()
    assert waiting.get(timeout=5) is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: ConnectionClosed": 1}


def test_a_user_that_is_stopped_mid_message_reports_no_echo_and_leaves_nothing_open(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(lambda connection: echo_after(connection, 0.2))
    client = connect(server.port)
    user = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: client._exchange and client._exchange.sent)
    user.kill()
    wait_until(lambda: server.open == 0)
    assert rows.counts() == {"connect": 1, "send_chat": 1}
    assert client.send_chat("the client is still of use") is not None


def test_a_fault_in_the_settings_is_a_failed_connect_that_says_it(connect: Connect, rows: Rows) -> None:
    client = connect(0)
    client.fault = locustfile.SettingError("http://x", "--host=host:port")
    assert client.connect() is False
    assert texts(rows) == {"SettingError(\"'http://x' will not do: write --host=host:port\")"}
