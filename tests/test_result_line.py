"""The last line of a run, ``chat: …``, and the exit code of a run in which no echo came."""

from __future__ import annotations

import csv
import json
import logging
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest
from locust import constant, task
from locust.stats import calculate_response_time_percentile
from programs import (
    QUICK_LOCUST,
    Program,
    Start,
    WebUI,
    bus_options,
    latest_counts,
    programs,
    rows_of,
    wait_until,
)
from rows import Run, RunUsers
from servers import Answers, Serve, echo, echo_once, free_port, servers, silent, with_the_line

from locustfile import ChatClient, TCPChatUser, run_totals

RESULT = re.compile(
    r"chat: (?P<echoed>[\d,]+) messages? echoed, (?P<rate>[\d.,]+) a second; "
    r"round trip median (?P<median>[\d.e+]+) ms, 95th percentile (?P<p95>[\d.e+]+), "
    r"99th (?P<p99>[\d.e+]+), maximum (?P<maximum>[\d.e+]+); "
    r"(?P<failed>[\d,]+) of (?P<tries>[\d,]+) tries failed; (?P<disconnects>[\d,]+) disconnects?"
    r"(?P<rest>.*)"
)


class Result(NamedTuple):
    """What the result line of a run says."""

    echoed: int
    rate: float
    percentiles: tuple[str, ...]  # the median, the 95th and the 99th
    maximum: str
    failed: int
    tries: int
    disconnects: int
    rest: str


def parsed(line: str) -> Result:
    """Understand a result line."""
    match = RESULT.fullmatch(line)
    assert match is not None, line
    rate = match["rate"].replace(",", "")
    return Result(
        echoed=whole(match["echoed"]),
        rate=float(rate),
        percentiles=match.group("median", "p95", "p99"),
        maximum=match["maximum"],
        failed=whole(match["failed"]),
        tries=whole(match["tries"]),
        disconnects=whole(match["disconnects"]),
        rest=match["rest"],
    )


def whole(text: str) -> int:
    """Return the number that a text with commas is."""
    return int(text.replace(",", ""))


def result_lines(output: str) -> list[str]:
    """Return the lines of the result."""
    return re.findall(r"^chat: .*$", output, re.MULTILINE)


def last_line(output: str) -> str:
    """Return the result line, and see that it is the only one, and the last."""
    (line,) = result_lines(output)
    assert output.splitlines()[-1] == line
    return line


def shown_rate(output: str) -> float:
    """Return how many echoes a second the last table shows: requests, less failures."""
    tables, _, _ = output.partition("Response time percentiles")
    _, _, table = tables.rpartition("Type     Name")
    shown = re.search(r"^TCP +echo_response .*\| +([\d.]+) +([\d.]+) *$", table, re.MULTILINE)
    assert shown is not None
    requests, failures = map(float, shown.groups())
    return requests - failures


def check_table(output: str) -> Result:
    """See that the last line agrees with Locust's table; return what it says."""
    line = last_line(output)
    result = parsed(line)
    rows = rows_of(output)
    echoes = rows["echo_response"]
    failed_before = rows["connect"].failures + rows["send_chat"].failures
    assert result.echoed == echoes.successes
    assert result.failed == sum(row.failures for row in rows.values())
    assert result.tries == echoes.requests + failed_before
    assert result.rate == pytest.approx(shown_rate(output), abs=0.11)
    return result


class Altering(Answers):
    """A handler that alters the end of every so many-th line, and returns the others."""

    def __init__(self, every: int) -> None:
        super().__init__(self._answer_to)
        self._every = every

    @property
    def altered(self) -> int:
        """How many lines it has altered."""
        return len(self.received) // self._every

    def _answer_to(self, line: bytes) -> bytes:
        if len(self.received) % self._every == 0:
            line = line[:-1] + b"#"
        return line + b"\n"


# ----------------------------------------------------------------------------- short runs

# A user all of whose exchanges end in rows of other names; and a listener that fails the run.
NAMED = """
from locust import constant, events, task
import locustfile

class Named(locustfile.TCPChatUser):
    wait_time = constant(0.1)

    @task
    def join(self):
        self.client.send_chat("hello", name="join")
"""
FAILS = """
from locust import events

@events.quitting.add_listener
def fail(environment, **_):
    environment.process_exit_code = 3
"""
# Failed requests alone do not fail these runs.
SHORT = ("--headless", "--users=2", "--spawn-rate=9", "--run-time=10m", "--exit-code-on-error=0")


