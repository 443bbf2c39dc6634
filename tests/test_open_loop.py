"""Open loop: messages begin on a schedule, whether earlier ones have been answered or not."""

from __future__ import annotations

import itertools
import logging
import re
import socket
from argparse import Namespace
from collections.abc import Callable
from time import perf_counter

import gevent
import pytest
from gevent.event import Event
from locust import SequentialTaskSet, TaskSet, User, constant, task
from locust.env import Environment
from locust.event import Events
from programs import wait_until
from rows import Run, RunUsers
from servers import Serve, echo, lines

import locustfile
from locustfile import Schedule, TCPChatUser, generator_faults, run_totals

# ------------------------------------------------------------------------------------- the schedule


class Clock:
    """Stands for ``perf_counter``: time passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """As much of a client as a schedule looks at."""

    connected_since: float | None = 1.0
    first_send_at = 0.0


@pytest.fixture
def clock(begun_run: Environment, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of the schedules, so that the speed of the machine does not matter."""
    clock = Clock()
    monkeypatch.setattr(locustfile, "perf_counter", clock)
    return clock


def schedule_of(rate: float, client: Client | None = None) -> Schedule:
    return Schedule(rate, client or Client())  # type: ignore[arg-type]  # all that it looks at


def begin_tasks(rate: float, clock: Clock, durations: list[float]) -> list[float]:
    """Let tasks that send at once, and take so long, begin at a rate; return when they did."""
    client = Client()
    schedule = schedule_of(rate, client)
    moments = []
    clock.now += schedule.first_pause()
    for duration in durations:
        moments.append(clock.now)
        client.first_send_at = clock.now
        clock.now += duration
        clock.now += schedule.next_pause()
    return moments


def pass_pauses(schedule: Schedule, client: Client, clock: Clock, count: int) -> list[float]:
    """Return the pauses between tasks that send and take no time, and let them pass."""
    pauses = []
    for _ in range(count):
        client.first_send_at = clock.now
        pauses.append(schedule.next_pause())
        clock.now += pauses[-1]
    return pauses


def gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


@pytest.mark.parametrize("duration", [0, 0.15])
def test_tasks_begin_at_fixed_times_however_long_they_take(clock: Clock, duration: float) -> None:
    moments = begin_tasks(5, clock, [duration] * 20)
    assert gaps(moments) == pytest.approx([0.2] * 19)


def test_what_fell_due_during_a_long_task_begins_right_after_it(clock: Clock) -> None:
    moments = begin_tasks(10, clock, [0.35, 0, 0, 0, 0, 0])
    assert gaps(moments) == pytest.approx([0.35, 0, 0, 0.05, 0.1])


def test_the_first_task_is_due_within_an_interval_at_a_phase_of_its_own(clock: Clock) -> None:
    pauses = [schedule_of(0.5).first_pause() for _ in range(200)]
    assert 0 <= min(pauses) < 0.3
    assert 1.7 < max(pauses) <= 2


def test_the_first_task_is_due_within_an_interval_however_long_the_connect_took(
    clock: Clock,
) -> None:
    pauses = []
    for _ in range(200):
        schedule = schedule_of(0.5)
        clock.now += 11
        pauses.append(schedule.first_pause())
    assert 0 <= min(pauses) < 0.3  # each at its own phase, and not all at once
    assert 1.7 < max(pauses) <= 2


def count_late(environment: Environment) -> int:
    """Return how many tasks of the run did not start in time."""
    totals = run_totals(environment)
    return totals.due - totals.started_in_time


def test_what_fell_due_without_a_connection_is_left_out(
    begun_run: Environment, clock: Clock
) -> None:
    """After two seconds at rate 50 the server is back, and does not get a hundred at once."""
    client = Client()
    schedule = schedule_of(50, client)
    clock.now += schedule.first_pause()
    clock.now += 2
    client.connected_since = clock.now
    pauses = pass_pauses(schedule, client, clock, 10)
    assert 0 <= pauses[0] <= 0.02
    assert pauses[1:] == pytest.approx([0.02] * 9)
    assert run_totals(begun_run).due == 9
    assert count_late(begun_run) == 0  # it was not the generator that was slow


@pytest.mark.parametrize(
    ("seconds", "missed"),
    [(0.0, 0), (0.05, 0), (0.35, 2), (2.05, 10)],  # of a task each 0.2 s; it is late after 0.1 s
)
def test_what_has_not_started_when_its_user_ends_was_due_and_is_late(
    begun_run: Environment, clock: Clock, seconds: float, missed: int
) -> None:
    client = Client()
    schedule = schedule_of(5, client)
    clock.now += schedule.first_pause()
    pass_pauses(schedule, client, clock, 1)
    clock.now += seconds
    schedule.count_missed()
    assert run_totals(begun_run).due == 1 + missed
    assert count_late(begun_run) == missed


