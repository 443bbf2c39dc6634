"""Open loop: messages begin on a schedule, whether earlier ones have been answered or not."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from locust import User, constant, task
from locust.argument_parser import parse_options
from locust.env import Environment
from locust.event import Events
from programs import LOCUST, Program, wait_until
from servers import Server, echo, free_port, lines

from locustfile import Schedule, TCPChatUser

Serve = Callable[..., Server]
Run = Callable[..., Environment]
Start = Callable[..., Program]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a function that starts users of a class; they are stopped after the test."""
    environments: list[Environment] = []
    monkeypatch.setattr(Schedule, "warned", False)

    def start(
        user_class: type[User],
        host: str,
        users: int = 1,
        stop_timeout: float | None = None,
        **options: str,
    ) -> Environment:
        environment = Environment(
            user_classes=[user_class],
            host=host,
            events=Events(),
            parsed_options=Namespace(stop_timeout=0.0, **options),
            stop_timeout=stop_timeout,
        )
        environments.append(environment)
        environment.create_local_runner().start(users, spawn_rate=users)
        return environment

    yield start
    for environment in environments:
        stop(environment)


def stop(environment: Environment) -> None:
    assert environment.runner is not None
    environment.runner.quit()


def row(environment: Environment, name: str) -> Any:
    return environment.stats.get(name, "TCP")


class Talker(TCPChatUser):
    """Says hello in each task."""

    abstract = True

    @task
    def talk(self) -> None:
        self.client.send_chat("hello")


class Timed(list[float]):
    """A server that notes when each line came, and answers none."""

    def __call__(self, connection: socket.socket) -> None:
        for _ in lines(connection):
            self.append(time.monotonic())


def echo_after(seconds: float) -> Callable[[socket.socket], None]:
    """Return a server that answers each line so much later, and goes on reading meanwhile."""

    def answer(connection: socket.socket, line: bytes) -> None:
        gevent.sleep(seconds)
        connection.sendall(line + b"\n")

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            gevent.spawn(answer, connection, line)

    return server


# ------------------------------------------------------------------------------------- the schedule


def test_messages_go_out_although_none_is_answered(serve: Serve, run: Run) -> None:
    class Mine(Talker):
        rate = 20

    arrived = Timed()
    environment = run(Mine, serve(arrived).address)
    wait_until(lambda: len(arrived) >= 20)
    assert row(environment, "echo_response").num_requests < 20


def test_the_number_sent_is_users_times_rate_times_time(serve: Serve, run: Run) -> None:
    """Also where the answers take longer than the pause between two messages."""

    class Mine(Talker):
        rate = 10

    arrived = Timed()
    run(Mine, serve(arrived).address, users=10)
    wait_until(lambda: len(arrived) >= 1)
    gevent.sleep(4)
    seconds = time.monotonic() - arrived[0]
    assert 0.7 < len(arrived) / (10 * 10 * seconds) < 1.15


def test_the_schedule_is_absolute_a_task_that_takes_time_does_not_shift_it(
    serve: Serve, run: Run
) -> None:
    class Slow(TCPChatUser):
        rate = 5

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")
            gevent.sleep(0.15)

    arrived = Timed()
    run(Slow, serve(arrived).address)
    wait_until(lambda: len(arrived) >= 11)
    assert arrived[10] - arrived[0] >= 1.8  # ten intervals of 0.2 s, less what the first was late
    assert len(arrived) / (time.monotonic() - arrived[0]) > 3.4  # 2.9 a second if it were shifted


def test_each_user_has_a_phase_of_its_own(serve: Serve, run: Run) -> None:
    class Mine(Talker):
        rate = 0.5

    arrived = Timed()
    run(Mine, serve(arrived).address, users=40)
    wait_until(lambda: len(arrived) >= 40)
    first = arrived[:40]
    assert first[-1] - first[0] > 0.5  # of two seconds
    longest_gap = max(b - a for a, b in itertools.pairwise(first))
    assert longest_gap < (first[-1] - first[0]) / 2


def test_what_on_connect_sends_is_waited_for(serve: Serve, run: Run) -> None:
    answers: list[object] = []

    class Mine(Talker):
        rate = 5

        def on_connect(self) -> None:
            answers.append(self.client.send_chat("/login"))

    environment = run(Mine, serve(echo_after(0.1)).address)
    wait_until(lambda: row(environment, "echo_response").num_requests > 2)
    assert answers == ["/login"]
    assert row(environment, "login").num_requests == 1


# --------------------------------------------------------------------------- where the rate is said


