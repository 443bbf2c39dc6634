"""What no exchange takes goes to ``on_message``: PINGs, broadcasts, slow and failing handlers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent
import greenlet  # type: ignore[import-untyped]
import pytest
from clients import Connect, Inbox, text_of
from gevent.event import Event
from locust import constant, task
from locust.event import EventHook
from locust.exception import StopUser
from programs import wait_until
from rows import Rows, RunUsers
from servers import Answers, Serve, greets, hold_up, lines, says, silent, with_the_line

from locustfile import ChatHooks, TCPChatUser


def is_ping(line: bytes) -> bool:
    return line.startswith(b"PING ")


def sleep_long(payload: bytes, arrived: float) -> None:
    """Handle a message, and never come to an end."""
    gevent.sleep(3600)


def with_news(line: bytes) -> bytes:
    """Answer a line with a broadcast and itself."""
    return b"news\n" + line + b"\n"


class PongUser(TCPChatUser):
    """A user that answers a PING, as one of IRC does."""

    abstract = True
    wait_time = constant(0)

    def on_message(self, payload: bytes, arrived: float) -> None:
        if is_ping(payload):
            pong = payload.replace(b"PING", b"PONG")
            self.client.send_chat(pong, echo="none")


# --------------------------------------------------------------------------------------- PING, PONG


def test_a_ping_is_answered_while_the_user_is_idle(serve: Serve, run_users: RunUsers) -> None:
    received: list[bytes] = []

    class Idle(PongUser):
        @task
        def nothing(self) -> None:
            gevent.sleep(60)

    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        for number in range(3):
            connection.sendall(b"PING %d\n" % number)
            received.append(next(arriving))

    run_users(Idle, serve(server).address)
    wait_until(lambda: received == [b"PONG 0", b"PONG 1", b"PONG 2"])


def test_a_ping_is_answered_while_the_user_awaits_an_echo(
    serve: Serve, run_users: RunUsers
) -> None:
    received: list[bytes] = []

    class Chatting(PongUser):
        @task
        def talk(self) -> None:
            self.client.send_chat("hello")

    def server(connection: socket.socket) -> None:
        """Echo a message only after the PING that came in its place has been answered."""
        arriving = lines(connection)
        for line in arriving:
            connection.sendall(b"PING 1\n")
            received.append(next(arriving))
            connection.sendall(line + b"\n")

    run = run_users(Chatting, serve(server).address)
    wait_until(lambda: run.count("echo_response") > 3)
    assert set(received) == {b"PONG 1"}
    assert not run.errors


def test_a_ping_is_answered_during_the_login(serve: Serve, run_users: RunUsers) -> None:
    class LoggingIn(PongUser):
        def on_connect(self) -> None:
            self.client.send_chat(b"NICK me", echo=lambda line: line == b"WELCOME")

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")

    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        assert next(arriving) == b"NICK me"
        connection.sendall(b"PING 1\n")
        if next(arriving) == b"PONG 1":
            connection.sendall(b"WELCOME\n")
        for line in arriving:
            connection.sendall(line + b"\n")

    run = run_users(LoggingIn, serve(server).address)
    wait_until(lambda: run.count("echo_response") > 3)
    assert run.count("login") == 1
    assert not run.errors


# ------------------------------------------------------------------------------ what is handed over


def test_banners_broadcasts_and_late_echoes_come_in_order_and_echoes_do_not(
    serve: Serve, connect: Connect
) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"welcome\n")
        arriving = lines(connection)
        late = next(arriving)
        for line in arriving:
            news = b"before\n" + late + b"\n<me> " + line + b"\nafter\n"
            connection.sendall(news)

    inbox = Inbox()
    client = connect(serve(server).port, timeout=0.3, on_message=inbox.take)
    assert client.send_chat("late") is None
    assert client.send_chat("in time") is not None
    wait_until(lambda: b"after" in inbox)
    late = f"[{client.identity}.1] late".encode()
    assert inbox == [b"welcome", b"before", late, b"after"]


def test_arrived_is_when_the_message_came_however_late_it_is_read_and_handled(
    serve: Serve, connect: Connect
) -> None:
    said: list[float] = []

    def server(connection: socket.socket) -> None:
        connection.sendall(b"one\ntwo\n")
        said.append(time.perf_counter())
        hold_up(0.3)
        silent(connection)  # a hang-up would be later than the last byte, and count as it

    arrivals: list[float] = []
    handled: list[float] = []

    def slow(payload: bytes, arrived: float) -> None:
        arrivals.append(arrived)
        handled.append(time.perf_counter())
        gevent.sleep(0.3)

    client = connect(serve(server).port, on_message=slow)
    started = time.perf_counter()
    client.connect()
    wait_until(lambda: len(handled) == 2)
    arrived, second_arrived = arrivals
    assert second_arrived == arrived
    assert started <= arrived < said[0] + 0.2
    first_handled, second_handled = handled
    assert first_handled > arrived + 0.2
    assert second_handled > first_handled + 0.2


@contextmanager
def noted_switches() -> Iterator[set[greenlet.greenlet]]:
    """Collect the greenlets that run within the context."""
    running: set[greenlet.greenlet] = set()

    def note(event: str, switch: tuple[greenlet.greenlet, greenlet.greenlet]) -> None:
        _, target = switch
        running.add(target)

    before = greenlet.settrace(note)
    try:
        yield running
    finally:
        greenlet.settrace(before)


def test_without_on_message_what_nobody_awaits_is_dropped_and_no_greenlet_runs_for_it(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """A user without the hook pays nothing; one with it shows that a greenlet would be seen."""
    servers: list[greenlet.greenlet] = []

    def server(connection: socket.socket) -> None:
        servers.append(gevent.getcurrent())
        for line in lines(connection):
            connection.sendall(b"news\n" * 200 + line + b"\n")

    port = serve(server).port
    known = {gevent.getcurrent(), gevent.get_hub()}
    for hooks, others in ({}, 0), ({"on_message": Inbox().take}, 1):
        client = connect(port, **hooks)
        client.connect()
        wait_until(lambda: len(servers) == len(rows.named("connect")))
        with noted_switches() as running:
            assert client.send_chat("hello") is not None
        more = running.difference(known, servers)
        assert len(more) == others
    assert rows.counts() == {"connect": 2, "send_chat": 2, "echo_response": 2}


def test_a_user_class_that_leaves_on_message_alone_never_has_it_called(
    serve: Serve, run_users: RunUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bytes] = []

    def on_message(hooks: ChatHooks, payload: bytes, arrived: float) -> None:
        calls.append(payload)

    monkeypatch.setattr(ChatHooks, "on_message", on_message)

    class Quiet(TCPChatUser):
        wait_time = constant(0)

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")

    server = serve(Answers(with_news))
    run = run_users(Quiet, server.address)
    wait_until(lambda: run.count("echo_response") > 3)
    assert not calls


# --------------------------------------------------------------------------------- what handlers do


def test_a_handler_that_sleeps_holds_up_no_echo_and_keeps_the_order(
    serve: Serve, connect: Connect
) -> None:
    inbox = Inbox()
    go_on = Event()

    def sleepy(payload: bytes, arrived: float) -> None:
        go_on.wait()
        inbox.take(payload, arrived)

    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            news = b"news %d\n" % number
            connection.sendall(news + line + b"\n")

    client = connect(serve(server).port, on_message=sleepy)
    for _ in range(3):
        assert client.send_chat("hello") is not None
    assert not inbox
    go_on.set()
    wait_until(lambda: len(inbox) == 3)
    assert inbox == [b"news 0", b"news 1", b"news 2"]


def test_a_handler_that_waits_lets_those_of_other_clients_go_on(
    serve: Serve, connect: Connect
) -> None:
    connections: list[socket.socket] = []
    second_was_called = Event()
    ended: list[str] = []

    def server(connection: socket.socket) -> None:
        connections.append(connection)
        silent(connection)

    def first(payload: bytes, arrived: float) -> None:
        if second_was_called.wait(timeout=60):
            ended.append("first")

    def second(payload: bytes, arrived: float) -> None:
        second_was_called.set()

    port = serve(server).port
    connect(port, on_message=first).connect()
    wait_until(lambda: len(connections) == 1)
    connect(port, on_message=second).connect()
    wait_until(lambda: len(connections) == 2)
    for connection in connections:  # both messages arrive before the event loop reads again
        connection.send(b"hello\n")
    wait_until(lambda: ended == ["first"])


def test_a_time_out_that_a_handler_left_behind_costs_no_later_message(
    serve: Serve, connect: Connect
) -> None:
    inbox = Inbox()
    time_out_is_over = Event()

    def server(connection: socket.socket) -> None:
        connection.sendall(b"first\n")
        time_out_is_over.wait()
        connection.sendall(b"second\n")

    def forgetful(payload: bytes, arrived: float) -> None:
        inbox.take(payload, arrived)
        if payload == b"first":
            gevent.Timeout(0.01).start()
            gevent.spawn_later(0.1, time_out_is_over.set)

    connect(serve(server).port, on_message=forgetful).connect()
    wait_until(lambda: inbox == [b"first", b"second"])


def test_a_handler_that_its_own_time_out_ends_is_reported_and_the_next_message_handled(
    serve: Serve, connect: Connect
) -> None:
    inbox = Inbox()
    errors: list[BaseException] = []

    def overdue(payload: bytes, arrived: float) -> None:
        inbox.take(payload, arrived)
        with gevent.Timeout(0.01):
            gevent.sleep(600)

    server = serve(greets(b"one\ntwo\n"))
    client = connect(server.port, on_message=overdue, report_error=errors.append)
    client.connect()
    wait_until(lambda: len(errors) == 2)
    assert inbox == [b"one", b"two"]


def test_what_a_handler_raises_is_reported_and_the_connection_goes_on(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    inbox = Inbox()
    errors: list[Exception] = []

    def raising(payload: bytes, arrived: float) -> None:
        inbox.take(payload, arrived)
        raise LookupError("no such room")

    server = serve(Answers(with_news))
    client = connect(server.port, on_message=raising, report_error=errors.append)
    assert client.send_chat("one") is not None
    assert client.send_chat("two") is not None
    wait_until(lambda: len(inbox) == 2)
    assert len(errors) == 2
    for error in errors:
        assert str(error) == "no such room"
    assert server.opened == 1
    assert rows.failures() == []


def test_what_a_users_handler_raises_is_counted_as_that_of_a_task(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(TCPChatUser):
        wait_time = constant(1)

        def on_message(self, payload: bytes, arrived: float) -> None:
            raise LookupError("no such room")

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")

    run = run_users(Raising, serve(greets(b"welcome\n")).address)
    wait_until(lambda: run.runner.exceptions)
    (counted,) = run.runner.exceptions.values()
    assert counted["msg"] == "no such room"
    assert "no such room" in caplog.text


def test_a_handler_may_send_and_wait_for_the_echo_of_what_it_sends(
    serve: Serve, connect: Connect
) -> None:
    answers: list[str | bytes | None] = []

    def answer(payload: bytes, arrived: float) -> None:
        answers.append(client.send_chat(payload.decode()))

    server = serve(greets(b"one\ntwo\nthree\n"))
    client = connect(server.port, on_message=answer)
    client.connect()
    wait_until(lambda: len(answers) == 3)
    name = client.identity
    assert answers == [
        f"[{name}.1] one",
        f"[{name}.2] two",
        f"[{name}.3] three",
    ]


def test_a_handler_of_a_connection_that_is_gone_sends_nothing_over_the_next(
    serve: Serve, connect: Connect
) -> None:
    """Its message answers something that the first connection said."""
    first = says(b"PING 1\n")
    second = Answers(with_the_line)
    handlers = iter((first, second))
    go_on = Event()
    answers: list[object] = []

    def answer(payload: bytes, arrived: float) -> None:
        go_on.wait()
        answers.append(client.send_chat(b"PONG 1", echo="none"))

    def server(connection: socket.socket) -> None:
        handler = next(handlers)
        handler(connection)

    client = connect(serve(server).port, on_message=answer)
    client.connect()
    wait_until(lambda: client.connected_since is None)
    assert client.send_chat("hello") is not None
    go_on.set()
    wait_until(lambda: answers == [None])
    assert client.send_chat("again") is not None
    hello, again = second.received
    assert text_of(hello) == "hello"
    assert text_of(again) == "again"


def test_after_a_local_close_the_messages_that_wait_are_dropped(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    inbox = Inbox()
    sent = Event()

    def server(connection: socket.socket) -> None:
        connection.sendall(b"one\ntwo\nthree\n")
        sent.wait()

    def close_at_the_first(payload: bytes, arrived: float) -> None:
        inbox.take(payload, arrived)
        client.close()

    client = connect(serve(server).port, on_message=close_at_the_first)
    client.connect()
    wait_until(lambda: inbox)
    gevent.sleep(0.1)
    sent.set()
    assert inbox == [b"one"]
    assert rows.counts() == {"connect": 1}


def test_what_came_before_the_server_hung_up_is_still_handled(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    inbox = Inbox()
    server = serve(says(b"one\nbye\n"))
    client = connect(server.port, on_message=inbox.take)
    client.connect()
    wait_until(lambda: rows.named("disconnect"))
    wait_until(lambda: inbox == [b"one", b"bye"])


# ------------------------------------------------------------------------------- too slow a handler


def flood(line: bytes, count: int) -> Callable[[socket.socket], None]:
    """Return a server that sends a line so many times, and then waits for the end."""

    def server(connection: socket.socket) -> None:
        for _ in range(count):
            connection.sendall(line)
        connection.recv(1)

    return server


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (b"x\n" * 1000, 11),
        (b"x" * 1_000_000 + b"\n", 18),
    ],
    ids=["10,000 messages", "16 MiB"],
)
def test_a_handler_that_falls_too_far_behind_ends_the_connection(
    serve: Serve, connect: Connect, rows: Rows, line: bytes, count: int
) -> None:
    handled: list[float] = []

    def stuck(payload: bytes, arrived: float) -> None:
        handled.append(arrived)
        gevent.sleep(3600)

    server = serve(flood(line, count))
    client = connect(server.port, on_message=stuck, timeout=0.5)
    client.connect()
    wait_until(lambda: rows.counts() == {"connect": 1, "disconnect: HandlerTooSlow": 1})
    assert client.connected_since is None
    assert len(handled) == 1  # what waited was dropped: the memory is free
    wait_until(lambda: server.open == 0)


@pytest.mark.parametrize(
    ("lines_at_once", "count", "messages"),
    [
        (b"x\n" * 100, 300, 30_000),
        (b"x" * 100_000 + b"\n", 200, 200),
    ],
    ids=["30,000 messages", "20 MB"],
)
def test_a_handler_that_keeps_up_may_be_given_any_number_of_messages(
    serve: Serve, connect: Connect, rows: Rows, lines_at_once: bytes, count: int, messages: int
) -> None:
    inbox = Inbox()
    server = serve(flood(lines_at_once, count))
    client = connect(server.port, on_message=inbox.take)
    client.connect()
    wait_until(lambda: len(inbox) == messages)
    assert rows.counts() == {"connect": 1}


def test_a_handler_too_slow_fails_the_message_in_flight(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Reading goes on before each untagged message, so here it passes the limit of memory."""
    megabyte = b"x" * 1_000_000 + b"\n"
    server = serve(flood(megabyte, 1000))
    client = connect(server.port, on_message=sleep_long, timeout=60)
    client.connect()
    while client.connected_since is not None:
        client.send_chat("/who", echo=lambda line: False, wait=False)
        gevent.sleep(0.01)
    wait_until(lambda: "echo_response: HandlerTooSlow" in rows.failures())
    for failure in rows.failures():
        assert failure in ("echo_response: HandlerTooSlow", "send_chat: HandlerTooSlow")


