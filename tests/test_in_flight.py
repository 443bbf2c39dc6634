"""``send_chat``: messages in flight, functions as ``echo``, logins, refusals, ``compose``."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Callable, Iterator
from typing import Literal

import gevent
import pytest
from clients import Connect, at_once, results, text_of
from gevent.event import Event
from locust.event import EventHook
from programs import wait_until
from rows import Rows
from servers import (
    Answers,
    Handler,
    Serve,
    after,
    echo,
    free_port,
    hang_up,
    lines,
    says,
    silent,
    with_nothing,
    with_the_line,
)

from locustfile import ChatError, EchoMode


def with_all_but_the_lost(line: bytes) -> bytes:
    if line.endswith(b"lost"):
        return b""
    return line + b"\n"


@pytest.fixture
def listening() -> Answers:
    """Return a server that keeps what it receives, and says nothing."""
    return Answers(with_nothing)


def in_any_order(count: int, shuffle: Callable[[list[bytes]], object]) -> Handler:
    """Return a server that collects so many messages, and echoes them in another order."""

    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        while batch := list(itertools.islice(arriving, count)):
            shuffle(batch)
            echoes = b"".join(line + b"\n" for line in batch)
            connection.sendall(echoes)

    return server


# -------------------------------------------------------------------------------- several in flight


def test_a_message_that_is_not_waited_for_returns_at_once_and_reports_later(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    go_on = Event()

    def server(connection: socket.socket) -> None:
        go_on.wait()
        echo(connection)

    client = connect(serve(server).port)
    assert client.send_chat("hello", wait=False) is None
    assert rows.counts() == {"connect": 1}
    go_on.set()
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1})


def test_a_client_that_does_not_wait_waits_where_it_is_told_to(
    serve: Serve, connect: Connect
) -> None:
    client = connect(serve(echo).port, waits=False)
    assert client.send_chat("hello") is None
    assert client.send_chat("hello", wait=True) is not None


@pytest.mark.parametrize("shuffle", [list.reverse, random.shuffle], ids=["reverse", "random"])
def test_echoes_find_their_own_messages_in_whatever_order_they_come(
    serve: Serve, connect: Connect, rows: Rows, shuffle: Callable[[list[bytes]], object]
) -> None:
    """Twenty of them, as the tag x.1 is part of the tag x.17."""
    server = serve(in_any_order(20, shuffle))
    client = connect(server.port)
    texts = [f"message {number}" for number in range(20)]
    echoes = at_once(client.send_chat, texts)
    assert [text_of(echoed) for echoed in echoes] == texts
    assert rows.counts() == {"connect": 1, "send_chat": 20, "echo_response": 20}


def test_messages_go_out_in_the_order_of_the_calls(
    serve: Serve, connect: Connect, listening: Answers
) -> None:
    modes: Iterator[EchoMode] = itertools.cycle(("none", "any", "full"))
    client = connect(serve(listening).port)
    for number in range(50):
        client.send_chat(f"{number}", wait=False, echo=next(modes))
    wait_until(lambda: len(listening.received) == 50)
    for number, line in enumerate(listening.received):
        tag_and_text = line.decode().split()
        assert tag_and_text[-1] == f"{number}"


def test_a_message_not_waited_for_does_not_hold_up_one_that_is(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        """Keep the first message back until the second has been answered twice over."""
        arriving = lines(connection)
        first = next(arriving)
        second = next(arriving)
        connection.sendall(second + b"\n")
        next(arriving)
        connection.sendall(first + b"\n")

    client = connect(serve(server).port)
    client.send_chat("the first", wait=False)
    echoed = client.send_chat("second")
    assert text_of(echoed) == "second"
    assert len(rows.named("echo_response")) == 1
    client.send_chat("go on", echo="none")
    wait_until(lambda: len(rows.named("echo_response")) == 2)


def test_thousands_in_flight_are_found_without_looking_at_each_other(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Counted in comparisons, not in time: a text is compared as often as it has echoes."""
    count = 2000
    looked_at: list[int] = []

    class Counted(bytes):
        """Notes each time that it is looked for in a message."""

        def __hash__(self) -> int:
            return super().__hash__()

        def __eq__(self, other: object) -> bool:
            looked_at.append(1)
            return super().__eq__(other)

    def expected(tag: str, message: str) -> Counted:
        return Counted(f"[{tag}] {message}".encode())

    server = serve(in_any_order(count, list.reverse))
    client = connect(server.port, timeout=120, expected=expected)
    for number in range(count):
        client.send_chat(f"{number}", wait=False)
    wait_until(lambda: len(rows.named("echo_response")) == count, 120)
    assert rows.failures() == []
    assert len(looked_at) <= 2 * count


