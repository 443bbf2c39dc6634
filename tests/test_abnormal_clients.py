"""``examples/abnormal_clients.py``: what counts as a failure of the server, and that each abuse reaches it."""

from __future__ import annotations

import re
import signal
import socket
import struct
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import LOCUST, ROOT, Program, Rows, Server, echo, free_port, lines, wait_until
from gevent.event import Event
from gevent.lock import Semaphore
from locust.env import Environment
from locust.event import Events

sys.path.insert(0, str(ROOT / "examples"))
import abnormal_clients
from abnormal_clients import HALF, AbnormalClient

Serve = Callable[..., Server]
Start = Callable[..., Program]
Run = Callable[..., Program]
User = Callable[..., AbnormalClient]
KINDS = {
    "invalid UTF-8",
    "empty message",
    "no delimiter in 1 MiB",
    "short of its prefix",
    "huge prefix",
    "half, then silence",
    "half, then reset",
    "connect and leave",
    "half-close",
    "trickle",
}
QUICK = """
import abnormal_clients
from locust import stats

abnormal_clients.AbnormalClient.silence = {silence}
abnormal_clients.AbnormalClient.trickle_pause = 0.02
stats.CONSOLE_STATS_INTERVAL_SEC = 0.1
"""


@pytest.fixture
def run(start: Start, tmp_path: Path) -> Run:
    """Return a function that runs the example without long pauses."""

    def run_example(address: str, *options: str, silence: float = 0.3) -> Program:
        (tmp_path / "quick.py").write_text(QUICK.format(silence=silence))
        files = f"examples/abnormal_clients.py,{tmp_path / 'quick.py'}"
        common = "--headless --users=20 --spawn-rate=100 --chat-wait=0.05 --chat-timeout=1"
        return start(*LOCUST, "-f", files, f"--host={address}", *common.split(), *options)

    return run_example


def failures(running: Program, row: str) -> int:
    """Return how many failures of a row the latest table has, or of all that match a pattern."""
    found = re.findall(rf"^({row}) +\d+ +(\d+)\(", running.output, re.MULTILINE)
    return max((int(count) for _, count in found), default=0)


def end(running: Program) -> int:
    """End the run, and return the exit code. Locust loses a SIGINT that comes while it prints (its stats_printer)."""
    running.process.send_signal(signal.SIGTERM)
    code = running.ends()
    assert "Traceback" not in running.output
    return code