def count_in_two_seconds(serve: Serve, run: Run, user_class: type[User], **options: str) -> int:
    """Return how many messages of one user came in the two seconds after the first."""
    arrived = Timed()
    run(user_class, serve(arrived).address, **options)
    wait_until(lambda: arrived)
    gevent.sleep(2)
    return len([moment for moment in arrived if moment < arrived[0] + 2])


def test_the_rate_may_stand_in_the_class_also_as_a_fraction(serve: Serve, run: Run) -> None:
    class Mine(Talker):
        rate = 100 / 3  # 33.333333333333336

    assert 20 < count_in_two_seconds(serve, run, Mine) < 75


def test_a_rate_as_an_option_wins_over_the_class(serve: Serve, run: Run) -> None:
    class Mine(Talker):
        rate = 0.1
        wait_time = constant(60)

    assert 20 < count_in_two_seconds(serve, run, Mine, chat_rate="30") < 70


def test_a_wait_as_an_option_wins_over_the_rate_of_the_class(serve: Serve, run: Run) -> None:
    """It is the closed loop again: against a silent server one message is all that is sent."""

    class Mine(Talker):
        rate = 100

    assert count_in_two_seconds(serve, run, Mine, chat_wait="0") == 1


def test_the_rate_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_RATE", "2.5")
    assert parse_options(args=[]).chat_rate == "2.5"


@pytest.mark.parametrize("arguments", [["--chat-rate=2", "--chat-wait=1"], ["--chat-rate=2"]])
def test_a_rate_with_a_wait_is_refused_wherever_they_stand(
    start: Start, arguments: list[str]
) -> None:
    variables = {} if len(arguments) == 2 else {"CHAT_WAIT": "1"}
    program = start(*LOCUST, "--headless", "--host=localhost:9", *arguments, **variables)
    assert program.ends() != 0
    assert "'--chat-rate=2 with --chat-wait=1' will not do: write one of them" in program.output
    assert "Traceback" not in program.output


@pytest.mark.parametrize("rate", ["0", "-1", "fast", "inf", "nan"])
def test_a_rate_that_is_none_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(args=[f"--chat-rate={rate}"])
    assert "will not do: write messages a second above 0" in capsys.readouterr().err


# ----------------------------------------------------------------------- a server that stands still


