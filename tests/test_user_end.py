"""A connection ends with its user, whatever the class of the user overrides, raises or leaves."""

from __future__ import annotations

import socket
from argparse import Namespace

import gevent
import pytest
from clients import Connect
from gevent.event import Event
from locust import LoadTestShape, constant, task
from locust.env import Environment
from locust.event import Events
from locust.exception import InterruptTaskSet, StopUser
from programs import LOCUST, Start, rows_of, wait_until
from rows import Rows, RunUsers
from servers import Answers, Serve, Server, echo, free_port, greets, silent, with_the_line

from locustfile import ChatClient, TCPChatUser, run_totals

# ----------------------------------------------------------------------------- users that end alone


class Alone(TCPChatUser):
    """A user who sends one message, and then ends by itself."""

    wait_time = constant(0)

    @task
    def say_and_end(self) -> None:
        """Send, and end."""
        self.client.send_chat("hello")
        raise StopUser


class FailsAtStart(Alone):
    """Fails after it has connected."""

    def on_start(self) -> None:
        """Connect, and fail."""
        super().on_start()
        raise LookupError("no account left")


class StopsAtStart(Alone):
    """Stops after it has connected."""

    def on_start(self) -> None:
        """Connect, and stop."""
        super().on_start()
        raise StopUser


class OwnStop(Alone):
    """Says good-bye, without a call of ``super``."""

    def on_stop(self) -> None:
        """Send one more message."""
        self.client.send_chat("bye")


class FailsAtStop(Alone):
    """Fails when it stops."""

    def on_stop(self) -> None:
        """Fail."""
        raise LookupError("no such account")


class TimesOut(TCPChatUser):
    """Is ended by a time-out of its own, which nobody catches."""

    wait_time = constant(0)

    @task
    def say_and_end(self) -> None:
        """Wait for what does not come."""
        gevent.Timeout(0.05).start()
        self.client.send_chat("hello", echo=lambda line: False)


class Interrupts(TCPChatUser):
    """Interrupts the outermost task set, which ends the user."""

    wait_time = constant(0)

    @task
    def say_and_end(self) -> None:
        """Send, and interrupt."""
        self.client.send_chat("hello")
        raise InterruptTaskSet(reschedule=False)


@pytest.mark.parametrize(
    "user_class",
    [Alone, FailsAtStart, StopsAtStart, OwnStop, FailsAtStop, TimesOut, Interrupts],
)
def test_a_user_who_ends_during_the_run_leaves_no_connection(
    serve: Serve, run_users: RunUsers, user_class: type[TCPChatUser]
) -> None:
    server = serve(echo)
    run_users(user_class, server.address, users=3, chat_timeout="60")
    wait_until(lambda: server.opened == 3 and server.open == 0)
    gevent.sleep(0.05)
    assert (server.opened, server.open) == (3, 0)


def test_stop_user_raised_in_on_message_stops_that_user(serve: Serve, run_users: RunUsers) -> None:
    stopped: list[TCPChatUser] = []

    class Leaves(ChatClient):
        """Leaves where the server says so."""

        def on_message(self, payload: bytes, arrived: float) -> None:
            if payload == b"go away":
                raise StopUser

        def on_stop(self) -> None:
            stopped.append(self)

    greetings = iter((b"go away\n", b"stay\n", b"stay\n"))
    server = serve(lambda connection: greets(next(greetings))(connection))
    chat = run_users(Leaves, server.address, users=3, chat_wait="0.02")
    wait_until(lambda: server.opened == 3 and server.open == 2)
    assert len(stopped) == 1
    before = chat.count("echo_response")
    wait_until(lambda: chat.count("echo_response") > before + 10)
    assert server.open == 2
    assert chat.runner.exceptions == {}


# ----------------------------------------------------------------------------- the end of a run


def test_an_on_stop_of_ones_own_may_send_when_the_run_ends(
    serve: Serve, run_users: RunUsers
) -> None:
    class Polite(ChatClient):
        """Says good-bye, without a call of ``super``."""

        def on_stop(self) -> None:
            self.client.send_chat("/quit", echo="none")

    chat = Answers(with_the_line)
    server = serve(chat)
    running = run_users(Polite, server.address, users=5, chat_wait="0.02")
    wait_until(lambda: running.count("echo_response") > 20)
    running.runner.quit()
    wait_until(lambda: server.open == 0)
    assert server.opened == 5
    assert chat.received.count(b"/quit") == 5
    assert not running.errors


