"""One client and its messages: what is sent, what counts as the echo, and what is measured."""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

import gevent
import psutil
import pytest
from clients import Connect, at_once, text_of
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
    port_of,
    silent,
)

from locustfile import EchoMode, LineFraming, TCPSocketClient

TAGGED = re.compile(r"\[([0-9a-f]{8}\.\d+)\] .*", re.DOTALL)


def tag_of(message: str) -> str:
    """Return the tag of a message, which has to stand before its text and a space."""
    match = TAGGED.fullmatch(message)
    assert match is not None, message
    return match[1]


def with_ok(line: bytes) -> bytes:
    """Answer a line with OK."""
    return b"OK\n"


def test_the_attributes_of_a_client_share_their_names_with_those_of_others(
    serve: Serve, connect: Connect
) -> None:
    """Python does so for up to 29: with one more, each user takes 1.3 KB more."""
    clients = [connect(serve(echo).port) for _ in range(3)]
    for client in clients:
        assert client.send_chat("hello") is not None
    assert sys.getsizeof(vars(clients[-1])) < 500


# ------------------------------------------------------------------------------------- a message


def test_a_message_gives_three_rows_and_returns_the_echoed_text(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: line + b"\r\n")
    client = connect(serve(server).port)
    echoed = client.send_chat("안녕하세요")
    (received,) = server.received
    tag = tag_of(received.decode())
    assert received.decode() == f"[{tag}] 안녕하세요"
    assert echoed == f"[{tag}] 안녕하세요"
    connected, sent, answered = rows
    assert connected["name"] == "connect"
    assert connected["response_length"] == 0
    assert sent["name"] == "send_chat"
    assert sent["response_length"] == len(received) + 1
    assert answered["name"] == "echo_response"
    assert answered["response_length"] == len(received)
    assert answered["response_time"] >= sent["response_time"]
    for row in rows:
        assert row["request_type"] == "TCP"
        assert row["exception"] is None
        assert row["response_time"] > 0
        assert type(row["response_length"]) is int


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
    server = serve(echo_after(0.2))
    connect(server.port).send_chat("hello")
    (send_time,) = rows.times("send_chat")
    (echo_time,) = rows.times("echo_response")
    assert 150 < echo_time < 50_000  # seconds would be 0.2, microseconds 200,000
    assert send_time < echo_time - 100


def test_tags_begin_with_the_identity_and_are_unique_across_clients_and_messages(
    serve: Serve, connect: Connect
) -> None:
    server = serve(echo)
    clients = [connect(server.port) for _ in range(20)]
    tags = set()
    for client in clients:
        for _ in range(10):
            echoed = client.send_chat("hello")
            assert isinstance(echoed, str)
            tag = tag_of(echoed)
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


def descriptors_to(port: int) -> list[int]:
    """Return the file descriptors of the connections that this process has made to a port."""
    descriptors = []
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            descriptors.append(connection.fd)
    return descriptors


