"""What runs a user's code makes way for the event loop; only a handler that takes nothing ends."""

from __future__ import annotations

import contextvars
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent
import gevent.monkey
from clients import Connect
from gevent.event import Event
from locust import constant, task
from locust.event import EventHook
from locust.exception import StopUser
from plain_servers import ServerProcess, burst
from plain_servers import echo as echo_apart
from programs import wait_until
from rows import Rows, RunUsers
from servers import Answers, Serve, greets, silent, with_the_line

from locustfile import Connection, Exchange, SendBatch, TCPChatUser

busy = gevent.monkey.get_original("time", "sleep")  # holds up the event loop

LONGER_THAN_A_SLICE = 0.0003  # seconds; after 0.1 ms of user code the event loop polls
VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE")


@contextmanager
def counted_polls() -> Iterator[Callable[[], int]]:
    """Return how often the event loop has polled its sockets: one of them is always readable."""
    reader, writer = socket.socketpair()
    writer.send(b"x")
    polls = itertools.count()
    latest = [0]

    def on_readable() -> None:
        latest[0] = next(polls)

    watcher = gevent.get_hub().loop.io(reader.fileno(), 1)
    watcher.start(on_readable)
    try:
        yield lambda: latest[0]
    finally:
        watcher.close()
        reader.close()
        writer.close()


def never_long_without_a_poll(moments: list[int]) -> bool:
    """Return whether the event loop has seen to its sockets between any moment and the next but
    one: what it finds at the first poll comes after the timers, and so after one slice more.
    """
    return all(later > earlier for earlier, later in zip(moments, moments[2:], strict=False))


# -------------------------------------------------------------------------- iterations of the loop


def test_between_messages_of_one_backlog_the_event_loop_polls_its_sockets(
    serve: Serve, connect: Connect
) -> None:
    """All forty come in one read, and each takes longer than user code has in one go."""
    moments: list[int] = []
    with counted_polls() as polls:

        def slow(payload: bytes, arrived: float) -> None:
            moments.append(polls())
            busy(LONGER_THAN_A_SLICE)

        connect(serve(greets(b"news\n" * 40)).port, on_message=slow).connect()
        wait_until(lambda: len(moments) == 40)
    assert never_long_without_a_poll(moments)


def test_between_the_handlers_of_many_users_the_event_loop_polls_its_sockets(
    serve: Serve, connect: Connect
) -> None:
    connections: list[socket.socket] = []
    moments: list[int] = []

    def server(connection: socket.socket) -> None:
        connections.append(connection)
        silent(connection)

    with counted_polls() as polls:

        def slow(payload: bytes, arrived: float) -> None:
            moments.append(polls())
            busy(LONGER_THAN_A_SLICE)

        port = serve(server).port
        for _ in range(40):
            connect(port, on_message=slow).connect()
        wait_until(lambda: len(connections) == 40)
        for connection in connections:  # all arrive before the event loop reads again
            connection.send(b"news\n")
        wait_until(lambda: len(moments) == 40)
    assert never_long_without_a_poll(moments)


