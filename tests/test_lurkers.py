"""``plugins/lurkers.py``: users that only listen, and users that come and go."""

from __future__ import annotations

import locust  # isort: skip  # replaces blocking calls with gevent's

import inspect
import shlex
import socket
import textwrap
from collections import Counter
from pathlib import Path

import lurkers
import pytest
from programs import (
    QUICK_LOCUST,
    Start,
    bus_options,
    counts_in,
    documented_commands,
    last_line,
    latest_counts,
    the_one_with,
    wait_until,
)
from rows import RunUsers
from servers import Serve, echo, lines, port_of

import locustfile


class KimUser(locustfile.TCPChatUser):
    """Logs in, chats, and answers the server's pings."""

    abstract = True

    def on_connect(self) -> None:
        self.client.send_chat("/login Kim", echo="any")

    def on_message(self, payload: bytes, arrived: float) -> None:
        if payload == b"PING":
            self.client.send_chat(b"PONG", echo="none")

    @locust.task
    def chat(self) -> None:
        self.client.send_chat("Hello!")


def documented(name: str) -> list[str]:
    """Return the command of the plugin's first lines that runs this class, with ten users."""
    command = the_one_with(f"lurkers.py {name} ", documented_commands(lurkers.__doc__))
    _, *arguments = shlex.split(command)
    return [*arguments, "--users=10"]  # the last of each counts


def welcome(connection: socket.socket) -> None:
    """Say something, and wait for the end."""
    connection.sendall(b"welcome\n")
    connection.recv(1)


def heard(connections: int, answered: int) -> str:
    """Return what the last line says of so many connections."""
    return (
        f"lurkers: {connections} connections made, {answered} of them answered or heard something"
    )


@pytest.mark.together
def test_lurkers_hold_their_connections_and_count_what_comes(start: Start, serve: Serve) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        connection.sendall(b"welcome\r\nwelcome\r\nwel")
        wait_until(lambda: listening.open == 10)
        connection.sendall(b"come\r\nnot complete")
        received.append(connection.recv(65536))

    listening = serve(server)
    host = f"--host={listening.address}"
    running = start(*QUICK_LOCUST, *documented("Lurker"), host)
    wait_until(lambda: latest_counts(running, "received") == (30, 0))
    assert running.stop() == 0
    assert listening.opened == 10
    assert counts_in(running.output) == {"connect": (10, 0), "received": (30, 0)}
    assert received == [b""] * 10
    assert last_line(running) == heard(10, 10)


@pytest.mark.together
def test_connections_that_the_server_never_accepts_have_heard_nothing(start: Start) -> None:
    """The kernel completes their handshakes."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        host = f"--host=127.0.0.1:{port_of(listener)}"
        running = start(*QUICK_LOCUST, *documented("Lurker"), host)
        wait_until(lambda: latest_counts(running, "connect") == (10, 0))
        assert running.stop() == 0
    assert last_line(running) == heard(10, 0)


QUIET_KIM = """
import locustfile
import lurkers
import pytest

class QuietKim(lurkers.Lurking, locustfile.TCPChatUser):
    def on_connect(self):
        self.client.send_chat("/login Kim", echo="any")

    def is_refusal(self, payload):
        return payload == b"full"
"""


@pytest.mark.together
def test_an_answer_to_a_login_is_an_answer_also_a_refusal(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    answers = iter([b"welcome\n", b"full\n", b""])

    def server(connection: socket.socket) -> None:
        for _ in lines(connection):
            connection.sendall(next(answers))

    (tmp_path / "kim.py").write_text(QUIET_KIM)
    running = start(
        *QUICK_LOCUST,
        *("-f", f"plugins/lurkers.py,{tmp_path / 'kim.py'}", "QuietKim"),
        f"--host={serve(server).address}",
        *("--headless", "--users=3", "--spawn-rate=9"),
        *("--chat-wait=60", "--chat-timeout=60"),
    )
    wait_until(lambda: latest_counts(running, "login") == (2, 1))
    assert running.stop() == 1
    assert last_line(running) == heard(3, 2)


def test_what_a_lurker_hears_has_a_size_and_no_time(serve: Serve, run_users: RunUsers) -> None:
    def server(connection: socket.socket) -> None:
        connection.sendall(b"\0\7welcome")
        connection.recv(1)

    address = serve(server).address
    rows = run_users(lurkers.Lurker, address, users=3, chat_framing=">H").rows
    wait_until(lambda: len(rows.named("received")) == 3)
    for row in rows.named("received"):
        assert row["response_length"] == 7
        assert row["response_time"] is None


def test_a_lurker_whose_server_hangs_up_reports_it_and_connects_again(
    serve: Serve, run_users: RunUsers
) -> None:
    def server(connection: socket.socket) -> None:
        if listening.opened > 3:
            connection.recv(1)

    listening = serve(server)
    rows = run_users(lurkers.Lurker, listening.address, users=3, chat_wait="0.1").rows
    wait_until(lambda: listening.open == 3 and listening.opened == 6)
    wait_until(lambda: rows.counts() == {"connect": 6, "disconnect: ConnectionClosed": 3})


def test_a_user_with_a_login_lurks_and_visits_without_the_tasks_of_its_base_class(
    serve: Serve, run_users: RunUsers
) -> None:
    """The classes are those of the plugin's first lines."""
    example = (lurkers.__doc__ or "").rpartition("::\n")[2]
    names = {"lurkers": lurkers, "KimUser": KimUser}
    exec(textwrap.dedent(example), names)
    heard: Counter[bytes] = Counter()

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            heard[line] += 1
            if line == b"/login Kim":
                connection.sendall(b"Welcome, Kim!\nPING\n")
            elif line != b"PONG":
                connection.sendall(line + b"\n")

    address = serve(server).address
    rows = run_users(names["QuietKim"], address, users=3, chat_wait="0.01").rows
    wait_until(lambda: heard == {b"/login Kim": 3, b"PONG": 3})
    wait_until(lambda: len(rows.named("received")) == 3)
    assert set(rows.counts()) == {"connect", "send_chat", "login", "received"}
    rows = run_users(names["VisitingKim"], address, users=3, chat_wait="0.01").rows
    wait_until(lambda: len(rows.named("echo_response")) > 10)
    assert set(rows.counts()) == {"connect", "send_chat", "login", "echo_response"}
    for line in heard:
        assert not line.endswith(b"Hello!")


