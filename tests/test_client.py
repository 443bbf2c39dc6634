"""One client and its messages: what is sent, what counts as the echo, and what is measured."""

from __future__ import annotations

import itertools
import os
import re
import select
import socket
import struct
from collections.abc import Iterable
from typing import Any

import gevent
import psutil
import pytest
from clients import Connect
from gevent.event import Event
from locust.event import EventHook
from programs import wait_until
from rows import Rows
from servers import (
    Answers,
    Serve,
    echo,
    echo_after,
    echo_and_hold_up,
    echo_bytewise,
    hold_up,
    in_turn,
    lines,
    silent,
)

from locustfile import EchoMode, LineFraming, TCPSocketClient

TAGGED = re.compile(r"\[([0-9a-f]{8}\.\d+)\] (.*)", re.DOTALL)


def tag_and_text(message: bytes) -> tuple[str, str]:
    """Return the tag and the text of a message that has been sent."""
    match = TAGGED.fullmatch(message.decode())
    assert match is not None, message
    return match[1], match[2]


def with_ok(line: bytes) -> bytes:
    """Answer a line with OK."""
    return b"OK\n"


# ------------------------------------------------------------------------------------- a message


def test_a_message_gives_three_rows_and_returns_the_echoed_text(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: line + b"\r\n")
    client = connect(serve(server).port)
    echoed = client.send_chat("안녕하세요")
    (received,) = server.received
    tag, text = tag_and_text(received)
    assert text == "안녕하세요"
    assert echoed == f"[{tag}] 안녕하세요"
    assert [row["name"] for row in rows] == ["connect", "send_chat", "echo_response"]
    assert {row["request_type"] for row in rows} == {"TCP"}
    assert all(row["exception"] is None for row in rows)
    assert [row["response_length"] for row in rows] == [0, len(received) + 1, len(received)]
    assert all(type(row["response_length"]) is int for row in rows)
    assert all(row["response_time"] > 0 for row in rows)
    assert rows[2]["response_time"] >= rows[1]["response_time"]


def test_a_listener_as_in_locusts_documentation_can_be_called(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    called = []

    def on_request(  # type: ignore[no-untyped-def]
        request_type, name, response_time, response_length, exception, context, **kwargs
    ):
        called.append(name)

    client = connect(serve(echo).port)
    request_event.add_listener(on_request)
    client.send_chat("hello")
    assert called == ["connect", "send_chat", "echo_response"]


def test_the_round_trip_is_the_servers_time_in_milliseconds(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    connect(serve(echo_after(0.2)).port).send_chat("hello")
    (echo_row,) = rows.named("echo_response")
    assert 150 < echo_row["response_time"] < 50_000  # seconds would be 0.2, microseconds 200,000
    assert rows.named("send_chat")[0]["response_time"] < echo_row["response_time"] - 100


def test_tags_begin_with_the_identity_and_are_unique_across_clients_and_messages(
    serve: Serve, connect: Connect
) -> None:
    server = serve(echo)
    clients = [connect(server.port) for _ in range(20)]
    tags = set()
    for client, _ in itertools.product(clients, range(10)):
        echoed = client.send_chat("hello")
        assert isinstance(echoed, str)
        tag, _ = tag_and_text(echoed.encode())
        assert tag.startswith(f"{client.identity}.")
        tags.add(tag)
    assert len(tags) == 200


def test_wrong_settings_are_refused_with_what_to_write_instead(connect: Connect) -> None:
    wrong_settings: list[dict[str, Any]] = [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"echo": "maybe"},
        {"framing": ">i"},
    ]
    for settings in wrong_settings:
        with pytest.raises(ValueError, match=r"is not a valid [a-z-]+: use "):
            connect(1, **settings)
    with pytest.raises(ValueError, match=r"use full \(default\), tag, any or none"):
        connect(1).send_chat("hello", echo="maybe")  # type: ignore[arg-type]


def test_a_message_that_the_framing_cannot_carry_is_an_error_before_anything_is_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port)
    with pytest.raises(ValueError, match="line break"):
        client.send_chat("two\nlines")
    assert rows.counts() == {"connect": 1}
    assert client.send_chat("one line") is not None