class ShortRun(NamedTuple):
    """A run that is stopped as soon as its table has two of a row."""

    options: tuple[str, ...]
    row: str


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    """Return runs that have ended, by name: they run at the same time, as most of it is waiting."""
    folder = tmp_path_factory.mktemp("files")
    named = folder / "named.py"
    named.write_text(NAMED)
    fails = folder / "fails.py"
    fails.write_text(FAILS)
    with servers() as serve, programs() as start:
        altered = f"--host={serve(Altering(1)).address}"
        quiet = f"--host={serve(silent).address}"
        cases = {
            # Its users end when their echoes have come, so that none is still awaited.
            "all failed": ShortRun(
                (altered, f"-f=locustfile.py,{named}", "Named", "--stop-timeout=20"),
                row="join",
            ),
            "failed with code 3": ShortRun(
                (altered, f"-f=locustfile.py,{fails}"),
                row="echo_response",
            ),
            "none awaited": ShortRun(
                (quiet, "--chat-echo=none", "--chat-wait=0.1"),
                row="send_chat",
            ),
            "awaited in two processes": ShortRun(
                (quiet, "--processes=2", *bus_options()),
                row="connect",
            ),
        }
        runs = {}
        for name, case in cases.items():
            runs[name] = start(*QUICK_LOCUST, *SHORT, *case.options)
        for name, case in cases.items():
            wait_until(lambda: latest_counts(runs[name], case.row).requests >= 2)  # noqa: B023
            runs[name].stop()
        yield runs


def test_a_run_whose_echoes_all_failed_whatever_their_rows_warns_and_exits_1(
    short_runs: dict[str, Program],
) -> None:
    run = short_runs["all failed"]
    assert run.ends() == 1
    rows = rows_of(run.output)
    tries = rows["join"].requests
    assert tries > 0
    assert rows["join"].failures == tries
    line = last_line(run.output)
    assert line.startswith(f"chat: 0 of {tries} messages echoed")
    assert f"; {tries} of {tries} tries failed" in line
    assert "WARNING" in run.output
    assert "echoes were awaited, and none came" in run.output


def test_an_exit_code_that_somebody_else_has_set_is_not_replaced(
    short_runs: dict[str, Program],
) -> None:
    run = short_runs["failed with code 3"]
    assert run.ends() == 3
    assert last_line(run.output)


def test_where_no_echo_is_awaited_the_line_says_so_and_counts_what_was_sent(
    short_runs: dict[str, Program],
) -> None:
    run = short_runs["none awaited"]
    assert run.ends() == 0
    rows = rows_of(run.output)
    sent = rows["send_chat"].requests
    assert sent > 0
    line = last_line(run.output)
    assert line.startswith(f"chat: no echo was awaited; {sent} messages sent, ")
    assert "none came" not in run.output


def test_echoes_still_awaited_in_the_workers_are_counted_and_exit_1(
    short_runs: dict[str, Program],
) -> None:
    run = short_runs["awaited in two processes"]
    assert run.ends() == 1
    line = last_line(run.output)
    assert "; 2 echoes still awaited at the end" in line
    assert "workers" not in line
    assert "echoes were awaited, and none came" in run.output


# ----------------------------------------------------------------------------- one process


