"""``--chat-delivery``: the time from one user's sending to another's arrival."""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from conftest import LOCUST, ROOT, Program, Rows, Server, free_port, lines, wait_until
from locust.env import Environment

import locustfile
from locustfile import LONG_TEXTS, MACHINE, SHORT_TEXTS, VERY_LONG_TEXTS, ChatClient, TCPSocketClient

Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]
Start = Callable[..., Program]


class Room:
    """A chat room: every line goes to everybody in it, its sender included, after so many seconds."""

    def __init__(self, delay: float = 0.0, times: int = 1) -> None:
        self.members: list[socket.socket] = []
        self.lines: list[bytes] = []
        self._delay, self._times = delay, times

    def __call__(self, connection: socket.socket) -> None:
        self.members.append(connection)
        try:
            for line in lines(connection):
                self.lines.append(line)
                gevent.sleep(self._delay)
                for member in list(self.members):
                    member.sendall((line + b"\n") * self._times)
        finally:
            self.members.remove(connection)


def people(connect: Connect, server: Server, count: int, **settings: Any) -> list[TCPSocketClient]:
    """Return clients that are in the room."""
    clients = [connect(server.port, delivery=True, **settings) for _ in range(count)]
    assert all(client.connect() for client in clients)
    wait_until(lambda: server.open == count)
    return clients


def other_machine(line: str) -> str:
    return re.sub(rf"\.{MACHINE}\b", ".0123456" if MACHINE != "0123456" else ".6543210", line)


def test_a_message_is_delivered_to_everybody_but_its_sender(serve: Serve, connect: Connect, rows: Rows) -> None:
    clients = people(connect, serve(Room()), 5)
    for client in clients:
        assert str(client.send_chat("hello")).endswith("hello")
    wait_until(lambda: len(rows.named("delivery")) >= 5 * 4)
    gevent.sleep(0.1)  # for more than these
    assert rows.counts() == {"connect": 5, "send_chat": 5, "echo_response": 5, "delivery": 5 * 4}


def test_its_time_is_from_the_sending_to_the_arrival(serve: Serve, connect: Connect, rows: Rows) -> None:
    first, *_ = people(connect, serve(Room(delay=0.2)), 2)
    assert first.send_chat("hello")
    wait_until(lambda: rows.named("delivery"))
    (delivery,), (echo,) = rows.named("delivery"), rows.named("echo_response")
    assert 200 <= delivery["response_time"] < 1500
    assert abs(delivery["response_time"] - echo["response_time"]) < 100
    assert delivery["response_length"] == echo["response_length"]
    assert (delivery["request_type"], delivery["exception"]) == ("TCP", None)


def test_work_of_the_receivers_user_is_not_in_the_time(serve: Serve, connect: Connect, rows: Rows) -> None:
    """The second user is awaiting an echo of its own that never comes."""
    room = Room()

    def server(connection: socket.socket) -> None:
        if room.members:
            room.members.append(connection)
            gevent.sleep(10)
        else:
            room(connection)

    instance = serve(server)
    first, second = people(connect, instance, 2, timeout=1.0)
    waiting = gevent.spawn(second.send_chat, "nobody answers")
    assert first.send_chat("hello")
    wait_until(lambda: rows.named("delivery"))
    assert rows.named("delivery")[0]["response_time"] < 500
    waiting.join()
    assert rows.counts()["echo_response: EchoTimeout"] == 1


def test_a_message_that_comes_twice_counts_once(serve: Serve, connect: Connect, rows: Rows) -> None:
    first, *_ = people(connect, serve(Room(times=3)), 2)
    for _ in range(3):
        assert first.send_chat("hello")
    wait_until(lambda: len(rows.named("delivery")) >= 3)
    gevent.sleep(0.1)
    assert rows.counts()["delivery"] == 3


def test_what_came_twice_is_forgotten_after_a_thousand_others(serve: Serve, connect: Connect) -> None:
    first, second = people(connect, serve(Room()), 2)
    for _ in range(1100):
        first.send_chat("hello")
    wait_until(lambda: second._seen is not None and len(second._seen) == 1000)


def test_history_is_no_delivery(serve: Serve, connect: Connect, rows: Rows) -> None:
    """A server that tells newcomers what was said before."""
    room = Room()

    def server(connection: socket.socket) -> None:
        for line in room.lines:
            connection.sendall(line + b"\n")
        connection.sendall(b"end of history\n")
        room(connection)

    instance = serve(server)
    (first,) = people(connect, instance, 1)
    first.send_chat("before")
    second = connect(instance.port, delivery=True, echo="any")
    assert second.connect()
    wait_until(lambda: instance.open == 2)
    assert first.send_chat("after")
    wait_until(lambda: rows.named("delivery"))
    assert rows.counts()["delivery"] == 1


def test_a_message_from_another_machine_counts_without_a_time(serve: Serve, connect: Connect, rows: Rows) -> None:
    room = Room()

    def server(connection: socket.socket) -> None:
        if not room.members:
            return room(connection)
        for line in lines(connection):
            room.members[0].sendall(other_machine(line.decode()).encode() + b"\n")

    first, second = people(connect, serve(server), 2, echo="none")
    wait_until(lambda: len(room.members) == 1)
    sender = second if room.members else first
    for client in (first, second):
        client.send_chat("hello")
    assert sender is second
    wait_until(lambda: rows.named("delivery"))
    assert [row["response_time"] for row in rows.named("delivery")] == [None]