def test_a_message_is_not_held_back_for_an_acknowledgement(serve: Serve, connect: Connect) -> None:
    server = serve(echo)
    connect(server.port).connect()
    connections = psutil.Process().net_connections("tcp")
    (descriptor,) = [c.fd for c in connections if c.raddr and c.raddr.port == server.port]
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_all_messages_that_are_ready_are_sent_before_anything_is_reported(
    connect: Connect, request_event: EventHook
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [connect(listener.getsockname()[1], echo="none") for _ in range(20)]
        connections: list[socket.socket] = []
        for client in clients:
            assert client.connect()
            connections.append(listener.accept()[0])
        have_arrived: list[int] = []

        def count_what_has_arrived(**row: object) -> None:
            readable, _, _ = select.select(connections, [], [], 0)
            have_arrived.append(len(readable))

        request_event.add_listener(count_what_has_arrived)
        gevent.joinall([gevent.spawn(client.send_chat, "hello") for client in clients])
        assert have_arrived == [20] * 20
        for connection in connections:
            connection.close()


# ------------------------------------------------------------------------------------- the truth


def test_an_echo_in_pieces_of_one_byte_passes(serve: Serve, connect: Connect, rows: Rows) -> None:
    client = connect(serve(echo_bytewise(pause=0)).port)
    assert str(client.send_chat("안녕하세요, 여러분")).endswith("안녕하세요, 여러분")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_the_echo_may_come_with_other_text_around_it(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: b"<alice> " + line + " (방금)\n".encode())
    client = connect(serve(server).port)
    assert client.send_chat("hello") == f"<alice> [{client.identity}.1] hello (방금)"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_banner_and_other_peoples_messages_are_never_taken_for_the_echo(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"Welcome to the chat!\r\n250 users\n")
        for line in lines(connection):
            connection.sendall(b"[00000000.1] hello\nbob: hello\n" * 10)
            gevent.sleep(0.1)
            connection.sendall(b"[00000000.2] hello\n" + line + b"\n[00000000.3] hello\n")

    client = connect(serve(server).port)
    for _ in range(3):
        assert str(client.send_chat("hello")).startswith(f"[{client.identity}")
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 3}
    assert min(row["response_time"] for row in rows.named("echo_response")) >= 50


def test_a_tag_that_begins_like_another_one_is_another_one(serve: Serve, connect: Connect) -> None:
    server = Answers(lambda line: line.replace(b"]", b"7]", 1) + b"\n" + line + b"\n")
    client = connect(serve(server).port, echo="tag")
    for number in range(1, 13):
        assert client.send_chat("hello") == f"[{client.identity}.{number}] hello"


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
            gevent.spawn_later(0.1, connection.sendall, line + b"\n")

    def chat(client: TCPSocketClient) -> None:
        for _ in range(5):
            client.send_chat("all the same")

    port = serve(server).port
    clients = [connect(port, timeout=30) for _ in range(10)]
    for client in clients:
        client.connect()
    gevent.joinall([gevent.spawn(chat, client) for client in clients])
    assert rows.counts() == {"connect": 10, "send_chat": 50, "echo_response": 50}
    assert min(row["response_time"] for row in rows.named("echo_response")) > 50


@pytest.mark.parametrize("size", [400, 1000])
def test_an_echo_cut_at_512_bytes_fails_at_once_each_time_and_only_then(
    serve: Serve, connect: Connect, rows: Rows, size: int
) -> None:
    client = connect(serve(Answers(lambda line: line[:512] + b"\n")).port, timeout=60)
    for _ in range(3):
        client.send_chat("x" * size)
        client.send_chat("short")
    expected = {"connect": 1, "send_chat": 6, "echo_response": 6}
    if size > 512:
        expected |= {"echo_response": 3, "echo_response: EchoTruncated": 3}
    assert rows.counts() == expected


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
    assert rows.counts()["echo_response: EchoAltered"] == 3


def test_an_echo_that_lacks_a_byte_in_the_middle_is_altered_not_truncated(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: line[:20] + line[21:] + b"\n")
    connect(serve(server).port).send_chat("abcdefghijklmnopqrstuvwxyz")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoAltered": 1}


def test_the_work_of_another_user_is_not_in_the_measured_time_nor_makes_it_a_timeout(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    waiting: list[tuple[socket.socket, bytes]] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            waiting.append((connection, line + b"\n"))
            if len(waiting) == 2:
                for other, text in waiting:  # both in one go
                    other.sendall(text)

    def user(client: TCPSocketClient) -> None:
        client.send_chat("hello")
        hold_up(0.8)

    port = serve(server).port
    clients = [connect(port, timeout=0.6), connect(port, timeout=0.6)]
    gevent.joinall([gevent.spawn(user, client) for client in clients])
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response": 2}
    assert max(row["response_time"] for row in rows.named("echo_response")) < 800


def test_an_echo_that_is_read_late_has_the_time_of_its_arrival_and_is_no_timeout(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo_and_hold_up(0.6)).port, timeout=0.5)
    for _ in range(2):
        assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}
    assert all(0 < row["response_time"] < 500 for row in rows.named("echo_response"))