def test_untagged_messages_are_answered_oldest_first(serve: Serve, connect: Connect) -> None:
    server = serve(after(3, says(b"one\ntwo\nthree\n")))
    client = connect(server.port, echo="any")
    answers = at_once(client.send_chat, ["hello"] * 3)
    assert answers == ["one", "two", "three"]


def test_an_echo_with_a_tag_of_this_client_never_answers_an_untagged_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Neither the echo of a message in flight nor one that comes after its time-out."""

    def server(connection: socket.socket) -> None:
        arriving = lines(connection)
        late = next(arriving)
        tagged = next(arriving)
        next(arriving)
        answers = late + b"\n" + tagged + b"\nthe answer\n"
        connection.sendall(answers)

    client = connect(serve(server).port, timeout=0.5)
    assert client.send_chat("late") is None
    client.send_chat("tagged", wait=False)
    assert client.send_chat("/command") == "the answer"
    wait_until(lambda: rows.counts()["echo_response"] == 2)


def test_several_tags_in_one_payload_answer_each_message(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        """Echo three messages in one piece, whatever pieces they came in."""
        data = b""
        while data.count(b"!") < 3:
            data += connection.recv(65536)
        connection.sendall(data)

    client = connect(serve(server).port, framing="raw")
    first, second, third = at_once(client.send_chat, ["1!", "2!", "3!"])
    assert first == second == third is not None
    assert rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 3}


def test_a_time_out_of_one_tagged_message_leaves_the_others_alone(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(Answers(with_all_but_the_lost))
    client = connect(server.port, timeout=0.5)
    client.send_chat("lost", wait=False)
    while not rows.counts()["echo_response: EchoTimeout"]:
        assert client.send_chat("kept") is not None
        gevent.sleep(0.02)
    assert client.send_chat("kept") is not None
    assert rows.failures() == ["echo_response: EchoTimeout"]
    assert rows.counts()["connect"] == 1


def test_a_time_out_of_an_untagged_message_closes_and_fails_the_others(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """The second is sent in the middle of the time-out, far from either end."""
    client = connect(serve(silent).port, timeout=1)
    client.send_chat("/command", wait=False)
    gevent.sleep(0.5)
    client.send_chat("tagged", wait=False)
    wait_until(lambda: len(rows.named("echo_response")) == 2)
    assert sorted(rows.failures()) == [
        "echo_response: ConnectionClosed",
        "echo_response: EchoTimeout",
    ]
    assert client.connected_since is None


def test_each_message_times_out_in_its_turn_whatever_else_is_in_flight(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """Another client says when: who began earlier times out earlier."""
    port = serve(silent).port
    client = connect(port, timeout=0.5)
    clock = connect(port, timeout=0.5)
    client.connect()
    clock.connect()
    client.send_chat("hello", wait=False, name="1")
    gevent.sleep(0.15)
    client.send_chat("hello", wait=False, name="2")
    gevent.sleep(0.15)
    clock.send_chat("hello", wait=False, name="3")
    gevent.sleep(0.15)
    client.send_chat("/hello", wait=False, name="4")
    wait_until(lambda: rows.named("4"))
    ended = [name for name in rows.names() if name.isdigit()]
    assert ended == ["1", "2", "3", "4"]
    assert len(rows.failures()) == 4


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        (gevent.GreenletExit, "echo_response: EchoTimeout"),  # a kill, as of Locust
        (gevent.Timeout, "disconnect: ConnectionClosed"),  # the task gave the message up
    ],
)
def test_a_stopped_untagged_message_that_times_out_is_one_failure(
    serve: Serve,
    connect: Connect,
    rows: Rows,
    listening: Answers,
    reason: type[BaseException],
    failure: str,
) -> None:
    client = connect(serve(listening).port, timeout=0.4)
    stopped = gevent.spawn(client.send_chat, "/command")
    wait_until(lambda: listening.received)
    stopped.kill(reason)
    wait_until(lambda: client.connected_since is None)
    wait_until(lambda: rows.counts()[failure])
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        failure: 1,
    }


def test_the_echo_of_a_stopped_message_is_waited_for_and_counts(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """So ``--stop-timeout`` holds for the message whose greenlet Locust has killed."""
    received: list[bytes] = []
    go_on = Event()

    def server(connection: socket.socket) -> None:
        line = next(lines(connection))
        received.append(line)
        go_on.wait()
        connection.sendall(line + b"\n")
        silent(connection)

    client = connect(serve(server).port, timeout=60)
    stopped = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: received)
    stopped.kill()
    waiting = gevent.spawn(client.wait_for_echoes, 60)
    gevent.sleep(0.1)
    assert not waiting.ready()
    go_on.set()
    waiting.get(timeout=60)
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


# ----------------------------------------------------------------------------- the connection's end


def flood_without_end(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x" * 65536)


@pytest.mark.parametrize(
    ("ending", "error"),
    [(hang_up, "ConnectionClosed"), (flood_without_end, "MessageTooLong")],
)
def test_a_connection_that_ends_fails_all_in_flight_with_its_own_reason(
    serve: Serve, connect: Connect, rows: Rows, ending: Handler, error: str
) -> None:
    server = serve(after(4, ending))
    client = connect(server.port, timeout=60)
    client.send_chat("tagged", wait=False)
    client.send_chat("tagged, too", wait=False)
    client.send_chat("/command", wait=False)
    answer = client.send_chat("login", echo=lambda line: False)
    assert answer is None
    wait_until(lambda: len(rows.named("echo_response")) == 4)
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 4,
        f"echo_response: {error}": 4,
    }


def test_after_a_local_close_nothing_in_flight_has_an_echo_row(
    serve: Serve, connect: Connect, rows: Rows, listening: Answers
) -> None:
    client = connect(serve(listening).port)
    waiting = gevent.spawn(client.send_chat, "tagged")
    client.send_chat("/command", wait=False)
    wait_until(lambda: len(listening.received) == 2)
    client.close()
    assert results([waiting]) == [None]
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 2})


# ----------------------------------------------------------------------------- greenlets that share


def test_several_greenlets_share_one_attempt_to_connect(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(echo)
    client = connect(server.port)
    echoes = at_once(client.send_chat, ["hello"] * 10)
    assert None not in echoes
    assert server.opened == 1
    assert rows.counts() == {"connect": 1, "send_chat": 10, "echo_response": 10}


def test_several_greenlets_share_an_attempt_that_fails(connect: Connect, rows: Rows) -> None:
    client = connect(free_port())
    echoes = at_once(client.send_chat, ["hello"] * 10)
    assert echoes == [None] * 10
    assert rows.counts() == {"connect: ConnectionRefusedError": 1}


def test_messages_of_other_greenlets_wait_for_the_login(serve: Serve, connect: Connect) -> None:
    server = Answers(with_the_line)
    connecting = Event()

    def log_in() -> None:
        connecting.set()
        for step in (b"user", b"password"):
            gevent.sleep(0.1)
            client.send_chat(step)

    client = connect(serve(server).port, on_connect=log_in)
    gevent.spawn(client.connect)
    connecting.wait()
    assert client.send_chat("hello") is not None
    user, password, message = server.received
    assert (user, password) == (b"user", b"password")
    assert text_of(message) == "hello"


def test_if_the_login_fails_the_messages_that_waited_for_it_are_not_sent(
    serve: Serve, connect: Connect, rows: Rows, listening: Answers
) -> None:
    def log_in() -> None:
        gevent.sleep(0.1)
        raise PermissionError("refused")

    server = serve(listening)
    client = connect(server.port, on_connect=log_in)
    echoes = at_once(client.send_chat, ["hello"] * 5)
    assert echoes == [None] * 5
    assert rows.counts() == {"connect": 1, "login: PermissionError": 1}
    wait_until(lambda: server.open == 0)
    assert not listening.received


def test_if_the_greenlet_that_connects_is_stopped_another_makes_the_next_attempt(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    logins: list[object] = []

    def log_in() -> None:
        logins.append(gevent.getcurrent())
        if len(logins) == 1:
            gevent.sleep(3600)

    server = serve(echo)
    client = connect(server.port, on_connect=log_in)
    first = gevent.spawn(client.connect)
    wait_until(lambda: logins)
    second = gevent.spawn(client.send_chat, "hello")
    gevent.sleep(0.1)
    first.kill()
    second.join(60)
    assert second.value is not None
    assert logins == [first, second]


def test_a_greenlet_stopped_while_connect_is_reported_leaves_no_connection_without_login(
    serve: Serve, connect: Connect, request_event: EventHook
) -> None:
    logins: list[bool] = []
    reporting = Event()

    def hold_up(name: str, **_: object) -> None:
        if name == "connect" and not reporting.is_set():
            reporting.set()
            gevent.sleep(3600)

    def log_in() -> None:
        logins.append(True)

    client = connect(serve(echo).port, on_connect=log_in)
    request_event.add_listener(hold_up)
    connecting = gevent.spawn(client.connect)
    reporting.wait()
    connecting.kill()
    assert client.send_chat("hello") is not None
    assert logins == [True]


def test_a_greenlet_that_gives_its_message_up_has_no_echo_row_and_the_others_go_on(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    received: list[bytes] = []
    go_on = Event()

    def server(connection: socket.socket) -> None:
        received.extend(itertools.islice(lines(connection), 3))
        go_on.wait()
        for line in received:
            connection.sendall(line + b"\n")

    client = connect(serve(server).port)
    before = gevent.spawn(client.send_chat, "before")
    given_up = gevent.spawn(client.send_chat, "given up")
    later = gevent.spawn(client.send_chat, "later")
    wait_until(lambda: len(received) == 3)
    given_up.kill(gevent.Timeout)
    go_on.set()
    first, second = results([before, later])
    assert text_of(first) == "before"
    assert text_of(second) == "later"
    wait_until(lambda: rows.counts() == {"connect": 1, "send_chat": 3, "echo_response": 2})


def test_the_answer_of_a_stopped_untagged_message_is_not_given_to_the_next(
    serve: Serve, connect: Connect
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in itertools.islice(lines(connection), 2):
            received.append(line)
        connection.sendall(b"one\ntwo\n")

    client = connect(serve(server).port, echo="any")
    stopped = gevent.spawn(client.send_chat, "one")
    wait_until(lambda: received)
    stopped.kill()
    assert client.send_chat("two") == "two"


def test_a_task_may_have_a_time_out_of_its_own(serve: Serve, connect: Connect, rows: Rows) -> None:
    server = serve(Answers(with_all_but_the_lost))
    client = connect(server.port)
    client.connect()
    with gevent.Timeout(0.2, False):
        client.send_chat("lost")
    assert client.send_chat("answered") is not None
    assert rows.counts()["connect"] == 1
    assert rows.counts()["echo_response"] == 1


# ---------------------------------------------------------------------------- what a message may be


def test_bytes_go_out_as_they_are_and_the_echo_is_bytes(serve: Serve, connect: Connect) -> None:
    server = Answers(lambda line: b"\xff\x00\n")
    client = connect(serve(server).port)
    assert client.send_chat(b"\x00\xfe") == b"\xff\x00"
    assert server.received == [b"\x00\xfe"]


@pytest.mark.parametrize("mode", ["full", "tag", "any"])
def test_untagged_text_and_bytes_take_any_answer_whatever_the_mode(
    serve: Serve, connect: Connect, mode: Literal["full", "tag", "any"]
) -> None:
    server = serve(Answers(lambda line: b"done\n"))
    client = connect(server.port, echo=mode)
    assert client.send_chat("/command") == "done"
    assert client.send_chat(b"binary") == b"done"


def test_text_in_mode_none_is_tagged_all_the_same_and_commands_and_bytes_are_not(
    serve: Serve, connect: Connect, rows: Rows, listening: Answers
) -> None:
    client = connect(serve(listening).port, echo="none")
    for message in ("text", "/command", b"bytes"):
        assert client.send_chat(message) is None
    wait_until(lambda: len(listening.received) == 3)
    tagged = f"[{client.identity}.1] text".encode()
    assert listening.received == [tagged, b"/command", b"bytes"]
    assert rows.counts() == {"connect": 1, "send_chat": 3}


def test_a_name_is_that_of_the_row_that_ends_the_exchange(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(echo).port)
    client.send_chat("/join", name="join")
    client.send_chat("bye", echo="none", name="leave")
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "join": 1,
        "leave": 1,
    }


def test_a_named_message_that_fails_fails_under_its_name(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(silent).port, timeout=0.4)
    client.send_chat("/join", name="join")
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "join: EchoTimeout": 1,
    }


# -------------------------------------------------------------------------------- functions as echo


def test_a_function_waits_for_the_message_for_which_it_is_true(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = Answers(lambda line: b"- rules\n- more rules\n376 end\nafter\n")
    client = connect(serve(server).port)
    echoed = client.send_chat("MOTD", echo=lambda line: line.startswith(b"376"))
    assert echoed == "376 end"
    assert server.received == [b"MOTD"]
    assert rows[-1]["response_length"] == len("376 end")


def test_where_a_function_says_no_the_next_untagged_message_is_asked(
    serve: Serve, connect: Connect
) -> None:
    server = serve(after(3, says(b"for all\nB\nA\n")))
    client = connect(server.port)
    first = gevent.spawn(client.send_chat, "a", echo=lambda line: line == b"A")
    second = gevent.spawn(client.send_chat, "b", echo=lambda line: line == b"B")
    third = gevent.spawn(client.send_chat, "any", echo="any")
    assert results([first, second, third]) == ["A", "B", "for all"]


def test_a_function_is_not_asked_about_what_came_before_its_message(
    serve: Serve, connect: Connect
) -> None:
    asked: list[bytes] = []
    came_before = Event()

    def take(line: bytes) -> bool:
        asked.append(line)
        return True

    def server(connection: socket.socket) -> None:
        connection.sendall(b"before\n")
        came_before.set()
        after(1, says(b"after\n"))(connection)

    client = connect(serve(server).port)
    client.connect()
    came_before.wait()
    assert client.send_chat("x", echo=take) == "after"
    assert asked == [b"after"]


def test_a_function_that_raises_ends_its_connection_and_disturbs_no_other_user(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    port = serve(echo).port
    other = connect(port)
    other.connect()
    client = connect(port)
    held_up = gevent.spawn(client.send_chat, "/other", echo=lambda line: False)
    wait_until(lambda: client.connected_since)
    answer = client.send_chat("secret 1", echo=lambda line: bool(line[1000]))
    assert answer is None
    assert results([held_up]) == [None]
    assert rows.failures() == ["echo_response: EchoFunctionError"] * 2
    (text,) = rows.error_texts()
    assert "secret" not in text
    assert other.send_chat("hello") is not None
    assert client.send_chat("connects again") is not None
    assert rows.counts()["connect"] == 3


# ------------------------------------------------------------------------------------------- logins


def test_what_on_connect_sends_is_a_login_and_not_an_echo(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def log_in() -> None:
        client.send_chat("/user")
        client.send_chat("tagged")
        client.send_chat("/join", name="join")
        client.send_chat("/away", echo="none")

    client = connect(serve(echo).port, on_connect=log_in)
    assert client.connect()
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 4,
        "login": 2,
        "join": 1,
    }
    client.send_chat("hello")
    assert rows.counts()["echo_response"] == 1
    assert rows.counts()["login"] == 2


def test_a_login_waits_for_its_answers_also_where_the_client_does_not_wait(
    serve: Serve, connect: Connect
) -> None:
    answers: list[object] = []

    def log_in() -> None:
        answers.append(client.send_chat("/login"))

    client = connect(serve(echo).port, waits=False, on_connect=log_in)
    assert client.connect()
    assert answers == ["/login"]


@pytest.mark.parametrize("error", [PermissionError("refused"), ValueError("refused")])
def test_an_on_connect_that_raises_is_one_failed_login(
    serve: Serve, connect: Connect, rows: Rows, error: Exception
) -> None:
    def log_in() -> None:
        client.send_chat("/login")
        raise error

    server = serve(echo)
    client = connect(server.port, on_connect=log_in)
    assert not client.connect()
    failure = f"login: {type(error).__name__}"
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login": 1,
        failure: 1,
    }
    wait_until(lambda: server.open == 0)


def test_a_login_whose_message_has_failed_is_not_counted_again_when_it_raises(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def log_in() -> None:
        if client.send_chat("/login") is None:
            raise PermissionError("no answer")

    client = connect(serve(silent).port, on_connect=log_in, timeout=0.4)
    assert not client.connect()
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login: EchoTimeout": 1,
    }


def test_a_refused_login_is_a_failed_login(serve: Serve, connect: Connect, rows: Rows) -> None:
    def log_in() -> None:
        client.send_chat("/login")

    client = connect(
        serve(Answers(lambda line: b"wrong password\n")).port,
        on_connect=log_in,
        is_refusal=lambda payload: payload.startswith(b"wrong"),
    )
    client.connect()
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "login: EchoRefused": 1,
    }


def test_a_login_that_raises_what_nobody_expects_does_not_storm_the_server(
    serve: Serve, connect: Connect
) -> None:
    def log_in() -> None:
        raise LookupError("no password for this user")

    def try_for_ever() -> None:
        while True:
            with contextlib.suppress(LookupError):
                client.send_chat("hello")

    server = serve(silent)
    client = connect(server.port, on_connect=log_in)
    trying = gevent.spawn(try_for_ever)
    wait_until(lambda: server.opened >= 2)
    gevent.sleep(0.5)
    trying.kill()
    assert server.opened <= 30  # about 5, as the pauses grow; hundreds without pauses


# ----------------------------------------------------------------------------------------- refusals


def test_an_echo_that_is_a_refusal_fails_and_returns_nothing(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    def is_refusal(payload: bytes) -> bool:
        return payload.startswith(b"error")

    server = serve(Answers(lambda line: b"error: " + line + b"\n"))
    client = connect(server.port, is_refusal=is_refusal)
    assert client.send_chat("hello") is None
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 1,
        "echo_response: EchoRefused": 1,
    }
    refusal = f"error: [{client.identity}.1] hello"
    assert rows[-1]["response_length"] == len(refusal)


def no_such_code(payload: bytes) -> bool:
    raise LookupError("no such code")


@pytest.mark.parametrize("wait", [True, False])
def test_what_is_refusal_raises_is_reported_and_fails_the_echo_and_disturbs_no_other_user(
    serve: Serve, connect: Connect, rows: Rows, wait: bool
) -> None:
    port = serve(echo).port
    errors: list[Exception] = []
    other = connect(port)
    client = connect(port, is_refusal=no_such_code, report_error=errors.append)
    assert client.send_chat("hello", wait=wait) is None
    wait_until(lambda: rows.named("echo_response"))
    (error,) = errors
    assert str(error) == "no such code"
    (row,) = rows.named("echo_response")
    assert isinstance(row["exception"], ChatError)
    assert client.connected_since is not None
    assert other.send_chat("hello") is not None


# ----------------------------------------------------------------------------- compose and expected


def wrap(tag: str, message: str) -> str:
    return f"<stanza><body>{tag} {message}</body></stanza>"


def body(tag: str, message: str) -> str:
    return f"{tag} {message}"


def wrapped_anew(line: bytes) -> bytes:
    """Return what a server makes of a stanza: its text in an element of the server's own."""
    text = line.removeprefix(b"<stanza><body>").removesuffix(b"</body></stanza>")
    return b"<message from='a'>" + text + b"</message>\n"