def test_a_handler_or_a_heartbeat_that_never_ends_is_stopped_with_its_user(
    serve: Serve, run_users: RunUsers
) -> None:
    ended: list[str] = []

    class NeverReady(ChatClient):
        """Waits in its handlers for what does not come."""

        heartbeat = 0.02

        def on_message(self, payload: bytes, arrived: float) -> None:
            self._wait("on_message")

        def on_heartbeat(self) -> None:
            self._wait("on_heartbeat")

        def _wait(self, name: str) -> None:
            waiting.append(name)
            try:
                gevent.sleep(600)
            finally:
                ended.append(name)

    waiting: list[str] = []
    server = serve(greets(b"welcome\nto the room\n"))
    running = run_users(NeverReady, server.address, users=2, chat_wait="0.02")
    wait_until(lambda: len(waiting) == 4)
    running.runner.quit()
    wait_until(lambda: server.open == 0)
    wait_until(lambda: sorted(ended) == ["on_heartbeat"] * 2 + ["on_message"] * 2)
    assert len(waiting) == 4  # the second message is not handled any more
    assert server.opened == 2


def test_greenlets_that_a_task_has_left_send_nothing_after_the_end(
    serve: Serve, run_users: RunUsers
) -> None:
    returned: list[object] = []
    is_over = Event()

    class Forgetful(TCPChatUser):
        """Starts greenlets, and forgets them."""

        wait_time = constant(600)

        @task
        def spawn(self) -> None:
            for _ in range(3):
                gevent.spawn(self._talk_on)

        def _talk_on(self) -> None:
            while not is_over.is_set():
                returned.append(self.client.send_chat("hello"))

    server = serve(echo)
    running = run_users(Forgetful, server.address, users=2, stop_timeout=1)
    try:
        wait_until(lambda: len(returned) > 20)
        running.runner.quit()
        wait_until(lambda: returned.count(None) >= 6)  # each of them has noticed
        rows, seen = len(running.rows), len(returned)
        wait_until(lambda: len(returned) >= seen + 12)
        assert set(returned[seen:]) == {None}
        assert len(running.rows) == rows
        wait_until(lambda: server.open == 0)
        assert server.opened == 2
    finally:
        is_over.set()


def test_greenlets_that_wait_for_a_dead_server_do_not_connect_after_the_end(
    serve: Serve, run_users: RunUsers
) -> None:
    spawned: list[gevent.Greenlet] = []

    class Many(TCPChatUser):
        """Has several messages on their way, and waits for them."""

        wait_time = constant(0.05)

        @task
        def send_several(self) -> None:
            three = [gevent.spawn(self.client.send_chat, f"number {n}") for n in range(3)]
            spawned.extend(three)
            gevent.joinall(three)

    port = free_port()
    running = run_users(Many, f"127.0.0.1:{port}", users=4)
    wait_until(lambda: running.row("connect").num_failures >= 4)
    running.runner.quit()
    gevent.sleep(0.1)  # for an attempt that was under way
    rows = len(running.rows)
    server = serve(echo, port)
    gevent.joinall(spawned, timeout=60)
    assert {greenlet.ready() for greenlet in spawned} == {True}
    assert {greenlet.value for greenlet in spawned} == {None}
    assert server.opened == 0
    assert len(running.rows) == rows


def test_an_attempt_that_is_under_way_when_its_user_ends_is_no_failure(
    connect: Connect, rows: Rows
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]  # more than it holds: nobody accepts them
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        client = connect(full.getsockname()[1], timeout=1)
        connecting = gevent.spawn(client.connect)
        gevent.sleep(0.2)
        assert not connecting.ready()
        client.shut_down()
        assert connecting.get(timeout=60) is False
        gevent.sleep(0.05)
        assert rows == []
        for each in waiting:
            each.close()


# ----------------------------------------------------------------------------- several ends