def test_a_late_echo_is_not_credited_to_a_later_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        two_lines = list(itertools.islice(lines(connection), 2))
        for line in two_lines:
            connection.sendall(line + b"\n")

    client = connect(serve(server).port, timeout=0.5)
    assert client.send_chat("first") is None
    assert str(client.send_chat("second")).endswith("second")
    assert rows.counts()["echo_response: EchoTimeout"] == rows.counts()["echo_response"] == 1


def test_a_deadline_of_an_earlier_message_does_not_end_a_later_one(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        connection.sendall(next(arriving) + b"\n")
        slow = next(arriving)
        gevent.sleep(0.5)
        connection.sendall(slow + b"\n")

    client = connect(serve(server).port, timeout=1)
    client.send_chat("quick")
    gevent.sleep(0.7)
    client.send_chat("slow")  # under way when the time of the first is over
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}


def test_messages_that_arrive_while_idle_are_read_and_dropped(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    sent = Event()

    def server(connection: socket.socket) -> None:
        connection.sendall(next(lines(connection)) + b"\n")
        for _ in range(2000):  # more than the buffers of the kernel hold
            connection.sendall(b"someone: " + b"x" * 4000 + b"\n")
        sent.set()
        echo(connection)

    client = connect(serve(server).port)
    client.send_chat("hello")
    assert sent.wait(60)
    assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}


# ----------------------------------------------------------------------------------------- modes


def test_mode_tag_accepts_a_reformatted_message_and_waits_for_the_tag(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: b"noise\n<b>" + line.replace(b"hello", b"***") + b"</b>\n")
    client = connect(serve(server).port, echo="tag")
    assert client.send_chat("hello") == f"<b>[{client.identity}.1] ***</b>"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_mode_any_sends_untagged_and_takes_the_next_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(with_ok)
    assert connect(serve(server).port, echo="any").send_chat("hello") == "OK"
    assert server.received == [b"hello"]
    assert rows[-1]["response_length"] == 2


def test_mode_any_does_not_take_what_came_before_the_send(serve: Serve, connect: Connect) -> None:
    server = Answers(in_turn(b"first\nsecond\n", b"third\n"))
    client = connect(serve(server).port, echo="any")
    assert client.send_chat("hello") == "first"
    assert client.send_chat("hello") == "third"


def test_mode_any_does_not_take_what_the_kernel_had_already_received(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(listener.getsockname()[1], echo="any")
        client.connect()
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"early\n")  # nothing has let the event loop run since
            gevent.spawn(lambda: connection.sendall(connection.recv(100).upper()))
            assert client.send_chat("hello") == "HELLO"


def test_mode_none_sends_tagged_awaits_nothing_and_drops_what_comes(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: b"chatter\n" * 100)
    client = connect(serve(server).port, echo="none")
    assert [client.send_chat(f"hello {number}") for number in range(3)] == [None] * 3
    wait_until(lambda: len(server.received) == 3)
    sent_texts = [tag_and_text(line)[1] for line in server.received]
    assert sent_texts == ["hello 0", "hello 1", "hello 2"]
    assert rows.counts() == {"connect": 1, "send_chat": 3}


def test_a_command_in_mode_none_awaits_nothing(serve: Serve, connect: Connect, rows: Rows) -> None:
    assert connect(serve(Answers(with_ok)).port, echo="none").send_chat("/away") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1}


def test_the_mode_of_one_call_wins_over_the_clients(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(Answers(with_ok)).port, timeout=0.5)
    assert client.send_chat("hello", echo="any") == "OK"
    assert client.send_chat("hello", echo="none") is None
    assert client.send_chat("hello") is None
    expected = {"connect": 1, "send_chat": 3, "echo_response": 1, "echo_response: EchoTimeout": 1}
    assert rows.counts() == expected


@pytest.mark.parametrize("mode", ["full", "tag", "any"])
def test_a_command_is_sent_untouched_and_any_message_answers_it(
    serve: Serve, connect: Connect, mode: EchoMode
) -> None:
    server = Answers(with_ok)
    assert connect(serve(server).port, echo=mode).send_chat("/who all") == "OK"
    assert server.received == [b"/who all"]


