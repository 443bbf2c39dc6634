"""The real ``locust`` command: one process, master and workers, its reports and its end."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gevent
import pytest
from programs import (
    LOCUST,
    ROOT,
    Counts,
    Start,
    bus_options,
    quiet,
    rows_of,
    wait_for_lines,
    wait_until,
)
from servers import Answers, Serve, free_port, silent, with_the_line


@pytest.mark.together
def test_the_trial_needs_no_server_ends_by_itself_and_prints_the_three_rows(start: Start) -> None:
    options = "--headless --users 20 --spawn-rate 20 --run-time 3s --echo-server"
    port = str(free_port())
    running = start(*LOCUST, *options.split(), TCP_PORT=port)
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"}
    assert rows["connect"] == (20, 0)
    assert rows["echo_response"].requests >= 20
    assert rows["echo_response"].failures == 0
    assert quiet(running.output)


@pytest.mark.together
def test_a_failure_is_the_exit_code_one_and_a_row(start: Start) -> None:
    host = f"--host=127.0.0.1:{free_port()}"
    running = start(*LOCUST, "--headless", host, "--run-time=1s")
    assert running.ends() == 1
    assert "TCP connect: ConnectionRefusedError(111, 'Connection refused')" in running.output
    rows = rows_of(running.output)
    assert rows["connect"].failures >= 1
    assert "Traceback" not in running.output


@pytest.mark.together
def test_json_csv_and_html_tell_sub_millisecond_round_trips_apart(
    start: Start, tmp_path: Path
) -> None:
    options = "--headless --echo-server --run-time=3s"  # the CSV is written every second
    running = start(
        *LOCUST,
        *("-f", "locustfile.py,tests/locustfiles/fixed_rows.py"),
        *options.split(),
        f"--csv={tmp_path}/run",
        f"--html={tmp_path}/run.html",
        f"--json-file={tmp_path}/run",
        TCP_PORT=str(free_port()),
    )
    assert running.ends() == 0
    entries = json.loads((tmp_path / "run.json").read_text())
    entry = fixed_one(entries, "name")
    assert entry["response_times"] == {"0.12": 1, "0.46": 1, "0.79": 1}
    with (tmp_path / "run_stats.csv").open() as file:
        row = fixed_one(csv.DictReader(file), "Name")
    # Locust cuts the percentiles of the CSV to whole ms, but not the median.
    assert row["Median Response Time"] == "0.46"
    html = (tmp_path / "run.html").read_text()
    _, _, rest = html.partition('"response_time_statistics": ')
    shown, _ = json.JSONDecoder().raw_decode(rest)
    assert fixed_one(shown, "name")["0.5"] == 0.46


def fixed_one(rows: Iterable[dict[str, Any]], column: str) -> dict[str, Any]:
    """Return the one row of a report that is named ``fixed``."""
    (row,) = [row for row in rows if row[column] == "fixed"]
    return row


@pytest.mark.together
@pytest.mark.parametrize(
    ("how", "wait"),
    [
        (signal.SIGINT, "0"),
        (signal.SIGINT, "1-3"),
        (signal.SIGTERM, "0"),
    ],
    ids=[
        "interrupt at full load",
        "interrupt while users pause",
        "termination at full load",
    ],
)
def test_a_signal_ends_the_run_quietly_and_closes_every_connection(
    start: Start, serve: Serve, how: signal.Signals, wait: str
) -> None:
    chat = Answers(with_the_line)
    server = serve(chat)
    options = "--headless --users=30 --spawn-rate=30 --only-summary"
    running = start(
        *LOCUST,
        *options.split(),
        f"--host={server.address}",
        f"--chat-wait={wait}",
    )
    running.prints("All users spawned")
    wait_for_lines(chat, 30)
    running.process.send_signal(how)
    assert running.ends() == 0
    assert quiet(running.output)
    rows = rows_of(running.output)
    assert rows
    assert all(counts.failures == 0 for counts in rows.values())
    wait_until(lambda: server.open == 0)


@pytest.mark.together
def test_with_a_stop_timeout_a_run_ends_quietly_and_with_every_echo(
    start: Start, serve: Serve
) -> None:
    def late(line: bytes) -> bytes:
        gevent.sleep(0.2)
        return with_the_line(line)

    chat = Answers(late)
    options = "--headless --users=10 --spawn-rate=10 --chat-wait=0 --stop-timeout=60"
    host = f"--host={serve(chat).address}"
    running = start(*LOCUST, host, *options.split())
    wait_for_lines(chat, 30)
    assert running.stop() == 0
    check_every_echo(rows_of(running.output), chat)
    assert quiet(running.output)


@pytest.mark.together
def test_a_run_against_a_server_that_never_answers_does_not_await_the_timeout_and_exits_1(
    start: Start, serve: Serve
) -> None:
    options = "--headless --users=5 --spawn-rate=5 --chat-wait=0 --chat-timeout=600 --run-time=2s"
    host = f"--host={serve(silent).address}"
    running = start(*LOCUST, host, *options.split())
    assert running.ends() == 1
    assert "echo_response" not in rows_of(running.output)
    assert "echoes were awaited, and none came" in running.output
    *_, last_line = running.output.splitlines()
    assert last_line.startswith("chat: ")
    assert "; 5 echoes still awaited at the end" in running.output
    assert "Traceback" not in running.output


# ----------------------------------------------------------------------------- distributed


def check_tags(received: list[bytes]) -> None:
    """See that every line begins with a tag of its own."""
    tags = [line.partition(b"]")[0] for line in received]
    assert all(tag.startswith(b"[") for tag in tags)
    assert len(set(tags)) == len(tags)


def check_every_echo(rows: dict[str, Counts], chat: Answers) -> None:
    """See that every line that the server received has had its echo."""
    every_one = Counts(len(chat.received), 0)
    assert rows["send_chat"] == every_one
    assert rows["echo_response"] == every_one


def with_the_tag_alone(line: bytes) -> bytes:
    """Answer a line with its tag and another text."""
    tag, end, _ = line.partition(b"]")
    return tag + end + b" not the text\n"


@pytest.mark.together
def test_master_and_workers_add_up_to_what_the_server_counted(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """Host, TCP_PORT and options are given to the master alone; one worker gets the file, too."""
    chat = Answers(with_the_tag_alone)
    server = serve(chat)
    bus = ("--master-host=127.0.0.1", "--master-bind-host=127.0.0.1", *bus_options())
    workers = [
        start(*LOCUST, "--worker", *bus),
        start(*LOCUST, "-f", "-", "--worker", *bus, cwd=tmp_path),
    ]
    options = (
        "--master --expect-workers=2 --headless --users=10 --spawn-rate=10 --stop-timeout=60 "
        "--host=127.0.0.1 --chat-wait=0.05 --chat-echo=tag"
    )
    port = str(server.port)
    master = start(*LOCUST, *options.split(), *bus, TCP_PORT=port)
    wait_until(lambda: server.opened == 10)
    wait_for_lines(chat, 100)
    assert master.stop() == 0
    for worker in workers:
        assert worker.ends() == 0
    rows = rows_of(master.output)
    assert rows["connect"] == (10, 0)
    # That no echo failed shows that --chat-echo=tag has reached the workers.
    check_every_echo(rows, chat)
    check_tags(chat.received)
    for program in (master, *workers):
        assert quiet(program.output)
    assert not any(tmp_path.iterdir())


@pytest.mark.together
def test_two_processes_of_one_command_add_up_and_their_tags_stay_unique(
    start: Start, serve: Serve
) -> None:
    chat = Answers(with_the_line)
    server = serve(chat)
    options = (
        "--processes=2 --headless --users=10 --spawn-rate=10 --stop-timeout=60 --chat-wait=0.02"
    )
    host = f"--host={server.address}"
    running = start(*LOCUST, *options.split(), *bus_options(), host)
    wait_until(lambda: server.opened == 10)
    wait_for_lines(chat, 100)
    assert running.stop() == 0
    check_every_echo(rows_of(running.output), chat)
    check_tags(chat.received)
    identities = {line.partition(b".")[0] for line in chat.received}
    assert len(identities) == 10
    assert quiet(running.output)


@pytest.mark.together
def test_two_processes_share_the_built_in_echo_server_of_their_master(start: Start) -> None:
    options = (
        "--processes=2 --headless --users=4 --spawn-rate=9 "
        "--run-time=2s --echo-server --chat-wait=0.05"
    )
    port = str(free_port())
    running = start(*LOCUST, *options.split(), *bus_options(), TCP_PORT=port)
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (4, 0)
    assert rows["echo_response"].successes > 0
    assert quiet(running.output)


@pytest.mark.together
def test_the_file_works_alone_next_to_any_server_with_its_options_in_the_environment(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """The name ``localhost`` may have two addresses, of which the server has one."""
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    chat = Answers(with_the_line)
    server = serve(chat)
    options = "-f locustfile.py --host=localhost --headless --users=5 --spawn-rate=5"
    running = start(
        *LOCUST,
        *options.split(),
        cwd=tmp_path,
        TCP_PORT=str(server.port),
        CHAT_WAIT="0.01",
    )
    # With the usual pauses of a second and more, five users would not get so far in a minute.
    wait_for_lines(chat, 400)
    assert running.stop() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (5, 0)
    assert server.opened == 5
    wait_until(lambda: server.open == 0)