def test_messages_that_await_no_echo_are_timed_too(serve: Serve, connect: Connect, rows: Rows) -> None:
    room = Room()
    first, *_ = people(connect, serve(room), 3, echo="none")
    first.send_chat("hello")
    first.send_chat("/command")
    first.send_chat("LOGIN kim", echo="none")
    first.send_chat("bye")
    wait_until(lambda: len(rows.named("delivery")) == 4)
    assert room.lines[1:3] == [b"/command", b"LOGIN kim"]  # a command, and a mode of its own: sent as they are


def test_two_deliveries_in_one_read_are_two(serve: Serve, connect: Connect, rows: Rows) -> None:
    kept: list[bytes] = []
    members: list[socket.socket] = []

    def server(connection: socket.socket) -> None:
        members.append(connection)
        for line in lines(connection):
            kept.append(line + b"\n")

    first, *_ = people(connect, serve(server), 2, echo="none")
    wait_until(lambda: len(members) == 2)
    for _ in range(3):
        first.send_chat("hello")
    wait_until(lambda: len(kept) == 3)
    for member in members:
        member.sendall(b"".join(kept))
    wait_until(lambda: rows.named("delivery"))
    gevent.sleep(0.1)
    assert rows.counts()["delivery"] == 3


def test_a_listener_may_block_and_delays_no_echo(
    serve: Serve, connect: Connect, rows: Rows, request_event: Any
) -> None:
    ended: list[str] = []

    def listener(name: str, **_: Any) -> None:
        if name == "delivery":
            gevent.sleep(0.5)
            ended.append(name)

    request_event.add_listener(listener)
    first, second = people(connect, serve(Room()), 2)
    for client in (first, second) * 3:
        assert client.send_chat("hello")
    assert max(row["response_time"] for row in rows.named("echo_response")) < 400
    wait_until(lambda: len(ended) == 6)


def test_off_nothing_is_added_to_the_tag_and_nothing_reported(serve: Serve, connect: Connect, rows: Rows) -> None:
    room = Room()
    server = serve(room)
    clients = [connect(server.port) for _ in range(2)]
    assert all(client.connect() for client in clients)
    wait_until(lambda: len(room.members) == 2)
    assert clients[0].send_chat("hello") and clients[1].send_chat("hello")
    assert re.fullmatch(rb"\[[0-9a-f]{8}\.1\] hello", room.lines[0])
    assert rows.counts()["delivery"] == 0


def test_with_the_longer_tag_the_texts_keep_their_sizes() -> None:
    tag = f"{'f' * 8}.999999.{'f' * 8}.{MACHINE}"
    assert max(len(TCPSocketClient.compose(tag, text).encode()) + 1 for text in SHORT_TEXTS) <= 61
    assert all(100 <= len(TCPSocketClient.compose(tag, text).encode()) <= 400 for text in LONG_TEXTS)
    assert all(513 <= len(TCPSocketClient.compose(tag, text).encode()) <= 1000 for text in VERY_LONG_TEXTS)


def test_the_clock_of_the_tag_may_turn_over(serve: Serve, connect: Connect, rows: Rows, monkeypatch: Any) -> None:
    """Its 32 bits are through after twelve hours."""
    real, turn = time.perf_counter, 2**32 / 1e5
    for seconds in (-0.05, 5):  # just before it, so that the message arrives after it; and after it
        offset = turn - real() + seconds
        monkeypatch.setattr(locustfile, "perf_counter", lambda offset=offset: real() + offset)
        rows.clear()
        first, *_ = people(connect, serve(Room(delay=0.1)), 2)
        assert first.send_chat("hello")
        wait_until(lambda: rows.named("delivery"))
        assert 90 <= rows.named("delivery")[0]["response_time"] < 1500


@pytest.mark.skipif(not locustfile.BOOT_ID.exists(), reason="needs Linux")
def test_processes_that_were_started_apart_know_that_they_share_a_clock() -> None:
    code = "import locustfile; print(locustfile.MACHINE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == MACHINE


def test_a_room_of_two_processes_counts_messages_times_the_others_and_times_them_all(start: Start) -> None:
    port, room = str(free_port()), Room()
    server = Server(room)
    run = "--headless --users=6 --spawn-rate=6 --run-time=4s --stop-timeout=3 --processes=2 --chat-wait=0.2 --json"
    bus = f"--master-bind-port={port} --master-port={port}"
    running = start(*LOCUST, f"--host={server.address}", "--chat-delivery", *run.split(), *bus.split())
    assert running.ends() == 0
    server.stop()
    output = "\n" + running.output
    entries, _ = json.JSONDecoder().raw_decode(output[output.index("\n[\n") + 1 :])
    deliveries = next(entry for entry in entries if entry["name"] == "delivery")
    assert len(room.lines) > 40
    assert deliveries["num_failures"] == deliveries["num_none_requests"] == 0
    # While the users start and stop, not all of them are there.
    assert len(room.lines) * 4 < deliveries["num_requests"] <= len(room.lines) * 5
    assert 0 < deliveries["total_response_time"] / deliveries["num_requests"] < 1000


def test_the_option_reaches_the_users() -> None:
    options = argparse.Namespace(chat_delivery=True)
    assert ChatClient(Environment(host="a:1", parsed_options=options)).client._seen is not None
    assert ChatClient(Environment(host="a:1")).client._seen is None