@pytest.mark.together
def test_the_line_agrees_with_json_and_csv_also_after_the_statistics_were_reset(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """The JSON has standard output for itself."""
    chat = Altering(7)
    server = serve(chat)
    log = tmp_path / "log"
    options = (
        "--headless --users=4 --spawn-rate=2 --reset-stats --run-time=4s --stop-timeout=20 "
        "--chat-wait=0.02 --json --exit-code-on-error=0"
    )
    running = start(
        "sh",
        "-c",
        f'exec "$0" "$@" 2>{log}',
        *QUICK_LOCUST,
        *options.split(),
        f"--host={server.address}",
        f"--csv={tmp_path}/run",
    )
    assert running.ends() == 0
    line = last_line(log.read_text())
    result = parsed(line)
    entry = named(json.loads(running.output), "name", "echo_response")
    count = entry["num_requests"]
    failed = entry["num_failures"]
    assert 0 < count < len(chat.received)
    assert result.echoed == count - failed
    assert result.failed == failed > 0
    assert result.tries == count
    assert result.disconnects == 0
    # The largest bucket of all may stand for the maximum, which Locust does not round.
    for told, expected in zip(result.percentiles, percentiles_of(entry), strict=True):
        assert float(told) == pytest.approx(expected, rel=0.06)
    assert result.maximum == f"{entry['max_response_time']:.4g}"
    with (tmp_path / "run_stats.csv").open() as file:
        row = named(csv.DictReader(file), "Name", "echo_response")
    # Locust writes it every second, and not at the end.
    assert 0 < int(row["Request Count"]) <= count


def named(rows: Iterable[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
    """Return the row that has a name under this key."""
    (row,) = (row for row in rows if row[key] == name)
    return row


def percentiles_of(entry: dict[str, Any]) -> list[float]:
    """Return the median, the 95th and the 99th percentile of what --json says of a row."""
    times = {float(time): count for time, count in entry["response_times"].items()}
    count = entry["num_requests"]
    return [
        calculate_response_time_percentile(times, count, share)  # type: ignore[arg-type]
        for share in (0.5, 0.95, 0.99)
    ]


@pytest.mark.together
def test_after_ctrl_c_the_line_is_the_last_one_and_agrees_with_the_table(
    start: Start, serve: Serve
) -> None:
    chat = Answers(with_the_line)
    options = "--headless --users=5 --spawn-rate=5 --chat-wait=0.02 --only-summary"
    running = start(*QUICK_LOCUST, *options.split(), f"--host={serve(chat).address}")
    wait_until(lambda: len(chat.received) > 200)
    assert running.interrupt() == 0
    result = check_table(running.output)
    assert result.echoed > 100
    assert (result.failed, result.disconnects) == (0, 0)
    assert any("." in text for text in result.percentiles)  # below a millisecond, or of 10


@pytest.mark.together
def test_after_ctrl_c_while_all_echoes_are_awaited_the_exit_code_is_1(
    start: Start, serve: Serve
) -> None:
    chat = Answers(lambda line: b"")
    options = "--headless --users=5 --spawn-rate=5 --chat-timeout=600"
    running = start(*QUICK_LOCUST, *options.split(), f"--host={serve(chat).address}")
    wait_until(lambda: len(chat.received) == 5)
    assert running.interrupt() == 1
    assert "; 5 echoes still awaited at the end" in last_line(running.output)
    assert "Traceback" not in running.output


# ----------------------------------------------------------------------------- several processes


@pytest.mark.together
def test_with_processes_one_line_agrees_with_the_table_and_each_takes_another_server_first(
    start: Start, serve: Serve
) -> None:
    one, other = Altering(10), Altering(10)
    one_server, other_server = serve(one), serve(other)
    options = "--processes=2 --headless --users=2 --spawn-rate=2 --chat-wait=0.02 --stop-timeout=30"
    running = start(
        *QUICK_LOCUST,
        *options.split(),
        *bus_options(),
        f"--host={one_server.address},{other_server.address}",
        "--exit-code-on-error=0",
    )
    wait_until(lambda: len(one.received) > 50)
    wait_until(lambda: len(other.received) > 50)
    assert running.stop() == 0
    result = check_table(running.output)
    said = len(one.received) + len(other.received)
    assert result.failed == one.altered + other.altered
    assert result.echoed == said - result.failed
    assert "workers" not in result.rest
    assert one_server.opened == 1
    assert other_server.opened == 1


@pytest.mark.together
def test_a_worker_that_does_not_report_its_end_is_named_and_workers_print_no_line(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    chat = Answers(with_the_line)
    server = serve(chat)
    bus = ("--master-host=127.0.0.1", "--master-bind-host=127.0.0.1", *bus_options())
    files = ("-f", "locustfile.py", "ChatClient")
    stopped = start(*QUICK_LOCUST, *files, "--worker", *bus)
    ending = start(*QUICK_LOCUST, *files, "--worker", *bus)
    options = (
        "--master --expect-workers=2 --headless --users=4 --spawn-rate=9 --chat-wait=0.02 "
        f"--host={server.address} --only-summary --exit-code-on-error=0"
    )
    master = start(*QUICK_LOCUST, *files, *options.split(), *bus)
    wait_until(lambda: server.opened == 4)
    wait_until(lambda: len(chat.received) > 100)
    gevent.sleep(0.5)  # for a report of each
    stopped.process.send_signal(signal.SIGSTOP)
    assert master.interrupt() == 0
    result = check_table(master.output)
    assert result.echoed > 0
    # A master that is slow may have missed it before.
    assert re.search(r"; 1 of 2 workers (did not report their end|lost)", result.rest)
    ending.ends()
    assert result_lines(ending.output) == []


# ----------------------------------------------------------------------------- the web UI


@pytest.mark.together
def test_in_the_web_ui_the_line_is_logged_when_a_run_has_stopped_and_each_time(
    start: Start, serve: Serve
) -> None:
    web_ui = WebUI()
    answering, quiet = serve(echo), serve(silent)
    running = start(*QUICK_LOCUST, *web_ui.options)
    running.prints("Starting web interface")
    web_ui.swarm(host=answering.address, chat_wait="0.05")
    wait_until(web_ui.has_echoes)
    assert "chat: " not in running.output
    web_ui.stop()
    running.prints("messages echoed")
    web_ui.swarm(host=quiet.address, chat_wait="0.05")
    wait_until(lambda: quiet.open == 2)
    wait_until(lambda: web_ui.statistics().get("stats"))
    web_ui.stop()
    running.prints("echoes still awaited")
    assert running.stop() == 1  # the last run had no echo
    pattern = r"^\[.*\] \S+/(\w+)/locustfile: (chat: .*)$"
    first, second = re.findall(pattern, running.output, re.MULTILINE)
    level, line = first
    assert level == "INFO"
    assert parsed(line).echoed > 0
    level, line = second
    assert level == "WARNING"
    assert "2 echoes still awaited at the end" in line
    assert result_lines(running.output) == []  # nothing is printed again behind the table


# ----------------------------------------------------------------------------- what it counts


def failures(chat: Run, name: str) -> int:
    """Return how many request events of that name are failures."""
    return chat.row(name).num_failures


def logged_result(caplog: pytest.LogCaptureFixture) -> str:
    """Return the last result line that was logged."""
    texts = [text for text in caplog.messages if text.startswith("chat: ")]
    return texts[-1]


def test_disconnects_and_failed_connects_are_counted_in_the_line(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class Leaves(TCPChatUser):
        """Has an echo on each of its connections."""

        wait_time = constant(0.01)

        @task
        def say_one_thing(self) -> None:
            self.client.send_chat("hello")
            wait_until(lambda: self.client.connected_since is None)

    server = serve(echo_once)
    chat = run_users(Leaves, server.address, users=2, is_recorded=True)
    wait_until(lambda: failures(chat, "disconnect") >= 5)
    server.stop()
    wait_until(lambda: failures(chat, "connect") >= 2)
    chat.runner.stop()
    result = parsed(logged_result(caplog))
    assert result.disconnects == failures(chat, "disconnect")
    rows = chat.environment.stats.entries.values()
    assert result.failed == sum(row.num_failures for row in rows)
    assert result.tries == result.echoed + result.failed
    assert result.echoed == chat.count("echo_response")


def test_a_run_that_did_not_get_beyond_its_logins_says_so_and_one_is_singular(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class LogsIn(TCPChatUser):
        """Says nothing after its login."""

        wait_time = constant(0.01)

        def on_connect(self) -> None:
            self.client.send_chat("/login", echo="any")

        @task
        def say_nothing(self) -> None:
            """Wait."""

    chat = run_users(LogsIn, serve(echo).address, is_recorded=True)
    wait_until(lambda: chat.count("login") == 1)
    chat.runner.stop()
    said = "chat: 1 of 1 message echoed (of logins alone); 0 of 1 tries failed; 0 disconnects"
    assert logged_result(caplog).startswith(said)


def test_echoes_in_rows_of_other_names_count_as_echoes(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class Joins(TCPChatUser):
        """Names all of its rows."""

        wait_time = constant(0.01)

        @task
        def join(self) -> None:
            self.client.send_chat("hello", name="join")

    chat = run_users(Joins, serve(echo).address, is_recorded=True)
    wait_until(lambda: chat.count("join") > 10)
    chat.runner.stop()
    totals = run_totals(chat.environment)
    assert totals.echoed == chat.count("join")
    begun = totals.awaited + totals.in_flight
    said = f"{totals.echoed} of {begun} messages echoed (in rows of other names)"
    assert said in logged_result(caplog)
    for record in caplog.records:
        if "chat: " in record.message:
            assert record.levelname == "INFO"


def test_what_a_login_awaits_counts_too_and_alone_it_is_enough(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class Member(ChatClient):
        """Logs in, and awaits no other echo."""

        echo = "none"

        def on_connect(self) -> None:
            self.client.send_chat(b"login", echo="any")

    chat = run_users(Member, serve(echo).address, users=3, is_recorded=True, chat_wait="0.01")
    wait_until(lambda: chat.count("send_chat") > 20)
    chat.runner.stop()
    totals = run_totals(chat.environment)
    assert (totals.awaited, totals.echoed, totals.in_flight) == (3, 3, 0)
    assert chat.row("send_chat").num_requests > 3
    assert "no echo was awaited" not in logged_result(caplog)


def test_the_counts_of_a_dead_port_are_failed_connects_and_no_echo(
    run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dead = f"127.0.0.1:{free_port()}"
    chat = run_users(ChatClient, dead, users=2, is_recorded=True)
    wait_until(lambda: failures(chat, "connect") >= 2)
    chat.runner.stop()
    line = logged_result(caplog)
    failed = failures(chat, "connect")
    assert "messages echoed" not in line
    assert f"; {failed} of {failed} tries failed" in line
