"""When bytes arrived, whatever this process did meanwhile; what has arrived counts before judging.

The servers are processes of their own: they answer while the generator is busy, or stopped.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from unittest import mock

import gevent
import gevent.monkey
import pytest
from certificates import Context
from clients import Connect
from hypothesis import given
from hypothesis import strategies as st
from plain_servers import ServerProcess, echo, echo_and_talk, echo_with_news, kick
from programs import LOCUST, ROOT, Start, latest_counts, rows_of, wait_until
from rows import Rows

import locustfile
from locustfile import Arrivals, TCPSocketClient, UnstampedArrivals

busy = gevent.monkey.get_original("time", "sleep")  # holds up the event loop, but no other process

ALLOWANCE = 0.1  # seconds from the end of a server's send to the arrival, on a busy machine
needs_stamps = pytest.mark.skipif(
    sys.platform != "linux", reason="only the kernel of Linux says when bytes have arrived"
)


@pytest.fixture(scope="module", autouse=True)
def stamping() -> Iterator[None]:
    """Let the kernel stamp all the time: it begins only a moment after the first socket asks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        if sys.platform == "linux":
            asking.setsockopt(socket.SOL_SOCKET, locustfile.SO_TIMESTAMPNS, 1)
            busy(0.05)
        yield


class Heard(list[tuple[bytes, float]]):
    """What ``on_message`` got, and when that arrived."""

    def take(self, payload: bytes, arrived: float) -> None:
        self.append((payload, arrived))

    @property
    def payloads(self) -> list[bytes]:
        return [payload for payload, _ in self]


def hand_over(client: TCPSocketClient, *texts: str) -> None:
    """Let the event loop send messages, and not read yet."""
    for text in texts:
        client.send_chat(text, wait=False)
    gevent.sleep(0)


def times_of(client: TCPSocketClient) -> tuple[float, float]:
    """Return when the server has sent its last answer: a moment before, and one after."""
    before, after = str(client.send_chat("/times", wait=True)).split()
    return float(before), float(after)


# ------------------------------------------------------------------------------ the time of arrival


@needs_stamps
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_a_generator_busy_between_arrival_and_read_is_not_in_the_times(
    connect: Connect, rows: Rows, certificates: Path, trusting: Context, is_tls: bool
) -> None:
    heard = Heard()
    certificate = certificates / "good.pem" if is_tls else None
    with ServerProcess(echo_with_news, 0.05, certificate=certificate) as server:
        client = connect(server.port, tls=trusting if is_tls else None, on_message=heard.take)
        assert client.connect()
        started = perf_counter()
        hand_over(client, "hello")
        busy(0.6)
        wait_until(lambda: rows.named("echo_response") and heard)
        before, after = times_of(client)
    assert heard.payloads == [b"news"]
    _, arrived = heard[0]
    assert before - 0.001 <= arrived <= after + ALLOWANCE
    round_trip = rows.named("echo_response")[0]["response_time"] / 1000
    assert before - arrived < round_trip <= after - started + ALLOWANCE
    assert rows.counts()["echo_response"] == 2


def test_where_the_kernel_does_not_say_it_bytes_arrive_when_they_are_read(
    connect: Connect, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locustfile, "ARRIVALS", UnstampedArrivals())
    heard = Heard()
    with ServerProcess(echo_with_news, 0.05) as server:
        client = connect(server.port, on_message=heard.take)
        assert client.connect()
        hand_over(client, "hello")
        busy(0.3)
        read_at = perf_counter()
        wait_until(lambda: rows.named("echo_response") and heard)
    assert heard[0][1] >= read_at
    assert rows.named("echo_response")[0]["response_time"] > 250


ELSEWHERE = """
import sys
import locust
sys.platform = "darwin"
import locustfile
assert isinstance(locustfile.ARRIVALS, locustfile.UnstampedArrivals)
sys.exit(locustfile.main(["127.0.0.1", sys.argv[1]]))
"""


@pytest.mark.together
def test_on_a_system_without_linuxs_options_messages_come_back_all_the_same(start: Start) -> None:
    with ServerProcess(echo) as server:
        running = start(sys.executable, "-c", ELSEWHERE, str(server.port))
        assert running.ends() == 0, running.output
    assert "5 of 5 messages came back" in running.output