class StandsStill:
    """An echo server that stands still for two seconds of every four, for all alike."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, connection: socket.socket) -> None:
        for line in lines(connection):
            phase = (time.monotonic() - self._began) % 4
            if phase < 2:
                gevent.sleep(2 - phase)
            connection.sendall(line + b"\n")


def test_open_loop_shows_a_server_that_stands_still_and_closed_loop_does_not(
    serve: Serve, run: Run
) -> None:
    """Half of what falls due does so in the two seconds, and waits 0 to 2 s: a quarter over 1 s."""

    class Open(Talker):
        rate = 20

    class Closed(Talker):
        wait_time = constant(0.005)

    address = serve(StandsStill()).address
    open_loop = run(Open, address, users=5)
    closed_loop = run(Closed, address, users=5)
    gevent.sleep(8.2)
    stop(open_loop)
    stop(closed_loop)
    in_open_loop = row(open_loop, "echo_response").get_response_time_percentile(0.75)
    in_closed_loop = row(closed_loop, "echo_response").get_response_time_percentile(0.75)
    assert 500 < in_open_loop < 1600
    assert in_closed_loop < in_open_loop / 4
    assert row(open_loop, "echo_response").max_response_time > 1500
    assert row(closed_loop, "echo_response").max_response_time > 1500  # there, but in no percentile


# ------------------------------------------------------------------------------------ no connection


def test_a_server_that_is_gone_is_not_sent_to_and_nothing_piles_up(serve: Serve, run: Run) -> None:
    """After two seconds at rate 50 the server is back, and does not get a hundred at once."""

    class Mine(Talker):
        rate = 50

    first = serve(echo)
    environment = run(Mine, first.address)
    wait_until(lambda: row(environment, "echo_response").num_requests > 5)
    first.stop()
    wait_until(lambda: row(environment, "connect").num_failures > 0)
    sent = row(environment, "send_chat").num_requests
    gevent.sleep(2)
    assert row(environment, "send_chat").num_requests == sent
    arrived = Timed()
    again = serve(arrived, first.port)
    wait_until(lambda: arrived)
    gevent.sleep(1)
    in_one_second = [moment for moment in arrived if moment < arrived[0] + 0.5]
    assert len(in_one_second) < 45  # 25 of the schedule; with those of two seconds, 125
    assert again.opened == 1
    assert not Schedule.warned  # it was not the generator that was slow


def test_a_reconnect_starts_the_schedule_anew_for_each_user_at_a_phase_of_its_own(
    serve: Serve, run: Run
) -> None:
    class Mine(Talker):
        rate = 0.5

    first = serve(echo)
    run(Mine, first.address, users=30)
    wait_until(lambda: first.open == 30)
    first.stop()
    arrived = Timed()
    again = serve(arrived, first.port)
    wait_until(lambda: again.open == 30)
    del arrived[:]
    wait_until(lambda: len(arrived) >= 30)
    assert arrived[29] - arrived[0] > 0.5


def test_users_at_a_dead_port_make_few_attempts_and_send_nothing(run: Run) -> None:
    class Mine(Talker):
        rate = 100

    environment = run(Mine, f"127.0.0.1:{free_port()}", users=5)
    gevent.sleep(2)
    # At most 2, 3 or 4 in the first second by the back-off; a hundred by the rate.
    assert 5 <= row(environment, "connect").num_failures <= 5 * 12
    assert row(environment, "send_chat").num_requests == 0


# ----------------------------------------------------------------------------- too slow a generator


def test_a_generator_that_cannot_keep_the_schedule_says_so_once_with_its_rate(
    serve: Serve, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    class Busy(TCPChatUser):
        rate = 20

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")
            gevent.sleep(0.2)

    caplog.set_level(logging.WARNING)
    arrived = Timed()
    run(Busy, serve(arrived).address, users=3)
    wait_until(lambda: "cannot keep the schedule" in caplog.text)
    seen = len(arrived)
    wait_until(lambda: len(arrived) > seen + 10)
    (record,) = [r for r in caplog.records if "cannot keep the schedule" in r.getMessage()]
    assert record.levelno == logging.WARNING
    words = record.getMessage().split()
    reached = float(words[words.index("tasks") - 1])
    assert 0.5 < reached < 8  # five a second, or fewer on a slow machine
    assert "instead of 20;" in record.getMessage()


# ----------------------------------------------------------------------------------------- the stop


def test_with_a_stop_timeout_messages_in_flight_that_are_not_waited_for_may_finish(
    serve: Serve, run: Run
) -> None:
    class Mine(Talker):
        rate = 20

    server = serve(echo_after(0.5))
    environment = run(Mine, server.address, users=3, stop_timeout=30)
    wait_until(lambda: row(environment, "send_chat").num_requests > 30)
    assert environment.runner is not None
    environment.runner.stop()
    sent = row(environment, "send_chat").num_requests
    wait_until(lambda: row(environment, "echo_response").num_requests == sent)
    assert not environment.stats.errors
    wait_until(lambda: server.open == 0)


def test_without_a_stop_timeout_messages_in_flight_are_neither_waited_for_nor_failures(
    serve: Serve, run: Run
) -> None:
    class Mine(Talker):
        rate = 20

    arrived = Timed()
    server = serve(arrived)
    environment = run(Mine, server.address, users=3)
    wait_until(lambda: len(arrived) > 20)
    assert environment.runner is not None
    environment.runner.stop()
    wait_until(lambda: server.open == 0)
    wait_until(lambda: row(environment, "send_chat").num_requests == len(arrived))
    assert row(environment, "echo_response").num_requests == 0
    assert not environment.stats.errors


def test_a_stop_timeout_that_is_over_leaves_no_connection_open(serve: Serve, run: Run) -> None:
    """The task ends within the time-out, and so the wait for the echo is cut short."""
    go_on = Event()

    class Mine(TCPChatUser):
        timeout = 60

        @task
        def talk(self) -> None:
            self.client.send_chat("hello", wait=False)
            go_on.wait()

    arrived = Timed()
    server = serve(arrived)
    environment = run(Mine, server.address, users=3, stop_timeout=1)
    wait_until(lambda: len(arrived) == 3)
    gevent.spawn_later(0.3, go_on.set)
    assert environment.runner is not None
    environment.runner.stop()
    wait_until(lambda: server.open == 0, 10)
    assert not environment.stats.errors


def test_the_first_task_is_due_within_an_interval_of_the_connect() -> None:
    class Connected:
        connected_since: float | None = None

    for _ in range(50):
        client = Connected()
        schedule = Schedule(0.01, client)  # type: ignore[arg-type]  # all that it looks at
        client.connected_since = 1.0
        assert 0 <= schedule.first_pause() <= 100