def test_a_reconnect_does_not_give_a_stuck_handler_a_fresh_limit(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """All that waits for a user counts, whichever connection brought it: memory stays bounded."""

    def server(connection: socket.socket) -> None:
        connection.sendall(b"x\n" * 6000)
        line = next(lines(connection))
        if line.endswith(b"stay"):
            silent(connection)

    client = connect(serve(server).port, on_message=sleep_long, timeout=0.5)
    client.send_chat("hang up")
    assert rows.counts()["echo_response: ConnectionClosed"] == 1
    client.send_chat("stay", echo="none")
    wait_until(lambda: rows.counts()["disconnect: HandlerTooSlow"])


# ----------------------------------------------------------------------- code that ends a greenlet


def test_what_waits_behind_a_handler_that_is_killed_is_handled_all_the_same(
    serve: Serve, connect: Connect
) -> None:
    handled: list[bytes] = []

    def killed(payload: bytes, arrived: float) -> None:
        handled.append(payload)
        raise gevent.GreenletExit

    server = serve(says(b"one\ntwo\nthree\n"))
    connect(server.port, on_message=killed).connect()
    wait_until(lambda: handled == [b"one", b"two", b"three"])


def test_what_a_listener_raises_for_a_disconnect_is_reported(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    def refuse(name: str, **_row: object) -> None:
        if name == "disconnect":
            raise StopUser

    errors: list[Exception] = []
    request_event.add_listener(refuse)
    server = serve(says(b"bye\n"))
    connect(server.port, report_error=errors.append).connect()
    wait_until(lambda: errors)
    (error,) = errors
    assert isinstance(error, StopUser)


def test_the_wait_for_echoes_waits_for_rows_that_a_listener_holds_up(
    serve: Serve, connect: Connect, rows: Rows, request_event: EventHook
) -> None:
    is_held = Event()
    go_on = Event()

    def hold(name: str, **_row: object) -> None:
        if name == "send_chat":
            is_held.set()
            go_on.wait()

    request_event.add_listener(hold)
    client = connect(serve(Answers(with_the_line)).port)
    client.send_chat("hello", wait=False)
    is_held.wait()
    waiting = gevent.spawn(client.wait_for_echoes, 60)
    gevent.sleep(0.1)
    assert not waiting.ready()
    go_on.set()
    waiting.get()
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
