"""Servers that others wrote."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable

import pytest
from programs import LOCUST, STANDALONE, Program, program, quiet, rows_of, wait_until
from rows import Rows
from servers import free_port

from locustfile import TCPSocketClient

Start = Callable[..., Program]
Connect = Callable[..., TCPSocketClient]


def listen(start: Start, command: str) -> int:
    """Start a server command with PORT in it; return its port once it says that it is listening."""
    port = free_port()
    name, *arguments = shlex.split(command.replace("PORT", str(port)))
    start(program(name), *arguments).prints("istening on")
    return port


def latest_counts(running: Program, name: str) -> tuple[int, int]:
    """Return requests and failures of a row in the last table that a run has printed."""
    found = re.findall(rf"^TCP +{name} +(\d+) +(\d+)\(", running.output, re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def successes(running: Program, name: str) -> int:
    """Return how many requests of a row have succeeded so far."""
    requests, failures = latest_counts(running, name)
    return requests - failures


def stopped(running: Program) -> int:
    """Stop the run in good order; return its exit code."""
    running.process.send_signal(signal.SIGTERM)
    return running.ends()


SERVERS = {
    "ncat": "ncat --verbose --listen --keep-open 127.0.0.1 PORT --exec /bin/cat",
    "socat": "socat -d -d TCP-LISTEN:PORT,bind=127.0.0.1,fork,reuseaddr,backlog=100 PIPE",
}
ROOM = "ncat --verbose --listen --chat 127.0.0.1 PORT"


@pytest.mark.parametrize("name", SERVERS)
def test_a_load_on_an_echo_server(start: Start, name: str) -> None:
    port = listen(start, SERVERS[name])
    arguments = "--headless --users=10 --spawn-rate=10 --chat-wait=0.1"
    running = start(*LOCUST, f"--host=127.0.0.1:{port}", *arguments.split())
    wait_until(lambda: latest_counts(running, "echo_response")[0] > 30)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert (
        rows["connect"] == (10, 0)
        and rows["echo_response"][0] > 30
        and rows["echo_response"][1] == 0
    )
    assert quiet(running.output)


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("framing", ["line", ">I", "raw"])
def test_the_standalone_mode_on_an_echo_server(start: Start, name: str, framing: str) -> None:
    port = listen(start, SERVERS[name])
    assert start(*STANDALONE, "127.0.0.1", str(port), f"--chat-framing={framing}").ends() == 0


def test_a_room_that_does_not_echo_shows_other_peoples_messages_and_none_is_taken_for_an_echo(
    start: Start, connect: Connect, rows: Rows
) -> None:
    """``ncat --chat`` sends a line to everybody but its sender, after a banner of its own."""
    port = listen(start, ROOM)
    ours, other = connect(port, timeout=0.5), connect(port, echo="none")
    assert ours.connect()
    for _ in range(20):
        other.send_chat("hello from the other")
    assert ours.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoTimeout"] == 1
    assert rows.counts()["echo_response"] == 0


def test_a_room_is_loaded_without_waiting_for_echoes(start: Start) -> None:
    port = listen(start, ROOM)
    arguments = "--headless --users=8 --spawn-rate=8 --chat-wait=0.2 --chat-echo=none"
    running = start(*LOCUST, f"--host=127.0.0.1:{port}", *arguments.split())
    wait_until(lambda: latest_counts(running, "send_chat")[0] > 25)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat"}
    assert rows["send_chat"][0] > 25
    assert quiet(running.output)


def test_a_real_server_that_is_killed_and_started_again_is_loaded_again(start: Start) -> None:
    port = free_port()
    command = [program("socat"), f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", "PIPE"]
    server = start(*command)
    arguments = "--headless --users=5 --spawn-rate=5 --chat-wait=0.1"
    running = start(*LOCUST, f"--host=127.0.0.1:{port}", *arguments.split())

    running.prints("echo_response")
    server.kill()
    wait_until(lambda: latest_counts(running, "connect")[1] > 0)
    start(*command)
    wait_until(lambda: successes(running, "connect") >= 10)  # each user once more
    echoes = successes(running, "echo_response")
    wait_until(lambda: successes(running, "echo_response") > echoes)
    assert stopped(running) == 1
    assert "Traceback" not in running.output