def test_after_a_timeout_a_tagged_connection_stays_and_an_untagged_one_is_closed(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    tagged_server = serve(silent)
    untagged_server = serve(silent)
    tagged = connect(tagged_server.port, timeout=0.1)
    untagged = connect(untagged_server.port, timeout=0.1, echo="any")
    for client in (tagged, untagged, tagged, untagged):
        client.send_chat("hello")
    assert tagged_server.opened == 1
    assert untagged_server.opened == 2
    assert rows.counts() == {"connect": 3, "send_chat": 4, "echo_response: EchoTimeout": 4}


def test_bytes_that_are_no_utf_8_are_returned_as_replacement_characters(
    serve: Serve, connect: Connect
) -> None:
    client = connect(serve(Answers(lambda line: b"\xff\xfe ok\n")).port, echo="any")
    assert client.send_chat("hello") == "\ufffd\ufffd ok"


# -------------------------------------------------------------------------- framing and composing


@pytest.mark.parametrize("name", [">I", "<H"])
def test_a_length_prefix_frames_both_ways(
    serve: Serve, connect: Connect, rows: Rows, name: str
) -> None:
    client = connect(serve(echo).port, framing=name)
    assert str(client.send_chat("two\nlines")).endswith("two\nlines")
    sent_length = rows.named("send_chat")[0]["response_length"]
    echo_length = rows.named("echo_response")[0]["response_length"]
    assert sent_length == struct.calcsize(name) + echo_length


def test_an_empty_message_without_a_delimiter_is_refused_as_it_would_send_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port, framing="raw")
    with pytest.raises(ValueError, match="an empty message sends nothing"):
        client.send_chat(b"")
    assert rows.counts() == {"connect": 1}


@pytest.mark.parametrize(("name", "ending"), [("line", b"o\n"), ("crlf", b"\r\n"), ("raw", b"lo")])
def test_a_framing_ends_what_is_sent_its_own_way(
    serve: Serve, connect: Connect, name: str, ending: bytes
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            received.extend(data)
            connection.sendall(data)

    assert str(connect(serve(server).port, framing=name).send_chat("hello")).endswith("hello")
    assert received[-2:] == ending


class Telegram:
    """A custom framing: messages end with STOP."""

    def __init__(self) -> None:
        self.rest = b""

    def encode(self, payload: bytes) -> bytes:
        return payload + b" STOP "

    def feed(self, data: bytes) -> Iterable[bytes]:
        *complete, self.rest = (self.rest + data).split(b" STOP ")
        return complete


def test_a_custom_framing_is_made_anew_for_each_connection(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1024) + b"half a mess")

    client = connect(serve(server).port, framing=Telegram)
    for count in (1, 2):
        assert str(client.send_chat("hello")).endswith("hello")
        wait_until(lambda: client.connected_since is None)
        assert rows.counts()["echo_response"] == count


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"hostile", 0, 1, "hostile bytes"),
        BlockingIOError("hostile"),  # what a socket raises that has nothing to read
        StopIteration("hostile"),
    ],
)
def test_an_error_in_a_custom_framing_is_a_failed_request_without_the_servers_bytes(
    serve: Serve, connect: Connect, rows: Rows, error: Exception
) -> None:
    class Broken(LineFraming):
        def feed(self, data: bytes) -> list[bytes]:
            raise error

    client = connect(serve(echo).port, framing=Broken)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: FramingError": 1}
    assert "hostile" not in repr(rows[-1]["exception"])
    assert client.connected_since is None


def test_compose_and_on_connect_make_another_protocol(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def pong(line: bytes) -> bytes:
        word, _, text = line.partition(b" ")
        if word == b"LOGIN":
            return b"OK welcome\n"
        return b"server PONG " + text + b"\n"

    server = Answers(pong)
    client: TCPSocketClient = connect(
        serve(server).port,
        echo="tag",
        compose=lambda tag, message: f"PING :{tag} {message}",
        on_connect=lambda: client.send_chat("LOGIN alice", echo="any"),
    )
    assert client.send_chat("hello") == f"server PONG :{client.identity}.1 hello"
    assert server.received[0] == b"LOGIN alice"
    assert rows.counts() == {"connect": 1, "send_chat": 2, "login": 1, "echo_response": 1}
