"""``examples/lurkers.py``: users that only listen, and users that come and go."""

from __future__ import annotations

import re
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable

import pytest
from conftest import LOCUST, ROOT, Program, Rows, Server, echo, lines, wait_until
from locust.env import Environment
from locust.event import Events
from test_command import quiet, rows_of

sys.path.insert(0, str(ROOT / "examples"))
from lurkers import Lurker

Serve = Callable[..., Server]
Start = Callable[..., Program]
COMMAND = (*LOCUST, "-f", "examples/lurkers.py", "--headless", "--users=10", "--spawn-rate=100")


@pytest.mark.parametrize(("framing", "prefix", "end"), [("line", b"", b"\r\n"), (">H", b"\0\7", b"")])
def test_lurkers_hold_their_connections_and_count_what_comes(
    start: Start, serve: Serve, framing: str, prefix: bytes, end: bytes
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        connection.sendall((prefix + b"welcome" + end) * 2 + prefix[:1] + b"welcome"[:1] * (not prefix))
        wait_until(lambda: listening.open == 10)
        connection.sendall(prefix[1:] + b"welcome"[not prefix :] + end + prefix)
        received.append(connection.recv(65536))

    listening = serve(server)
    options = f"--host={listening.address} --chat-framing={framing} --run-time=1s"
    running = start(*COMMAND, "Lurker", *options.split())
    wait_until(lambda: listening.open == listening.opened == 10)
    assert running.ends() == 0
    assert rows_of(running.output) == {"connect": (10, 0), "received": (30, 0)}
    assert quiet(running.output)
    assert received == [b""] * 10
    sizes = re.search(r"TCP +received.*?\| +(\d+) +(\d+) +(\d+)", running.output)
    assert sizes and set(sizes.groups()) == {"0"}  # no times


def test_a_lurker_can_still_talk_as_in_a_login(serve: Serve, rows: Rows) -> None:
    environment = Environment(host=serve(echo).address, events=Events(), parsed_options=Namespace())
    environment.events.request.add_listener(lambda **row: rows.append(row))
    lurker = Lurker(environment)
    assert lurker.client.send_chat("/login", echo="any") == "/login"
    wait_until(lambda: rows.named("received"))
    assert [(row["response_length"], row["response_time"]) for row in rows.named("received")] == [(6, None)]
    lurker.client.close()


def test_a_lurker_whose_server_hangs_up_reports_it_and_connects_again(start: Start, serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        if listening.opened > 10:
            connection.recv(1)

    listening = serve(server)
    running = start(*COMMAND, "Lurker", f"--host={listening.address}", "--chat-wait=0.1")
    wait_until(lambda: listening.open == 10 and listening.opened == 20)
    running.process.send_signal(signal.SIGTERM)
    assert running.ends() == 1
    assert rows_of(running.output) == {"connect": (20, 0), "disconnect": (10, 10)}
    assert "TCP disconnect: ConnectionClosed('The server closed the connection.')" in running.output


def test_each_message_of_a_visitor_has_a_connection_of_its_own(start: Start, serve: Serve) -> None:
    messages: list[int] = []

    def server(connection: socket.socket) -> None:
        said = 0
        for line in lines(connection):
            connection.sendall(line + b"\n")
            said += 1
        messages.append(said)

    listening = serve(server)
    options = "--chat-wait=0 --run-time=1s --stop-timeout=5"
    running = start(*COMMAND, "Visitor", f"--host={listening.address}", *options.split())
    assert running.ends() == 0
    assert quiet(running.output)
    rows = rows_of(running.output)
    wait_until(lambda: listening.open == 0)
    assert listening.opened > 200
    assert rows == {name: (listening.opened, 0) for name in ("connect", "send_chat", "echo_response")}
    assert messages == [1] * listening.opened
