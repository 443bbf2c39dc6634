"""The real ``locust`` command: one process, master and workers, its reports and its end."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
from programs import LOCUST, ROOT, Program, quiet, rows_of, wait_until
from servers import Server, echo, free_port, lines

Start = Callable[..., Program]
Serve = Callable[..., Server]


class Counting:
    """A server that keeps the lines it has received, and answers each; with itself, usually."""

    def __init__(self, answer: Callable[[bytes], bytes] = bytes) -> None:
        self.lines: list[bytes] = []
        self._answer = answer

    def __call__(self, connection: socket.socket) -> None:
        for line in lines(connection):
            self.lines.append(line)
            connection.sendall(self._answer(line) + b"\n")


def test_the_trial_needs_no_server_ends_by_itself_and_prints_the_three_rows(start: Start) -> None:
    port = free_port()
    arguments = "--headless --users 20 --spawn-rate 10 --run-time 3s --echo-server"
    running = start(*LOCUST, *arguments.split(), TCP_PORT=str(port))
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"}
    assert (
        rows["connect"] == (20, 0)
        and rows["echo_response"][0] >= 20
        and rows["echo_response"][1] == 0
    )
    assert quiet(running.output)


def test_a_failure_is_the_exit_code_one_and_a_row(start: Start) -> None:
    running = start(*LOCUST, "--headless", f"--host=127.0.0.1:{free_port()}", "--run-time=1s")
    assert running.ends() == 1
    assert "TCP connect: ConnectionRefusedError(111, 'Connection refused')" in running.output
    assert rows_of(running.output)["connect"][1] >= 1
    assert "Traceback" not in running.output


def test_json_csv_and_html_tell_sub_millisecond_round_trips_apart(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    reports = (
        f"--csv={tmp_path}/run --csv-full-history "
        f"--html={tmp_path}/run.html --json-file={tmp_path}/run"
    )
    running = start(
        *LOCUST,
        f"--host={serve(echo).address}",
        *reports.split(),
        *["--headless", "--chat-wait=0", "--run-time=3s"],
    )
    assert running.ends() == 0
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "run.json").read_text())}
    keys = [float(key) for key in entries["echo_response"]["response_times"]]
    assert len([key for key in keys if key % 1]) > 2
    with (tmp_path / "run_stats.csv").open() as file:
        table = {row["Name"]: row for row in csv.DictReader(file)}
    # Locust cuts the percentiles of the CSV to whole ms, but not the median.
    assert float(table["echo_response"]["Median Response Time"]) % 1
    html = (tmp_path / "run.html").read_text()
    shown = json.JSONDecoder().raw_decode(html, html.index('"response_time_statistics": ') + 28)[0]
    assert {row["name"]: row["0.5"] % 1 for row in shown}["echo_response"]


@pytest.mark.parametrize(
    ("how", "wait"),
    [(signal.SIGINT, "0"), (signal.SIGINT, "1-3"), (signal.SIGTERM, "0")],
    ids=["interrupt at full load", "interrupt while users pause", "termination at full load"],
)
def test_a_signal_ends_the_run_quietly_and_closes_every_connection(
    start: Start, serve: Serve, how: signal.Signals, wait: str
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line + b"\n")

    chat = serve(server)
    arguments = f"--host={chat.address} --headless --users=30 --spawn-rate=30 --only-summary"
    running = start(*LOCUST, *arguments.split(), f"--chat-wait={wait}")
    running.prints("All users spawned")
    wait_until(lambda: len(received) >= 30)
    running.process.send_signal(how)
    assert running.ends() == 0
    assert quiet(running.output)
    assert {failures for _, failures in rows_of(running.output).values()} == {0}
    wait_until(lambda: chat.open == 0)


def test_with_a_stop_timeout_a_run_ends_quietly_and_with_every_echo(
    start: Start, serve: Serve
) -> None:
    received: list[bytes] = []

    def slow(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            gevent.sleep(0.2)
            connection.sendall(line + b"\n")

    arguments = "--headless --users=10 --spawn-rate=10 --chat-wait=0 --stop-timeout=60"
    running = start(*LOCUST, f"--host={serve(slow).address}", *arguments.split())
    wait_until(lambda: len(received) >= 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert rows["send_chat"] == rows["echo_response"] == (len(received), 0)
    assert quiet(running.output)


def test_a_run_against_a_server_that_never_answers_does_not_await_the_timeout(
    start: Start, serve: Serve
) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)])
    arguments = "--headless --users=5 --spawn-rate=5 --chat-wait=0 --chat-timeout=600 --run-time=2s"
    running = start(*LOCUST, f"--host={server.address}", *arguments.split())
    assert running.ends() == 0
    assert "echo_response" not in rows_of(running.output)
    assert quiet(running.output)


# ----------------------------------------------------------------------------- distributed


def check_tags(received: list[bytes]) -> None:
    tags = Counter(line.split(b"]")[0] for line in received)
    assert all(tag.startswith(b"[") for tag in tags)
    assert set(tags.values()) == {1}


def test_master_and_workers_add_up_to_what_the_server_counted(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """Host, TCP_PORT and options are given to the master alone; one worker gets the file, too."""
    counting = Counting(answer=lambda line: line.partition(b"]")[0] + b"] not the text")
    server, port = serve(counting), str(free_port())
    workers = [
        start(*LOCUST, "--worker", "--master-host=127.0.0.1", "--master-port", port),
        start(
            *LOCUST,
            *["-f", "-", "--worker", "--master-host=127.0.0.1", "--master-port"],
            port,
            cwd=tmp_path,
        ),
    ]
    arguments = (
        "--master --expect-workers=2 --headless "
        "--users=10 --spawn-rate=10 --run-time=3s --stop-timeout=60"
    )
    master = start(
        *(*LOCUST, *arguments.split(), "--master-bind-port", port, "--master-bind-host=127.0.0.1"),
        *("--host=127.0.0.1", "--chat-wait=0.05", "--chat-echo=tag"),
        TCP_PORT=str(server.port),
    )
    assert master.ends() == 0
    assert [worker.ends() for worker in workers] == [0, 0]
    rows = rows_of(master.output)
    assert rows["connect"] == (10, 0)
    # That no echo failed shows that --chat-echo=tag has reached the workers.
    assert rows["send_chat"] == rows["echo_response"] == (len(counting.lines), 0)
    assert len(counting.lines) >= 10
    check_tags(counting.lines)
    assert all(quiet(program.output) for program in (master, *workers))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_of_one_command_add_up_and_their_tags_stay_unique(
    start: Start, serve: Serve
) -> None:
    counting = Counting()
    arguments = (
        "--processes=2 --headless --users=10 --spawn-rate=10 "
        "--run-time=2s --stop-timeout=60 --chat-wait=0.02"
    )
    running = start(
        *LOCUST,
        *arguments.split(),
        f"--host={serve(counting).address}",
        LOCUST_MASTER_BIND_PORT=str(port := free_port()),
        LOCUST_MASTER_NODE_PORT=str(port),
    )
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert rows["send_chat"] == rows["echo_response"] == (len(counting.lines), 0)
    check_tags(counting.lines)
    assert len({line.split(b".")[0] for line in counting.lines}) == 10
    assert quiet(running.output)


def test_two_processes_share_the_built_in_echo_server_of_their_master(start: Start) -> None:
    port = str(free_port())
    arguments = (
        "--processes=2 --headless --users=4 --spawn-rate=4 "
        "--run-time=2s --echo-server --chat-wait=0.05"
    )
    running = start(
        *LOCUST,
        *arguments.split(),
        TCP_PORT=str(free_port()),
        LOCUST_MASTER_BIND_PORT=port,
        LOCUST_MASTER_NODE_PORT=port,
    )
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (4, 0)
    assert rows["echo_response"][0] > 0
    assert quiet(running.output)


def test_the_file_works_alone_next_to_any_server_with_its_port_in_the_environment(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """The name ``localhost`` may have two addresses, of which the server has one."""
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    server = serve(echo)
    running = start(
        *LOCUST,
        *("-f", "locustfile.py", "--host=localhost", "--headless"),
        *("--users=5", "--spawn-rate=5", "--run-time=4s"),
        cwd=tmp_path,
        TCP_PORT=str(server.port),
        CHAT_WAIT="600",
    )
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (server.opened, 0) == (5, 0)
    assert 1 <= rows["echo_response"][0] <= 5  # the usual pauses would make it two each
    assert server.open == 0