class Machine:
    """A kernel whose clock can be set, and a process on it.

    ``perf_counter`` is the true time. What the kernel stamps is on the clock of ``time()``.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.offset = 1e9

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.offset

    @contextmanager
    def watched(self) -> Iterator[Arrivals]:
        """Let the core look at the clocks of this machine."""
        with (
            mock.patch.object(locustfile, "time", self.time),
            mock.patch.object(locustfile, "perf_counter", self.perf_counter),
        ):
            yield Arrivals()


PAUSES = st.floats(0, 100)
# Seconds by which the clock is set. One that is set by less than 10 ms is not told from one that
# drifts.
SETTINGS = st.just(0.0) | st.floats(0.011, 1e6) | st.floats(-1e6, -0.011)


WHICH = st.integers(0, 9)
STEP = st.tuples(PAUSES, SETTINGS, PAUSES, WHICH)


@given(st.lists(STEP, max_size=20))
def test_a_clock_that_is_set_during_a_run_does_not_show(
    steps: list[tuple[float, float, float, int]],
) -> None:
    """Bytes arrive before the clock is set and after it; then any that have arrived are read."""
    machine = Machine()
    unread: list[tuple[float, float]] = []
    with machine.watched() as arrivals:
        for before, setting, after, which in steps:
            machine.now += before
            unread.append((machine.now, machine.time()))
            machine.offset += setting
            unread.append((machine.now, machine.time()))
            machine.now += after
            arrived, stamp = unread.pop(which % len(unread))
            found = arrivals.arrived_at(stamp)
            assert arrived - 1e-6 <= found <= machine.now


AGES = st.floats(-2e9, 2e9)
STAMP = st.tuples(PAUSES, SETTINGS, AGES)


@given(st.lists(STAMP, max_size=20))
def test_whatever_the_kernel_says_nothing_arrives_after_its_read(
    steps: list[tuple[float, float, float]],
) -> None:
    machine = Machine()
    with machine.watched() as arrivals:
        for pause, setting, age in steps:
            machine.now += pause
            machine.offset += setting
            assert arrivals.arrived_at(machine.time() - age) <= machine.now


class Early(Arrivals):
    """Says that all has arrived long ago."""

    def arrived_at(self, stamp: float) -> float:
        return 0.0


def is_hello(line: bytes) -> bool:
    return line == b"hello"


@needs_stamps
@pytest.mark.parametrize("is_refused", [False, True], ids=["echoed", "refused"])
@pytest.mark.parametrize("is_login", [False, True], ids=["message", "login"])
@pytest.mark.parametrize("mode", ["full", "tag", "any", is_hello], ids=str)
def test_whatever_the_kernel_says_no_round_trip_is_negative(
    connect: Connect,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    mode: locustfile.Echo,
    is_login: bool,
    is_refused: bool,
) -> None:
    monkeypatch.setattr(locustfile, "ARRIVALS", Early())

    def say() -> None:
        client.send_chat("hello", echo=mode)

    with ServerProcess(echo) as server:
        client = connect(
            server.port,
            is_refusal=lambda payload: is_refused,
            on_connect=say if is_login else lambda: None,
        )
        client.connect()
        if not is_login:
            say()
    (row,) = rows.named("login" if is_login else "echo_response")
    assert row["response_time"] == 0  # as if it had come at once
    assert (row["exception"] is not None) == is_refused


# -------------------------------------------------------------------------- deadlines, after a read


@needs_stamps
@pytest.mark.parametrize("mode", ["full", "any"])
def test_an_echo_that_came_in_time_is_good_however_late_it_is_read(
    connect: Connect, rows: Rows, mode: str
) -> None:
    with ServerProcess(echo) as server:
        client = connect(server.port, timeout=0.5, echo=mode)
        assert client.connect()
        hand_over(client, *["hello"] * 5)
        busy(0.8)
        wait_until(lambda: len(rows.named("echo_response")) == 5)
        assert client.send_chat("again") is not None
        assert rows.counts() == {"connect": 1, "send_chat": 6, "echo_response": 6}


@needs_stamps
def test_an_echo_that_came_too_late_is_a_time_out_however_late_it_is_read(
    connect: Connect, rows: Rows
) -> None:
    with ServerProcess(echo, 0.5) as server:
        client = connect(server.port, timeout=0.2)
        assert client.connect()
        hand_over(client, "hello")
        busy(1)
        wait_until(lambda: rows.named("echo_response"))
        assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoTimeout": 1}


def say_and_stand_still(client: TCPSocketClient) -> None:
    """Say hello, and stand still until long after its time-out; the process is watched before."""
    assert client.connect()
    gevent.sleep(0.3)
    hand_over(client, "hello")
    busy(1.2)


@needs_stamps
@pytest.mark.usefixtures("begun_run")
def test_an_echo_that_waited_in_one_read_with_later_talk_may_have_come_in_time(
    connect: Connect, rows: Rows
) -> None:
    """The kernel says only when the last byte of a read has come: half a second after the echo."""
    heard = Heard()
    with ServerProcess(echo_and_talk, 0.5) as server:
        client = connect(server.port, timeout=0.2, on_message=heard.take)
        say_and_stand_still(client)
        wait_until(lambda: rows.named("echo_response") and heard)
        assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
        assert heard.payloads == [b"news"]


@needs_stamps
@pytest.mark.usefixtures("begun_run")
def test_an_echo_that_came_too_late_while_the_generator_stood_still_is_a_time_out(
    connect: Connect, rows: Rows
) -> None:
    heard = Heard()
    with ServerProcess(echo, 0.5) as server:
        client = connect(server.port, timeout=0.2, on_message=heard.take)
        say_and_stand_still(client)
        wait_until(lambda: rows.named("echo_response") and heard)
        assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response: EchoTimeout": 1}
        assert heard.payloads == [f"[{client.identity}.1] hello".encode()]


@needs_stamps
def test_a_late_echo_is_handed_to_on_message_also_where_it_is_read_with_its_deadline(
    connect: Connect, rows: Rows
) -> None:
    heard = Heard()
    with ServerProcess(echo, 0.5) as server:
        client = connect(server.port, timeout=0.2, on_message=heard.take)
        assert client.connect()
        hand_over(client, "hello")
        busy(1)
        wait_until(lambda: rows.named("echo_response"))
        wait_until(lambda: heard.payloads == [f"[{client.identity}.1] hello".encode()], 5)


@pytest.mark.parametrize("turns", [0, 1, 3, 4])
def test_a_connection_that_was_accepted_in_time_is_open_however_late_that_is_seen(
    connect: Connect, rows: Rows, turns: int
) -> None:
    """The event loop has had so many turns when the generator stands still.

    That is before anything, during the look-up of the name, or during the connect.
    """
    with ServerProcess(echo) as server:
        for _ in range(2):  # the second has no name to look up
            client = connect(server.port, timeout=0.2)
            connecting = gevent.spawn(client.connect)
            for _ in range(turns):
                gevent.sleep(0)
            busy(0.4)
            assert connecting.get(), rows


def test_a_handshake_that_the_server_answered_in_time_succeeds_however_late_that_is_seen(
    connect: Connect, rows: Rows, certificates: Path, trusting: Context
) -> None:
    """The server begins it 0.2 s after the connect, while the generator stands still."""
    good = certificates / "good.pem"
    with ServerProcess(echo, certificate=good, handshake_after=0.2) as server:
        client = connect(server.port, timeout=0.6, tls=trusting)
        connecting = gevent.spawn(client.connect)
        gevent.sleep(0.1)
        busy(0.8)
        assert connecting.get(), rows


PAUSED_SECONDS = 1.5
RUN_OPTIONS = "--headless --users=20 --spawn-rate=20 --chat-wait=0.01 --chat-timeout=1"


@pytest.mark.together
@needs_stamps
def test_a_generator_that_is_stopped_reports_no_failure_and_says_that_it_stood_still(
    start: Start,
) -> None:
    with ServerProcess(echo, 0.005) as server:
        running = start(*LOCUST, *RUN_OPTIONS.split(), f"--host={server.address}", cwd=ROOT)
        wait_until(lambda: latest_counts(running, "echo_response").successes > 100)
        os.kill(running.process.pid, signal.SIGSTOP)
        busy(PAUSED_SECONDS)
        os.kill(running.process.pid, signal.SIGCONT)
        running.prints("stood still")
        assert running.interrupt() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (20, 0)
    assert rows["echo_response"].failures == rows["send_chat"].failures == 0
    warning, line = re.findall(r"^.*stood still for (\d+\.\d) s.*$", running.output, re.MULTILINE)
    assert float(warning) >= PAUSED_SECONDS - 0.2
    assert line == warning
    last = running.output.splitlines()[-1]
    assert last.startswith("chat: ")
    assert "stood still" in last


# -------------------------------------------------------------- errors of sending, after a read


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_an_echo_that_came_before_the_connection_broke_is_good(
    connect: Connect, rows: Rows, ending: str, is_busy: bool
) -> None:
    """The next message meets the broken connection before the event loop has read the echo."""
    heard = Heard()
    with ServerProcess(kick, 1, ending) as server:
        client = connect(server.port, on_message=heard.take)
        assert client.connect()
        hand_over(client, "one")
        (busy if is_busy else gevent.sleep)(0.3)
        hand_over(client, "two")
        wait_until(lambda: client.connected_since is None or len(rows.named("connect")) == 2)
        wait_until(lambda: heard.payloads[:1] == [b"ERROR: flood"])
        wait_until(lambda: rows.named("echo_response"))
    first = rows.named("echo_response")[0]
    assert first["exception"] is None
    assert first["response_length"] == len(f"[{client.identity}.1] one")


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_of_a_server_that_kicks_a_flood_the_echoes_and_the_reason_are_read_first(
    connect: Connect, rows: Rows, is_busy: bool
) -> None:
    heard = Heard()
    with ServerProcess(kick, 20, "close") as server:
        client = connect(server.port, on_message=heard.take)
        assert client.connect()
        texts = [locustfile.LONG_TEXTS[0]] * 300
        for text in texts:
            client.send_chat(text, wait=False)
        if is_busy:
            gevent.sleep(0)
            busy(0.2)
        ended = ("echo_response", "send_chat")

        def outcomes() -> Counter[str]:
            good = len([row for row in rows.named("echo_response") if not row["exception"]])
            bad = len([row for row in rows if row["exception"] and row["name"] in ended])
            return Counter(good=good, bad=bad)

        wait_until(lambda: outcomes().total() == 300)
        wait_until(lambda: heard)
    assert outcomes() == {"good": 20, "bad": 280}
    assert heard.payloads == [b"ERROR: flood"]