def test_what_fell_due_without_a_connection_is_not_missed_when_its_user_ends(
    begun_run: Environment, clock: Clock
) -> None:
    client = Client()
    schedule = schedule_of(5, client)
    clock.now += schedule.first_pause()
    clock.now += 10
    client.connected_since = None
    schedule.count_missed()
    assert run_totals(begun_run).due == 0


def test_a_task_that_is_under_way_when_its_user_ends_was_due_and_started(
    begun_run: Environment, clock: Clock
) -> None:
    client = Client()
    schedule = schedule_of(5, client)
    clock.now += schedule.first_pause()
    client.first_send_at = clock.now
    schedule.count_missed()
    assert run_totals(begun_run).due == 1
    assert count_late(begun_run) == 0


def test_while_there_is_no_connection_a_task_begins_once_an_interval(
    begun_run: Environment, clock: Clock
) -> None:
    client = Client()
    schedule = schedule_of(2, client)
    clock.now += schedule.first_pause()
    client.connected_since = None
    clock.now += 5
    pauses = pass_pauses(schedule, client, clock, 10)
    assert 0 <= pauses[0] <= 0.5
    assert pauses[1:] == pytest.approx([0.5] * 9)
    assert run_totals(begun_run).due == 0


def test_users_that_reconnect_together_keep_phases_of_their_own(clock: Clock) -> None:
    clients = [Client() for _ in range(200)]
    schedules = [schedule_of(0.5, client) for client in clients]
    clock.now += 7
    for client in clients:
        client.connected_since = clock.now
    pauses = [schedule.next_pause() for schedule in schedules]
    assert 0 <= min(pauses) < 0.3
    assert 1.7 < max(pauses) <= 2


def test_a_task_that_sends_nothing_is_no_message_that_fell_due(
    begun_run: Environment, clock: Clock
) -> None:
    schedule = schedule_of(1)
    for _ in range(200):
        clock.now += 0.5 + schedule.next_pause()
    assert run_totals(begun_run).due == 0


@pytest.mark.parametrize(("late", "share"), [(0, None), (5, None), (6, "94.0%"), (50, "50.0%")])
def test_a_schedule_of_which_under_95_percent_was_kept_is_a_fault_of_the_generator(
    begun_run: Environment, clock: Clock, late: int, share: str | None
) -> None:
    """After a task that takes longer than the interval, the next one starts 0.15 s late."""
    begin_tasks(1, clock, [1.15, 0.0] * late + [0.0] * (100 - 2 * late))
    assert run_totals(begun_run).due == 100
    assert count_late(begun_run) == late
    faults = generator_faults(begun_run)
    assert len(faults) == (share is not None)
    assert all("cannot keep the schedule" in text and str(share) in text for text in faults)


# -------------------------------------------------------------------------------- users of a server


class Talker(TCPChatUser):
    """Says hello in each task."""

    abstract = True
    rate: float = 50
    timeout = 60

    @task
    def talk(self) -> None:
        self.client.send_chat("hello")


class HoldsBack:
    """An echo server that reads on, and sends no echo until it is told to."""

    def __init__(self) -> None:
        self.arrived: list[float] = []  # ``perf_counter`` of each message
        self.go_on = Event()

    def __call__(self, connection: socket.socket) -> None:
        for line in lines(connection):
            self.arrived.append(perf_counter())
            gevent.spawn(self._answer, connection, line)

    def _answer(self, connection: socket.socket, line: bytes) -> None:
        self.go_on.wait()
        connection.sendall(line + b"\n")


@pytest.fixture
def server() -> HoldsBack:
    """Return a server that holds back its echoes."""
    return HoldsBack()