def test_a_lurker_that_overrides_stay_says_something_now_and_then(
    serve: Serve, run_users: RunUsers
) -> None:
    class Pinging(lurkers.Lurker):
        def stay(self) -> None:
            super().stay()
            self.client.send_chat("/ping", echo="none")

    heard: list[bytes] = []
    server = serve(lambda connection: heard.extend(lines(connection)))
    run_users(Pinging, server.address, users=3, chat_wait="0.1")
    wait_until(lambda: heard.count(b"/ping") > 6)


@pytest.mark.together
def test_each_message_of_a_visitor_has_a_connection_of_its_own(start: Start, serve: Serve) -> None:
    messages: list[int] = []

    def server(connection: socket.socket) -> None:
        said = 0
        for line in lines(connection):
            connection.sendall(line + b"\n")
            said += 1
        messages.append(said)

    listening = serve(server)
    running = start(
        *QUICK_LOCUST,
        *documented("Visitor"),
        f"--host={listening.address}",
        "--stop-timeout=60",
    )
    wait_until(lambda: listening.opened > 100)
    assert running.stop() == 0
    wait_until(lambda: listening.open == 0)
    visits = (listening.opened, 0)
    rows = counts_in(running.output)
    assert rows == {
        "connect": visits,
        "send_chat": visits,
        "echo_response": visits,
    }
    assert messages == [1] * listening.opened
    assert last_line(running) == heard(listening.opened, listening.opened)


def test_a_visitor_waits_for_its_echo_in_open_loop_too(serve: Serve, run_users: RunUsers) -> None:
    address = serve(echo).address
    rows = run_users(lurkers.Visitor, address, users=3, chat_rate="20").rows
    wait_until(lambda: len(rows.named("echo_response")) > 6)


@pytest.mark.together
def test_a_worker_gets_the_plugin_from_its_master(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    server = serve(welcome)
    bus = bus_options()
    master = start(
        *QUICK_LOCUST,
        *("-f", "locustfile.py,plugins/lurkers.py", "Lurker"),
        f"--host={server.address}",
        *("--headless", "--users=4", "--spawn-rate=4"),
        *("--master", "--expect-workers=1", *bus),
    )
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus, cwd=tmp_path)
    wait_until(lambda: server.open == 4)
    wait_until(lambda: latest_counts(master, "received") == (4, 0))
    assert master.stop() == 0
    assert worker.ends() == 0
    assert counts_in(master.output) == {"connect": (4, 0), "received": (4, 0)}
    assert last_line(master) == heard(4, 4)
    assert "lurkers: " not in worker.output


@pytest.mark.together
def test_several_processes_lurk(start: Start, serve: Serve) -> None:
    server = serve(welcome)
    running = start(
        *QUICK_LOCUST,
        *("-f", "plugins/lurkers.py", "Lurker"),
        f"--host={server.address}",
        *("--headless", "--users=4", "--spawn-rate=4"),
        *("--processes=2", *bus_options()),
    )
    wait_until(lambda: latest_counts(running, "received") == (4, 0))
    assert server.open == 4
    running.stop()
    assert running.output.count("\nlurkers: ") == 1
    assert last_line(running) == heard(4, 4)


def test_the_plugin_lists_no_user_class_but_its_two() -> None:
    classes = inspect.getmembers(lurkers, inspect.isclass)
    concrete = [name for name, item in classes if not getattr(item, "abstract", True)]
    assert concrete == ["Lurker", "Visitor"]


def test_requests_of_other_users_are_no_connections_of_lurkers() -> None:
    before = lurkers.last_line()
    lurkers.count("connect")  # fired by hand, with what Locust wants at least
    lurkers.count("connect", context={"their": "own"})
    assert lurkers.last_line() == before