def test_a_message_is_not_held_back_for_an_acknowledgement(serve: Serve, connect: Connect) -> None:
    server = serve(echo)
    connect(server.port).connect()
    (descriptor,) = descriptors_to(server.port)
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_all_messages_that_are_ready_are_sent_before_anything_is_reported(
    connect: Connect, request_event: EventHook
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients: list[TCPSocketClient] = []
        connections: list[socket.socket] = []
        for _ in range(20):
            client = connect(port_of(listener), echo="none")
            assert client.connect()
            connection, _ = listener.accept()
            clients.append(client)
            connections.append(connection)
        have_arrived: list[int] = []

        def count_what_has_arrived(**row: object) -> None:
            readable, _, _ = select.select(connections, [], [], 0)
            have_arrived.append(len(readable))

        request_event.add_listener(count_what_has_arrived)
        at_once(lambda client: client.send_chat("hello"), clients)
        assert have_arrived == [20] * 20
        for connection in connections:
            connection.close()


# ------------------------------------------------------------------------------------- the truth


def test_an_echo_in_pieces_of_one_byte_passes(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(echo_bytewise(pause=0))
    echoed = connect(server.port).send_chat("안녕하세요, 여러분")
    assert text_of(echoed) == "안녕하세요, 여러분"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_the_echo_may_come_with_other_text_around_it(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def of_alice(line: bytes) -> bytes:
        return b"<alice> " + line + " (방금)\n".encode()

    server = serve(Answers(of_alice))
    client = connect(server.port)
    echoed = client.send_chat("hello")
    assert echoed == f"<alice> [{client.identity}.1] hello (방금)"
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
    for number in (1, 2, 3):
        echoed = client.send_chat("hello")
        assert echoed == f"[{client.identity}.{number}] hello"
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 3}
    assert min(rows.times("echo_response")) >= 50


def test_a_tag_that_begins_like_another_one_is_another_one(serve: Serve, connect: Connect) -> None:
    def with_a_longer_tag_first(line: bytes) -> bytes:
        longer = line.replace(b"]", b"7]", 1)
        return longer + b"\n" + line + b"\n"

    server = serve(Answers(with_a_longer_tag_first))
    client = connect(server.port, echo="tag")
    for number in range(1, 13):
        echoed = client.send_chat("hello")
        assert echoed == f"[{client.identity}.{number}] hello"


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
    at_once(chat, clients)
    assert rows.counts() == {"connect": 10, "send_chat": 50, "echo_response": 50}
    assert min(rows.times("echo_response")) > 50


@pytest.mark.parametrize("size", [400, 1000])
def test_an_echo_cut_at_512_bytes_fails_at_once_each_time_and_only_then(
    serve: Serve, connect: Connect, rows: Rows, size: int
) -> None:
    def cut(line: bytes) -> bytes:
        return line[:512] + b"\n"

    server = serve(Answers(cut))
    client = connect(server.port, timeout=60)
    for _ in range(3):
        client.send_chat("x" * size)
        client.send_chat("short")
    failures = ["echo_response: EchoTruncated"] * 3 if size > 512 else []
    assert rows.failures() == failures
    counts = rows.counts()
    assert counts["connect"] == 1
    assert counts["send_chat"] == 6
    assert counts["echo_response"] == 6 - len(failures)


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
    for _ in range(3):
        assert client.send_chat("a" * 60) is not None
        assert client.send_chat("a" * 60) is None
    assert rows.counts()["echo_response: EchoAltered"] == 3


def test_an_echo_that_lacks_a_byte_in_the_middle_is_altered_not_truncated(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def with_a_byte_less(line: bytes) -> bytes:
        return line[:20] + line[21:] + b"\n"

    server = serve(Answers(with_a_byte_less))
    connect(server.port).send_chat("abcdefghijklmnopqrstuvwxyz")
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: EchoAltered": 1,
    }


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
    at_once(user, clients)
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response": 2}
    assert max(rows.times("echo_response")) < 800


def test_an_echo_that_is_read_late_has_the_time_of_its_arrival_and_is_no_timeout(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(echo_and_hold_up(0.6))
    client = connect(server.port, timeout=0.5)
    for _ in range(2):
        assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 2}
    for echo_time in rows.times("echo_response"):
        assert 0 < echo_time < 500


def test_a_late_echo_is_not_credited_to_a_later_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        first = next(arriving)
        second = next(arriving)
        connection.sendall(first + b"\n")
        connection.sendall(second + b"\n")

    client = connect(serve(server).port, timeout=0.5)
    assert client.send_chat("first") is None
    echoed = client.send_chat("second")
    assert text_of(echoed) == "second"
    assert rows.failures() == ["echo_response: EchoTimeout"]
    assert rows.counts()["echo_response"] == 1


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
        first = next(lines(connection))
        connection.sendall(first + b"\n")
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
    def with_stars_in_bold(line: bytes) -> bytes:
        text = line.replace(b"hello", b"***")
        return b"noise\n<b>" + text + b"</b>\n"

    server = serve(Answers(with_stars_in_bold))
    client = connect(server.port, echo="tag")
    echoed = client.send_chat("hello")
    assert echoed == f"<b>[{client.identity}.1] ***</b>"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_mode_any_sends_untagged_and_takes_the_next_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(with_ok)
    client = connect(serve(server).port, echo="any")
    assert client.send_chat("hello") == "OK"
    assert server.received == [b"hello"]
    assert rows[-1]["response_length"] == 2


def test_mode_any_does_not_take_what_came_before_the_send(serve: Serve, connect: Connect) -> None:
    server = Answers(in_turn(b"first\nsecond\n", b"third\n"))
    client = connect(serve(server).port, echo="any")
    assert client.send_chat("hello") == "first"
    assert client.send_chat("hello") == "third"


def test_mode_any_does_not_take_what_the_kernel_had_already_received(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(port_of(listener), echo="any")
        client.connect()
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"early\n")  # nothing has let the event loop run since
            gevent.spawn(answer_in_capitals, connection)
            assert client.send_chat("hello") == "HELLO"


def answer_in_capitals(connection: socket.socket) -> None:
    """Answer what has come."""
    received = connection.recv(100)
    connection.sendall(received.upper())


def test_mode_none_sends_tagged_awaits_nothing_and_drops_what_comes(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: b"chatter\n" * 100)
    client = connect(serve(server).port, echo="none")
    for _ in range(3):
        assert client.send_chat("hello") is None
    wait_until(lambda: len(server.received) == 3)
    for number, line in enumerate(server.received, 1):
        expected = f"[{client.identity}.{number}] hello"
        assert line.decode() == expected
    assert rows.counts() == {"connect": 1, "send_chat": 3}


def test_a_command_in_mode_none_awaits_nothing(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(Answers(with_ok))
    client = connect(server.port, echo="none")
    assert client.send_chat("/away") is None
    assert rows.counts() == {"connect": 1, "send_chat": 1}


def test_the_mode_of_one_call_wins_over_the_clients(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(Answers(with_ok))
    client = connect(server.port, timeout=0.5)
    assert client.send_chat("hello", echo="any") == "OK"
    assert client.send_chat("hello", echo="none") is None
    assert client.send_chat("hello") is None
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 3,
        "echo_response": 1,
        "echo_response: EchoTimeout": 1,
    }


@pytest.mark.parametrize("mode", ["full", "tag", "any"])
def test_a_command_is_sent_untouched_and_any_message_answers_it(
    serve: Serve, connect: Connect, mode: EchoMode
) -> None:
    server = Answers(with_ok)
    client = connect(serve(server).port, echo=mode)
    assert client.send_chat("/who all") == "OK"
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
    assert rows.counts() == {
        "connect": 3,
        "send_chat": 4,
        "echo_response: EchoTimeout": 4,
    }


def test_bytes_that_are_no_utf_8_are_returned_as_replacement_characters(
    serve: Serve, connect: Connect
) -> None:
    server = serve(Answers(lambda line: b"\xff\xfe ok\n"))
    client = connect(server.port, echo="any")
    assert client.send_chat("hello") == "\ufffd\ufffd ok"


# -------------------------------------------------------------------------- framing and composing


@pytest.mark.parametrize("name", [">I", "<H"])
def test_a_length_prefix_frames_both_ways(
    serve: Serve, connect: Connect, rows: Rows, name: str
) -> None:
    client = connect(serve(echo).port, framing=name)
    echoed = client.send_chat("two\nlines")
    assert text_of(echoed) == "two\nlines"
    _, sent, answered = rows
    prefix = struct.calcsize(name)
    assert sent["response_length"] == prefix + answered["response_length"]


def test_an_empty_message_without_a_delimiter_is_refused_as_it_would_send_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port, framing="raw")
    with pytest.raises(ValueError, match="an empty message sends nothing"):
        client.send_chat(b"")
    assert rows.counts() == {"connect": 1}


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("line", b"o\n"),
        ("crlf", b"\r\n"),
        ("raw", b"lo"),
    ],
)
def test_a_framing_ends_what_is_sent_its_own_way(
    serve: Serve, connect: Connect, name: str, ending: bytes
) -> None:
    received = bytearray()

    def server(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            received.extend(data)
            connection.sendall(data)

    client = connect(serve(server).port, framing=name)
    echoed = client.send_chat("hello")
    assert text_of(echoed) == "hello"
    assert received[-2:] == ending


class Telegram:
    """A custom framing: messages end with STOP."""

    def __init__(self) -> None:
        self.rest = b""

    def encode(self, payload: bytes) -> bytes:
        return payload + b" STOP "

    def feed(self, data: bytes) -> Iterable[bytes]:
        pieces = (self.rest + data).split(b" STOP ")
        self.rest = pieces.pop()
        return pieces


def test_a_custom_framing_is_made_anew_for_each_connection(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        received = connection.recv(1024)
        connection.sendall(received + b"half a mess")

    client = connect(serve(server).port, framing=Telegram)
    for count in (1, 2):
        echoed = client.send_chat("hello")
        assert text_of(echoed) == "hello"
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
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: FramingError": 1,
    }
    (text,) = rows.error_texts()
    assert "hostile" not in text
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
    echoed = client.send_chat("hello")
    assert echoed == f"server PONG :{client.identity}.1 hello"
    assert server.received[0] == b"LOGIN alice"
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 2,
        "login": 1,
        "echo_response": 1,
    }