def test_between_reports_the_event_loop_polls_its_sockets(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    moments: list[int] = []
    with counted_polls() as polls:

        def slow(name: str, **_row: object) -> None:
            if name == "echo_response":
                moments.append(polls())
                busy(LONGER_THAN_A_SLICE)

        request_event.add_listener(slow)
        client = connect(serve(Answers(with_the_line)).port)
        for _ in range(40):
            client.send_chat("hello", wait=False)
        wait_until(lambda: len(moments) == 40)
    assert never_long_without_a_poll(moments)


def test_many_short_jobs_share_an_iteration_of_the_event_loop(
    serve: Serve, connect: Connect
) -> None:
    """An iteration for each message would cost more than the messages."""
    moments: list[int] = []
    with counted_polls() as polls:
        client = connect(
            serve(greets(b"\n" * 1000)).port,
            on_message=lambda payload, arrived: moments.append(polls()),
        )
        client.connect()
        wait_until(lambda: len(moments) == 1000)
    assert len(set(moments)) < 900


class Sends(Connection):
    """A connection that notes when it may send."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def flush(self) -> None:
        """Send."""
        self.events.append("sent")


def test_of_many_users_whose_echoes_have_come_a_hundred_go_on_and_send_before_the_next() -> None:
    """Thousands of messages at once would wait in the queue of the server."""
    batch = SendBatch()
    events: list[str] = []

    def go_on(exchange: Exchange) -> None:
        events.append("woken")
        batch.add(Sends(events))

    for _ in range(250):
        exchange = Exchange(b"hello", "any")
        exchange.on_done = go_on
        batch.finish(exchange)
    wait_until(lambda: len(events) == 500)
    runs = [(event, len(list(group))) for event, group in itertools.groupby(events)]
    expected = [("woken", 100), ("sent", 100)] * 2 + [("woken", 50), ("sent", 50)]
    assert runs == expected


def test_the_echoes_of_another_user_come_back_during_a_flood_of_messages(
    connect: Connect, rows: Rows
) -> None:
    """The flood would take ten seconds, with the event loop held up for each message."""
    handled: list[bytes] = []
    echoed = 0

    def slow(payload: bytes, arrived: float) -> None:
        handled.append(payload)
        busy(LONGER_THAN_A_SLICE)

    with ServerProcess(burst, 5000, "news") as flooding, ServerProcess(echo_apart) as chatting:
        flooded = connect(flooding.port, on_message=slow)
        other = connect(chatting.port)
        assert other.connect()
        flooded.send_chat("go", echo="none")
        wait_until(lambda: handled)
        while echoed < 10 and other.send_chat("hello"):
            echoed += 1
        assert echoed == 10
        assert len(handled) < 5000
        flooded.close()  # which drops the rest


# ---------------------------------------------------------------------- HandlerTooSlow, where it is


def test_the_empty_lines_of_one_read_are_all_handled(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    handled: list[bytes] = []
    client = connect(
        serve(greets(b"\n" * 16_384)).port,
        on_message=lambda payload, arrived: handled.append(payload),
        timeout=1,
    )
    client.connect()
    wait_until(lambda: len(handled) == 16_384)
    assert client.send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_burst_that_is_read_before_an_untagged_message_is_all_handled(
    connect: Connect, rows: Rows
) -> None:
    """Twenty thousand messages wait in the kernel: they are read before the command is sent."""
    handled: list[bytes] = []
    with ServerProcess(burst, 20_000, "hi") as server:
        client = connect(
            server.port, on_message=lambda payload, arrived: handled.append(payload), timeout=5
        )
        client.send_chat("go", echo="none")
        busy(0.3)
        assert client.send_chat("/who", echo=lambda line: line == b"ok") == "ok"
        wait_until(lambda: len(handled) == 20_000)
        assert rows.counts() == {"connect": 1, "send_chat": 2, "echo_response": 1}


def test_a_slow_handler_that_goes_on_taking_messages_is_not_too_slow(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """More wait than may, for longer than the time-out, but each time-out sees some taken."""
    handled: list[bytes] = []
    timeout = 0.7

    def slow(payload: bytes, arrived: float) -> None:
        handled.append(payload)
        if len(handled) < 60:
            gevent.sleep(timeout / 20)

    client = connect(serve(greets(b"x\n" * 14_000)).port, on_message=slow, timeout=timeout)
    client.connect()
    wait_until(lambda: len(handled) == 14_000)
    assert rows.counts() == {"connect": 1}


class Flood:
    """A handler that sends numbered messages of 100 kB, until it has sent so many."""

    def __init__(self, count: int) -> None:
        self.sent = 0
        self._count = count

    def __call__(self, connection: socket.socket) -> None:
        for number in range(self._count):
            connection.sendall(b"%8d" % number + b"x" * 100_000 + b"\n")
            self.sent += 1
        silent(connection)


def stands_still(flood: Flood) -> bool:
    """Return whether a server sends no more for a while."""
    before = flood.sent
    gevent.sleep(0.3)
    return flood.sent == before > 0


def test_reading_pauses_while_too_much_waits_and_goes_on_when_it_is_handled(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Of 150 MB, 16 MiB wait for the handler, and what the kernels hold: the server has to wait."""
    go_on = Event()
    handled: list[int] = []

    def waiting(payload: bytes, arrived: float) -> None:
        go_on.wait()
        handled.append(int(payload[:8]))

    flood = Flood(1500)
    client = connect(serve(flood).port, on_message=waiting, timeout=60)
    client.connect()
    wait_until(lambda: stands_still(flood))
    assert flood.sent < 1500
    assert not handled
    go_on.set()
    wait_until(lambda: len(handled) == 1500)
    assert handled == list(range(1500))
    assert rows.counts() == {"connect": 1}


def test_reading_pauses_a_second_time(serve: Serve, connect: Connect) -> None:
    go_on = Event()
    handled: list[int] = []

    def waiting(payload: bytes, arrived: float) -> None:
        if len(handled) in (0, 400):
            go_on.wait()
        handled.append(int(payload[:8]))

    flood = Flood(2000)
    connect(serve(flood).port, on_message=waiting, timeout=60).connect()
    wait_until(lambda: stands_still(flood))
    go_on.set()
    go_on.clear()
    wait_until(lambda: len(handled) == 400)
    wait_until(lambda: stands_still(flood))
    assert flood.sent < 2000
    go_on.set()
    wait_until(lambda: len(handled) == 2000)


def test_memory_stays_below_twice_the_limit_where_reading_cannot_pause(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Before each untagged message all is read that has come: of 150 MB, far from all."""
    flood = Flood(1500)
    client = connect(
        serve(flood).port, on_message=lambda payload, arrived: gevent.sleep(3600), timeout=60
    )
    client.connect()
    since = client.connected_since
    while client.connected_since == since:
        client.send_chat("/who", echo=lambda line: False, wait=False)
        gevent.sleep(0.001)
    wait_until(lambda: rows.counts()["echo_response: HandlerTooSlow"])
    assert flood.sent < 1000


# ------------------------------------------------------- what one job leaves behind, and the next


def test_what_a_handler_sets_in_its_context_no_other_user_sees(
    serve: Serve, connect: Connect
) -> None:
    seen: list[str] = []

    def note(payload: bytes, arrived: float) -> None:
        seen.append(VARIABLE.get("nothing"))
        VARIABLE.set("of another user")

    port = serve(greets(b"news\n")).port
    for number in range(1, 6):
        connect(port, on_message=note).connect()
        wait_until(lambda number=number: len(seen) == number)  # type: ignore[misc]
    assert seen == ["nothing"] * 5


def test_what_a_listener_sets_in_its_context_no_other_report_sees(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    seen: list[str] = []

    def note(name: str, **_row: object) -> None:
        if name == "echo_response":
            seen.append(VARIABLE.get("nothing"))
            VARIABLE.set("of another report")

    request_event.add_listener(note)
    client = connect(serve(Answers(with_the_line)).port)
    for number in range(1, 6):
        client.send_chat("hello", wait=False)
        wait_until(lambda number=number: len(seen) == number)  # type: ignore[misc]
    assert seen == ["nothing"] * 5


def test_a_time_out_that_a_handler_has_forgotten_ends_no_handler_of_another_user(
    serve: Serve, connect: Connect
) -> None:
    ended: list[str] = []
    errors: list[BaseException] = []

    def forgetful(payload: bytes, arrived: float) -> None:
        gevent.Timeout(0.1).start()
        ended.append("forgetful")

    def patient(payload: bytes, arrived: float) -> None:
        gevent.sleep(0.3)
        ended.append("patient")

    port = serve(greets(b"news\n")).port
    connect(port, on_message=forgetful).connect()
    wait_until(lambda: ended == ["forgetful"])
    connect(port, on_message=patient, report_error=errors.append).connect()
    wait_until(lambda: len(ended) + len(errors) == 2)
    assert ended == ["forgetful", "patient"]


def test_a_time_out_that_each_handler_puts_in_place_of_the_last_ends_none_of_another_user(
    connect: Connect, serve: Serve
) -> None:
    """A watchdog: each message cancels the time-out that the one before has started."""
    watchdog = gevent.Timeout(600)
    ended: list[str] = []
    errors: list[BaseException] = []

    def watched(payload: bytes, arrived: float) -> None:
        nonlocal watchdog
        watchdog.cancel()
        watchdog = gevent.Timeout.start_new(0.2)
        ended.append("watched")

    def patient(payload: bytes, arrived: float) -> None:
        gevent.sleep(0.4)
        ended.append("patient")

    server = serve(Answers(lambda line: b"news\n"))
    client = connect(server.port, on_message=watched)
    for number in range(1, 3):
        client.send_chat("hello", echo="none")
        wait_until(lambda number=number: len(ended) == number)  # type: ignore[misc]
    other = connect(server.port, on_message=patient, report_error=errors.append)
    other.send_chat("hello", echo="none")
    wait_until(lambda: len(ended) + len(errors) == 3)
    assert ended == ["watched", "watched", "patient"]


# ----------------------------------------------------------------------------------------- StopUser


def test_stop_user_raised_in_on_message_stops_the_user_and_ends_its_connection(
    serve: Serve, run_users: RunUsers
) -> None:
    class Leaving(TCPChatUser):
        wait_time = constant(0)

        @task
        def wait(self) -> None:
            gevent.sleep(60)

        def on_message(self, payload: bytes, arrived: float) -> None:
            raise StopUser

    server = serve(greets(b"bye\n"))
    run = run_users(Leaving, server.address, users=3)
    wait_until(lambda: server.opened == 3 and server.open == 0)
    wait_until(lambda: run.runner.user_count == 0)
    assert not run.runner.exceptions
    assert not run.errors
