"""``--chat-max-fail-ratio`` and ``--chat-max-p95``: the exit code says whether the server has passed."""

from __future__ import annotations

import argparse
import signal
import socket
from collections.abc import Callable

import pytest
from conftest import LOCUST, Program, Server, free_port, lines, wait_until
from locust.env import Environment

import locustfile

Serve = Callable[..., Server]
Start = Callable[..., Program]
HEADLESS = "--headless --users=4 --spawn-rate=4 --run-time=1s --stop-timeout=1 --chat-wait=0.02"


def judged(
    echoes: int, failed: int, connects: int = 0, *, ratio: str = "", p95: str = "", mistakes: bool = False
) -> int | None:
    """Return the exit code for echoes that took 1, 2, 3, … ms, of which so many failed, and so many failed connects."""
    options = argparse.Namespace(chat_max_fail_ratio=ratio, chat_max_p95=p95)
    environment = Environment(parsed_options=options)
    runner = environment.create_local_runner()
    for number in range(echoes):
        environment.events.request.fire(
            request_type="TCP",
            name="echo_response",
            response_time=number + 1,
            response_length=1,
            exception=locustfile.EchoTimeout() if number < failed else None,
            context={},
        )
    for _ in range(connects):
        environment.events.request.fire(
            request_type="TCP", name="connect", response_time=1, response_length=0, exception=OSError(), context={}
        )
    if mistakes:
        runner.log_exception("local", "NameError", "the user's own mistake")
    locustfile.judge(environment)
    runner.quit()
    return environment.process_exit_code


@pytest.mark.parametrize(
    ("echoes", "failed", "connects", "ratio", "p95", "code"),
    [
        (100, 1, 0, "0.01", "", 0),
        (100, 2, 0, "0.01", "", 1),
        (99, 0, 1, "0.01", "", 0),
        (99, 0, 2, "0.01", "", 1),
        (100, 0, 0, "0", "", 0),
        (100, 1, 0, "0", "", 1),
        (100, 0, 0, "", "96", 0),
        (100, 0, 0, "", "95.9", 1),
        (100, 50, 0, "", "96", 0),
        (100, 0, 0, "0.01", "1", 1),
        (100, 100, 0, "1", "", 1),
        (0, 0, 0, "1", "100", 1),
        (0, 0, 5, "", "100", 1),
        (100, 100, 0, "", "", None),
    ],
)
def test_the_exit_code(echoes: int, failed: int, connects: int, ratio: str, p95: str, code: int | None) -> None:
    assert judged(echoes, failed, connects, ratio=ratio, p95=p95) == code


def test_a_mistake_in_a_task_is_not_a_pass() -> None:
    assert judged(100, 0, ratio="0.01", mistakes=True) is None  # then Locust's own rule makes it 1
    assert judged(100, 50, ratio="0.01", mistakes=True) == 1


def some_fail(connection: socket.socket) -> None:
    """Echo, but cut each third message."""
    for number, line in enumerate(lines(connection), 1):
        connection.sendall(line[: 20 if number % 3 == 0 else None] + b"\n")


@pytest.mark.parametrize(
    ("limits", "code", "part"),
    [
        ("--chat-max-fail-ratio=0.6 --chat-max-p95=500", 0, "passed: fail ratio 0."),
        ("--chat-max-fail-ratio=0.01", 1, "(limit 0.01)"),
    ],
)
def test_a_run_of_which_a_third_fails(start: Start, serve: Serve, limits: str, code: int, part: str) -> None:
    running = start(*LOCUST, f"--host={serve(some_fail).address}", *HEADLESS.split(), *limits.split())
    assert running.ends() == code
    verdicts = [line for line in running.output.splitlines() if "verdict" in line]
    assert len(verdicts) == 1 and part in verdicts[0]


def test_a_server_that_never_answers_does_not_pass(start: Start, serve: Serve) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)])
    running = start(
        *LOCUST, f"--host={server.address}", *HEADLESS.split(), "--chat-max-fail-ratio=1", "--chat-timeout=9"
    )
    assert running.ends() == 1
    assert "verdict failed: fail ratio 0 (limit 1), no echo came" in running.output


def test_in_a_distributed_run_the_master_judges_when_all_workers_have_told_all(start: Start, serve: Serve) -> None:
    bus, limits, received = str(free_port()), "--chat-max-p95=0.001", list[bytes]()

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line + b"\n")

    worker = start(*LOCUST, "--worker", f"--master-port={bus}", limits)
    options = f"--headless --expect-workers=1 --users=2 --spawn-rate=9 --chat-wait=0.1 --host={serve(server).address}"
    master = start(*LOCUST, "--master", f"--master-bind-port={bus}", *options.split(), limits)
    wait_until(lambda: len(received) > 5)  # of which the master, told every 3 s, knows nothing yet
    master.process.send_signal(signal.SIGTERM)
    assert (master.ends(), worker.ends()) == (1, 0)
    assert master.output.count("verdict failed: 95th percentile ") == 1
    assert "no echo came" not in master.output and "verdict" not in worker.output