def wrapped_anew_with_a_letter_less(line: bytes) -> bytes:
    """Return the same, of a text whose double letter has become a single one."""
    return wrapped_anew(line.replace(b"ll", b"l"))


def wrapped_anew_and_cut(line: bytes) -> bytes:
    """Return the same up to the middle of the text."""
    whole = wrapped_anew(line)
    return whole[: whole.index(b"lo</message>")] + b"\n"


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        (wrapped_anew, "echo_response"),
        (wrapped_anew_with_a_letter_less, "echo_response: EchoAltered"),
        (wrapped_anew_and_cut, "echo_response: EchoTruncated"),
    ],
    ids=["whole", "altered", "truncated"],
)
def test_expected_is_what_a_full_echo_has_to_contain(
    serve: Serve, connect: Connect, rows: Rows, answer: Callable[[bytes], bytes], row: str
) -> None:
    server = serve(Answers(answer))
    client = connect(server.port, compose=wrap, expected=body)
    client.send_chat("hello")
    assert rows.counts() == {"connect": 1, "send_chat": 1, row: 1}


def test_expected_may_be_bytes(serve: Serve, connect: Connect) -> None:
    def expected(tag: str, message: str) -> bytes:
        return body(tag, message).encode()

    server = serve(Answers(wrapped_anew))
    client = connect(server.port, compose=wrap, expected=expected)
    assert client.send_chat("hello") is not None