def test_a_server_that_stands_still_is_shown_by_each_message_that_falls_due_meanwhile(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    """In closed loop it would be one message a user."""
    run = run_users(Talker, serve(server).address)
    wait_until(lambda: len(server.arrived) >= 20)
    held_back = list(server.arrived)
    assert run.count("echo_response") == 0
    went_on = perf_counter()
    server.go_on.set()
    wait_until(lambda: run.count("echo_response") >= len(held_back))
    echoes = run.rows.named("echo_response")
    for moment, row in zip(held_back, echoes, strict=False):
        assert row["response_time"] >= (went_on - moment) * 1000
    assert not run.errors


def test_a_rate_as_an_option_wins_over_the_class(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    class Rare(Talker):
        rate = 0.0001
        wait_time = constant(3600)

    run_users(Rare, serve(server).address, chat_rate="100")
    wait_until(lambda: len(server.arrived) >= 5)


def test_a_wait_as_an_option_wins_over_the_rate_of_the_class(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    """It is the closed loop again: a server that holds back its echo gets one message."""
    run = run_users(Talker, serve(server).address, chat_wait="0")
    wait_until(lambda: server.arrived)
    gevent.sleep(0.3)
    assert len(server.arrived) == 1
    server.go_on.set()
    wait_until(lambda: run.count("echo_response") > 5)


def test_nothing_is_sent_to_a_server_that_is_gone_and_it_is_found_when_it_is_back(
    serve: Serve, run_users: RunUsers
) -> None:
    first = serve(echo)
    run = run_users(Talker, first.address, users=3)
    wait_until(lambda: run.count("echo_response") > 5)
    first.stop()
    wait_until(lambda: run.row("connect").num_failures >= 3)
    sent = run.count("send_chat")
    wait_until(lambda: run.row("connect").num_failures >= 9)
    assert run.count("send_chat") == sent
    again = serve(echo, first.port)
    wait_until(lambda: run.count("send_chat") > sent + 5)
    assert again.opened <= 3


def test_a_generator_that_cannot_keep_the_schedule_warns_once_a_run_with_figures(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    class Busy(TCPChatUser):
        rate: float = 200

        @task
        def talk(self) -> None:
            self.client.send_chat("hello")
            gevent.sleep(0.02)

    def warnings() -> list[str]:
        texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        return [text for text in texts if "cannot keep the schedule" in text]

    server = serve(echo)
    for runs in (1, 2):
        run = run_users(Busy, server.address, users=4, is_recorded=True)
        wait_until(lambda: len(warnings()) == runs)  # noqa: B023
        due = run_totals(run.environment).due
        wait_until(lambda: run_totals(run.environment).due > due + 100)  # noqa: B023
        run.runner.stop()
        assert len(warnings()) == runs
    share = re.search(r"only (\d+\.\d)% of the messages due", warnings()[-1])
    assert share is not None
    assert float(share[1]) < 95


# -------------------------------------------------------------------- task sets that do not keep it


class Dutiful(TaskSet):
    """Has no pause of its own."""

    @task
    def talk(self) -> None:
        """Say something."""


class Leisurely(SequentialTaskSet):
    """Pauses as it likes."""

    wait_time = constant(0.5)

    @task
    def talk(self) -> None:
        """Say something."""


class Restless(TaskSet):
    """Hands back to its user."""

    @task
    def leave(self) -> None:
        """Go back."""
        self.interrupt()


class Lobby(TaskSet):
    """Has another task set within it."""

    within = task(Leisurely)


NO_PACE = "so --chat-rate does not pace its tasks"


@pytest.mark.parametrize(
    ("task_set", "rate", "warning"),
    [
        (Leisurely, "2", f"Leisurely has a wait_time of its own: {NO_PACE}"),
        (Lobby, "2", f"Leisurely has a wait_time of its own: {NO_PACE}"),
        (Restless, "2", f"Restless interrupts: {NO_PACE}"),
        (Dutiful, "2", ""),
        (Leisurely, "", ""),
        (Restless, "", ""),
    ],
)
def test_with_a_rate_a_task_set_that_goes_on_by_itself_is_warned_of_before_the_run(
    task_set: type[TaskSet], rate: str, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Visitor(TCPChatUser):
        within = task(task_set)

    options = Namespace(
        echo_server=False, headless=True, autostart=False, processes=None, chat_rate=rate
    )
    environment = Environment(
        user_classes=[Visitor, User], host="127.0.0.1:1", events=Events(), parsed_options=options
    )
    locustfile.prepare(environment)
    assert [record.getMessage() for record in caplog.records] == ([warning] if warning else [])


# ----------------------------------------------------------------------------------------- the stop


def in_a_moment(run: Run, function: Callable[[], object]) -> None:
    """Call a function when the run is being stopped, and its users wait."""
    run.environment.events.test_stopping.add_listener(lambda **_: gevent.spawn_later(0.3, function))


def test_with_a_stop_timeout_messages_in_flight_that_nobody_waits_for_may_finish(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    serving = serve(server)
    run = run_users(Talker, serving.address, users=3, stop_timeout=60)
    in_a_moment(run, server.go_on.set)
    wait_until(lambda: len(server.arrived) > 20)
    run.runner.stop()
    wait_until(lambda: serving.open == 0)
    wait_until(lambda: run.count("echo_response") == len(server.arrived))
    assert run.count("send_chat") == len(server.arrived)
    assert not run.errors


def test_without_a_stop_timeout_messages_in_flight_are_neither_waited_for_nor_failures(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    serving = serve(server)
    run = run_users(Talker, serving.address, users=3)
    wait_until(lambda: len(server.arrived) > 20)
    run.runner.stop()
    wait_until(lambda: serving.open == 0)
    wait_until(lambda: run.count("send_chat") == len(server.arrived))
    assert run.count("echo_response") == 0
    assert not run.errors


def test_a_stop_timeout_that_is_over_leaves_no_connection_open(
    serve: Serve, run_users: RunUsers, server: HoldsBack
) -> None:
    """The task ends within the time-out, and so the wait for the echo is cut short."""
    stopping = Event()

    class Waiting(TCPChatUser):
        timeout = 60

        @task
        def talk(self) -> None:
            self.client.send_chat("hello", wait=False)
            stopping.wait()

    serving = serve(server)
    run = run_users(Waiting, serving.address, users=3, stop_timeout=0.6)
    in_a_moment(run, stopping.set)
    wait_until(lambda: len(server.arrived) == 3)
    run.runner.stop()
    wait_until(lambda: serving.open == 0)
    assert not run.errors