class UpAndDown(LoadTestShape):
    """Goes on to the next count of users as soon as the server has that of the present one."""

    def __init__(self, server: Server, counts: tuple[int, ...]) -> None:
        super().__init__()
        self._server = server
        self._counts = list(counts)

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there have to be; None at the end."""
        if self._counts and self._server.open == self._counts[0]:
            del self._counts[0]
        return (self._counts[0], 100) if self._counts else None


def test_as_many_connections_as_users_while_a_load_shape_takes_them_up_and_down(
    serve: Serve,
) -> None:
    class OwnStart(ChatClient):
        """Overrides what it may override, without a call of ``super``."""

        wait_time = constant(0.02)

        def on_start(self) -> None:
            self.client.connect()

        def on_stop(self) -> None:
            self.client.send_chat("bye")

    server = serve(echo)
    shape = UpAndDown(server, (6, 1, 5))
    environment = Environment(
        user_classes=[OwnStart],
        shape_class=shape,
        host=server.address,
        events=Events(),
        parsed_options=Namespace(headless=False),
    )
    runner = environment.create_local_runner()
    runner.start_shape()
    wait_until(lambda: runner.state == "stopped")
    wait_until(lambda: server.open == 0)
    assert server.opened == 10
    assert shape.tick() is None
    assert environment.stats.total.num_failures == 0


def test_two_runs_in_one_process_have_connections_and_totals_of_their_own(
    serve: Serve, run_users: RunUsers
) -> None:
    server = serve(echo)
    chat = run_users(ChatClient, server.address, users=4, is_recorded=True, chat_wait="0.01")
    wait_until(lambda: chat.count("echo_response") > 100)
    chat.runner.stop()
    wait_until(lambda: server.open == 0)
    assert run_totals(chat.environment).echoed == chat.count("echo_response")
    chat.runner.start(3, spawn_rate=100)
    wait_until(lambda: server.open == 3 and chat.count("echo_response") > 10)
    chat.runner.stop()
    wait_until(lambda: server.open == 0)
    totals = run_totals(chat.environment)
    assert totals.awaited == totals.echoed == chat.count("echo_response") > 10
    assert chat.count("connect") == 3
    assert server.opened == 7


# ----------------------------------------------------------------------------- --stop-timeout


class Held:
    """A handler that keeps every line, and sends them back when it is let go on."""

    def __init__(self) -> None:
        self.go_on = Event()
        self.chat = Answers(self._late)

    def _late(self, line: bytes) -> bytes:
        self.go_on.wait()
        return with_the_line(line)


class HandsOver(TCPChatUser):
    """Hands a message over and pauses: Locust stops a user who pauses by killing its greenlet."""

    wait_time = constant(600)

    @task
    def hand_over(self) -> None:
        """Send, and do not wait."""
        self.client.send_chat("hello", wait=False)


class Waits(TCPChatUser):
    """Waits for the echo of one message after the other."""

    wait_time = constant(0)

    @task
    def send(self) -> None:
        """Send, and wait."""
        self.client.send_chat("hello")


@pytest.mark.parametrize("user_class", [HandsOver, Waits])
def test_the_echoes_of_users_whose_greenlet_was_killed_are_waited_for(
    serve: Serve, run_users: RunUsers, user_class: type[TCPChatUser]
) -> None:
    held = Held()
    server = serve(held.chat)
    chat = run_users(user_class, server.address, users=5, stop_timeout=60, chat_timeout="600")
    wait_until(lambda: len(held.chat.received) == 5)

    def kill_all(**_: object) -> None:  # as Locust does where a pause ends just as the run stops
        killing = [
            gevent.spawn(greenlet.kill, block=False) for greenlet in chat.runner.user_greenlets
        ]
        assert len(killing) == 5

    if user_class is Waits:
        chat.environment.events.test_stopping.add_listener(kill_all)
    stopping = gevent.spawn(chat.runner.stop)
    gevent.sleep(0.1)
    assert not stopping.ready()
    held.go_on.set()
    stopping.get(timeout=60)
    assert chat.count("send_chat") == chat.count("echo_response") == 5
    assert not chat.errors
    wait_until(lambda: server.open == 0)


@pytest.mark.parametrize("user_class", [HandsOver, Waits])
def test_an_echo_that_does_not_come_ends_with_the_stop_timeout(
    serve: Serve, run_users: RunUsers, user_class: type[TCPChatUser]
) -> None:
    server = serve(silent)
    chat = run_users(user_class, server.address, users=3, stop_timeout=0.5, chat_timeout="600")
    wait_until(lambda: len(chat.rows.named("connect")) == 3)
    with gevent.Timeout(60):
        chat.runner.stop()
    wait_until(lambda: server.open == 0)
    assert chat.count("echo_response") == 0
    assert not chat.errors


def test_with_a_stop_timeout_there_are_as_many_echoes_as_sends(start: Start, serve: Serve) -> None:
    def late(line: bytes) -> bytes:
        gevent.sleep(0.02)
        return with_the_line(line)

    chat = Answers(late)
    options = "--headless --users=50 --spawn-rate=50 --chat-wait=0.0-0.2 --stop-timeout=3"
    running = start(*LOCUST, f"--host={serve(chat).address}", *options.split())
    wait_until(lambda: len(chat.received) >= 500)
    assert running.stop() == 0
    rows = rows_of(running.output)
    assert rows["send_chat"] == rows["echo_response"] == (len(chat.received), 0)
    assert "still awaited" not in running.output
    assert "Traceback" not in running.output