class WellMade:
    """A line server that echoes, answers an error, or hangs up where it must; it keeps what each connection did."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, connection: socket.socket) -> None:
        began, rest, chunks, ending = time.monotonic(), b"", list[bytes](), "closed"
        try:
            while data := connection.recv(65536):
                chunks.append(data)
                *complete, rest = (rest + data).split(b"\n")
                for line in complete:
                    try:
                        connection.sendall(line.decode().encode() + b"\n")
                    except UnicodeDecodeError:
                        connection.sendall(b"error: not UTF-8\n")
                if len(rest) > 65536:
                    ending = "too long"
                    break
        except ConnectionResetError:
            ending = "reset"
        self.seen.add(self._kind(b"".join(chunks), len(chunks), ending, time.monotonic() - began))

    @staticmethod
    def _kind(data: bytes, reads: int, ending: str, seconds: float) -> str:
        conditions = {
            "invalid UTF-8": data.startswith(b"\xff\xfe\xc3(") and data.endswith(b"\n"),
            "empty message": data == b"\n",
            "no delimiter in 1 MiB": ending == "too long" and set(data) == {ord("x")},
            "short of its prefix": data == struct.pack(">I", 200) + b"x" * 10,
            "huge prefix": data == b"\xff" * 4 + b"x" * 10,
            "half, then silence": data == b"x" * 51 and seconds > 0.29,
            "half, then reset": data == HALF + b"x" and ending == "reset",
            "connect and leave": data == b"",
            "half-close": data == b"Goodbye!\n" and ending == "closed",
            "trickle": data == b"Slowly!\n" and reads > 4,
        }
        return next((kind for kind, true in conditions.items() if true), "a message")


def test_a_well_made_server_sees_every_abuse_and_does_not_fail(run: Run, serve: Serve) -> None:
    server = WellMade()
    listening = serve(server)
    running = run(listening.address)
    wait_until(lambda: server.seen >= KINDS)
    wait_until(lambda: set(re.findall(r"^ABUSE +(\S.*?\S) {2,}", running.output, re.MULTILINE)) == KINDS)
    assert end(running) == 0
    assert failures(running, r"\w+ +.*?") == 0
    assert "echo_response" in running.output and '{"AbnormalClient": 19, "Canary": 1}' in running.output
    wait_until(lambda: listening.open == 0)


def test_a_server_that_crashes_on_invalid_text_fails(run: Run, serve: Serve) -> None:
    crash = Event()

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            try:
                connection.sendall(line.decode().encode() + b"\n")
            except UnicodeDecodeError:
                crash.set()

    crashing = serve(server)
    running = run(crashing.address)
    wait_until(crash.is_set)
    crashing.stop()
    wait_until(lambda: failures(running, "ABUSE +.*?") and failures(running, "TCP +connect"))
    assert end(running) == 1
    assert "NotAccepted('After the abuse the server accepted no connection.')" in running.output
    assert "ConnectionRefusedError(111, 'Connection refused')" in running.output


def test_a_server_that_hangs_on_half_a_message_fails(run: Run, serve: Serve) -> None:
    hung = Event()

    def server(connection: socket.socket) -> None:
        rest = b""
        while data := connection.recv(65536):
            *complete, rest = (rest + data).split(b"\n")
            if hung.is_set() or rest.startswith(HALF):
                hung.set()
                gevent.sleep(60)
            connection.sendall(b"".join(line + b"\n" for line in complete))

    running = run(serve(server).address)
    wait_until(lambda: failures(running, "TCP +echo_response") and failures(running, "ABUSE +.*?"))
    assert end(running) == 1
    assert "NotEchoed('After the abuse the server did not echo on a new connection.')" in running.output


def test_a_server_that_serves_nobody_while_one_is_slow_fails(run: Run, serve: Serve) -> None:
    turn = Semaphore()

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            with turn:
                while not data.endswith(b"\n") and (more := connection.recv(65536)):
                    data += more
                connection.sendall(data)

    running = run(serve(server).address, silence=3)
    wait_until(lambda: failures(running, "TCP +echo_response"))
    assert end(running) == 1
    assert "TCP echo_response: EchoTimeout('No echo came within the time-out.')" in running.output


def test_half_a_message_that_comes_to_another_fails_the_run_whatever_limit_holds(run: Run, serve: Serve) -> None:
    halves: list[bytes] = []

    def server(connection: socket.socket) -> None:
        rest = b"".join(halves)
        halves.clear()
        try:
            while data := connection.recv(65536):
                *complete, rest = (rest + data).split(b"\n")
                connection.sendall(b"".join(line + b"\n" for line in complete))
        except ConnectionResetError:
            halves.append(rest)

    running = run(serve(server).address, "--chat-max-fail-ratio=1")
    wait_until(lambda: failures(running, "ABUSE +half, then reset"))
    assert end(running) == 1
    assert "verdict passed" in running.output
    assert "Leaked('Half a message of a connection that was reset came to a new connection.')" in running.output


def test_a_canary_that_got_no_echo_fails_the_run_and_says_so_once(run: Run, serve: Serve) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)])
    bus = free_port()
    options = f"--chat-timeout=60 --run-time=1s --processes=1 --master-bind-port={bus} --master-port={bus}"
    running = run(server.address, *options.split())
    assert running.ends() == 1
    assert running.output.count("locust: the canary failed: no echo came\n") == 1


def test_with_locustfile_before_it_the_classes_can_be_named(start: Start, serve: Serve) -> None:
    files, names = "locustfile.py,examples/abnormal_clients.py", ("Canary", "AbnormalClient")
    server = serve(echo)
    running = start(*LOCUST, "-f", files, f"--host={server.address}", *names, "--headless", "--users=4", "-r9")
    running.prints('All users spawned: {"AbnormalClient": 3, "Canary": 1}')
    wait_until(lambda: server.opened > 4)
    assert end(running) == 0


@pytest.fixture
def user(rows: Rows) -> Iterator[User]:
    """Return a function that makes an abnormal client of a port, with options as the command line gives them."""
    abnormal: list[AbnormalClient] = []

    def make(port: int, host: str = "127.0.0.1", **options: str) -> AbnormalClient:
        settings = {"chat_timeout": "0.3", **options}
        environment = Environment(host=f"{host}:{port}", events=Events(), parsed_options=Namespace(**settings))
        environment.events.request.add_listener(lambda **row: rows.append(row))
        abnormal.append(AbnormalClient(environment))
        return abnormal[-1]

    yield make
    for one in abnormal:
        one.client.close()


def test_one_row_for_an_abuse_and_none_for_the_question_after_it(user: User, serve: Serve, rows: Rows) -> None:
    user(serve(echo).port).half_close()
    assert [(row["request_type"], row["name"], row["exception"]) for row in rows] == [("ABUSE", "half-close", None)]
    assert 0 < rows[0]["response_time"] < 300


def test_a_server_that_hangs_up_at_once_has_only_failed_to_echo_afterwards(
    user: User, serve: Serve, rows: Rows
) -> None:
    """The abuse itself succeeds: hanging up is a right answer to it, but not to what is asked afterwards."""
    user(serve(lambda connection: None).port, chat_echo="none").invalid_utf_8()
    user(serve(lambda connection: None).port).invalid_utf_8()
    assert rows.counts() == {"invalid UTF-8": 1, "invalid UTF-8: NotEchoed": 1}


def test_a_connection_that_the_server_does_not_end_is_a_failure(user: User, serve: Serve, rows: Rows) -> None:
    def server(connection: socket.socket) -> None:
        echo(connection)
        gevent.sleep(60)

    user(serve(server).port).half_close()
    assert rows.counts() == {"half-close: NotEnded": 1}
    assert 300 <= rows[0]["response_time"] < 1000


def test_a_server_that_stops_reading_does_not_stop_the_client(user: User, serve: Serve, rows: Rows) -> None:
    with gevent.Timeout(5):
        user(serve(lambda connection: gevent.sleep(60)).port).abuse("more than the kernel takes", b"x" * 2**24)
    assert rows.counts() == {"more than the kernel takes: NotEnded": 1}


def test_nothing_listens(user: User, rows: Rows) -> None:
    user(free_port()).connect_and_leave()
    assert rows.counts() == {"connect and leave: ConnectionRefusedError": 1}


@pytest.mark.parametrize(("framing", "failed"), [("line", ": Leaked"), ("raw", "")])
def test_half_a_message_as_a_message_of_its_own_is_found_but_in_raw_it_is_one(
    user: User, serve: Serve, rows: Rows, framing: str, failed: str
) -> None:
    halves: list[bytes] = []

    def server(connection: socket.socket) -> None:
        connection.sendall(b"".join(halves))
        while data := connection.recv(65536):
            halves[:] = [data + b"\n"]
            connection.sendall(data)

    user(serve(server).port, chat_framing=framing, chat_echo="tag").half_then_reset()
    assert rows.counts() == {f"half, then reset{failed}": 1}


@pytest.mark.parametrize(
    ("framing", "short", "huge"), [("<H", b"\xc8\0", b"\xff" * 2), (">Q", b"\0" * 7 + b"\xc8", b"\xff" * 8)]
)
def test_prefixes_lie_in_the_format_of_the_server(
    user: User, serve: Serve, rows: Rows, framing: str, short: bytes, huge: bytes
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            received.append(data)
            connection.sendall(data)

    abnormal = user(serve(server).port, chat_framing=framing)
    abnormal.short_of_its_prefix()
    abnormal.huge_prefix()
    assert received[0] == short + b"x" * 10 and huge + b"x" * 10 in received
    assert {row["exception"] for row in rows} == {None}


def test_tls_is_refused_in_a_line_that_says_what_to_write(user: User) -> None:
    environment = Environment(host="tls://localhost:1", events=Events())
    with pytest.raises(ValueError, match=r"^'tls://localhost:1' will not do: write tcp://localhost:1: .* no TLS$"):
        AbnormalClient.new_client(environment)


def test_a_wrong_host_is_a_failure_and_no_connection(user: User, rows: Rows) -> None:
    user(1, host="http://").connect_and_leave()
    assert rows.counts() == {"connect and leave: SettingError": 1}


def test_nothing_is_judged_where_nothing_was_started(capsys: Any) -> None:
    environment = Environment(events=Events())
    environment.create_local_runner()
    abnormal_clients.judge(environment)
    assert environment.process_exit_code is None and capsys.readouterr().err == ""