def test_an_expected_of_none_means_all_that_was_sent(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    server = serve(Answers(wrapped_anew))
    client = connect(server.port, compose=wrap, expected=lambda tag, message: None)
    client.send_chat("hello")
    assert rows.counts()["echo_response: EchoAltered"] == 1


@pytest.mark.parametrize("size", [5, *range(46, 60), 65, 100])
def test_compose_may_return_bytes_with_any_byte_before_the_tag(
    serve: Serve, connect: Connect, rows: Rows, size: int
) -> None:
    """A header byte such as a length may be the code of a letter or of a digit."""

    def compose(tag: str, message: str) -> bytes:
        header = bytes([len(message)])
        return header + f"{tag} {message}".encode()

    client = connect(serve(echo).port, framing=">H", compose=compose)
    text = "x" * size
    echoed = client.send_chat(text)
    header = chr(size)
    assert echoed == f"{header}{client.identity}.1 {text}"
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_compose_that_loses_the_tag_is_an_error_and_nothing_is_sent(
    serve: Serve, connect: Connect, rows: Rows, listening: Answers
) -> None:
    def compose(tag: str, message: str) -> str:
        return message

    client = connect(serve(listening).port, compose=compose)
    with pytest.raises(ValueError, match="compose left out the tag"):
        client.send_chat("hello")
    client.send_chat(b"after", echo="none")
    wait_until(lambda: listening.received == [b"after"])
    assert rows.counts() == {"connect": 1, "send_chat": 1}


def test_a_compose_that_puts_a_digit_right_behind_the_tag_is_an_error(
    serve: Serve, connect: Connect
) -> None:
    def compose(tag: str, message: str) -> str:
        return f"{tag}{message}"

    client = connect(serve(echo).port, compose=compose)
    with pytest.raises(ValueError, match="compose put a digit right behind the tag"):
        client.send_chat("5 apples")
    assert client.send_chat("apples") is not None


class SlowCompose:
    """A ``compose`` that blocks until it is told to go on."""

    def __init__(self) -> None:
        self.has_begun = Event()
        self.go_on = Event()

    def __call__(self, tag: str, message: str) -> str:
        self.has_begun.set()
        self.go_on.wait()
        return f"[{tag}] {message}"


def test_a_message_whose_connection_ends_while_compose_blocks_fails_as_send_chat(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    compose = SlowCompose()
    server = serve(lambda connection: compose.has_begun.wait())
    client = connect(server.port, compose=compose)
    sending = gevent.spawn(client.send_chat, "hello")
    wait_until(lambda: rows.named("disconnect"))
    compose.go_on.set()
    assert results([sending]) == [None]
    assert sending.successful()
    assert rows.counts() == {
        "connect": 1,
        "disconnect: ConnectionClosed": 1,
        "send_chat: ConnectionClosed": 1,
    }


def test_after_a_local_close_while_compose_blocks_the_message_has_no_row(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    compose = SlowCompose()
    client = connect(serve(echo).port, compose=compose)
    sending = gevent.spawn(client.send_chat, "hello")
    compose.has_begun.wait()
    client.close()
    compose.go_on.set()
    assert results([sending]) == [None]
    assert rows.counts() == {"connect": 1}
