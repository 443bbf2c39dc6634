"""``plugins/verdict.py``: the exit code says whether the server has passed."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
import verdict
from locust.argument_parser import get_parser
from locust.env import Environment
from programs import (
    QUICK_LOCUST,
    Program,
    Start,
    WebUI,
    bus_options,
    documented_commands,
    wait_until,
)
from rows import fire
from servers import Answers, Serve, echo, in_turn, lines, silent, with_the_line

import locustfile

FILES = ("-f", "locustfile.py,plugins/verdict.py")
SHORT = (
    "--headless",
    "--users=4",
    "--spawn-rate=4",
    "--run-time=2s",
    "--stop-timeout=5",
    "--chat-wait=0.02",
)
GENEROUS = "--chat-max-p95=60000"  # ms; no echo of these tests takes so long


class Run:
    """A run whose rows the test fires itself."""

    def __init__(self) -> None:
        self.environment = Environment()
        self.environment.events.request.add_listener(verdict.keep_failed_echo)
        self.runner = self.environment.create_local_runner()
        verdict.forget_failed_echoes()

    def rows(self, name: str, count: int, failed: int = 0) -> None:
        """Fire so many rows, of which so many failed; they took 1, 2, 3, … ms."""
        for number in range(count):
            error = locustfile.ConnectionClosed() if number < failed else None
            fire(self.environment, name, number + 1, error)

    def exit_code(self, *, ratio: str = "", p95: str = "") -> int | str | None:
        """Return the exit code with these limits."""
        self.environment.parsed_options = argparse.Namespace(
            chat_max_fail_ratio=ratio, chat_max_p95=p95, exit_code_on_error=7
        )
        verdict.judge(self.environment)
        return self.environment.process_exit_code

    def line(self) -> str:
        """Return what is printed after Locust's tables."""
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            self.environment.events.quit.fire(exit_code=0)
        return printed.getvalue()


@pytest.fixture
def run() -> Iterator[Run]:
    """Return a run without any row."""
    run = Run()
    yield run
    run.runner.quit()


@pytest.mark.parametrize(
    ("count", "failed", "limit", "code"),
    [
        (100, 0, "0", 0),
        (100, 1, "0", 1),
        (100, 1, "0.01", 0),
        (100, 2, "0.01", 1),
        (100, 99, ".99", 0),
    ],
)
def test_the_share_of_failed_echoes(
    run: Run, count: int, failed: int, limit: str, code: int
) -> None:
    run.rows("echo_response", count, failed)
    assert run.exit_code(ratio=limit) == code


@pytest.mark.parametrize("name", ["connect", "login", "send_chat", "disconnect", "bought"])
def test_failures_of_every_row_count(run: Run, name: str) -> None:
    run.rows("echo_response", 98)
    run.rows(name, 2, failed=2)
    assert run.exit_code(ratio="0.019") == 1


def test_a_send_is_no_second_try_beside_its_echo_nor_is_a_connect(run: Run) -> None:
    run.rows("connect", 100)
    run.rows("send_chat", 100)
    run.rows("echo_response", 100, failed=2)
    assert run.exit_code(ratio="0.019") == 1


def test_named_rows_are_tries_like_any_other(run: Run) -> None:
    run.rows("send_chat", 150)
    run.rows("echo_response", 50, failed=1)
    run.rows("join", 50)
    assert run.exit_code(ratio="0.01") == 0


def test_what_others_sent_neither_hides_failures_nor_makes_them_more(run: Run) -> None:
    run.rows("echo_response", 100, failed=10)
    run.rows("delivery", 9000, failed=90)
    assert run.exit_code(ratio="0.05") == 1
    assert "failed: fail ratio 0.1 (limit 0.05)" in run.line()


def test_lost_deliveries_count(run: Run) -> None:
    run.rows("echo_response", 1000)
    run.rows("delivery", 100, failed=2)
    assert run.exit_code(ratio="0.01") == 1


@pytest.mark.parametrize(("limit", "code"), [("96", 0), ("95.9", 1)])
def test_the_percentile_is_that_of_the_echoes(run: Run, limit: str, code: int) -> None:
    run.rows("echo_response", 100)  # the 95th of which took 96 ms, as Locust counts
    run.rows("login", 5000)
    run.rows("join", 5000)
    assert run.exit_code(p95=limit) == code


@pytest.mark.parametrize(("failed", "code"), [(5, 0), (6, 1), (90, 1)])
def test_with_over_five_percent_of_the_echoes_failed_no_percentile_holds(
    run: Run, failed: int, code: int
) -> None:
    """The failed ones are the quickest rows."""
    run.rows("echo_response", 100, failed)
    assert run.exit_code(p95="60000") == code
    infinite = f"95th percentile infinite (limit 60000) as {failed} of 100 echoes failed"
    assert (infinite in run.line()) == bool(code)


@pytest.mark.parametrize(("limit", "code"), [("99", 0), ("98.9", 1)])
def test_the_percentile_counts_a_quick_failure_as_slower_than_every_echo(
    run: Run, limit: str, code: int
) -> None:
    run.rows("echo_response", 100, failed=3)  # so the echoes took 4 to 100 ms
    assert run.exit_code(p95=limit) == code


def test_a_reset_of_the_statistics_resets_the_failed_echoes_too(run: Run) -> None:
    run.environment.reset_stats = True
    verdict.watch_reset_stats(run.environment)
    run.rows("echo_response", 50, failed=50)
    run.environment.events.spawning_complete.fire(user_count=1)
    run.rows("echo_response", 100)
    assert run.exit_code(p95="96") == 0


def test_either_limit_can_fail_a_run(run: Run) -> None:
    run.rows("echo_response", 100)
    assert run.exit_code(ratio="0.01", p95="1") == 1


@pytest.mark.parametrize(
    ("name", "failed"), [("echo_response", 5), ("login", 0), ("join", 0), ("send_chat", 0)]
)
def test_a_run_without_any_echo_never_passes(run: Run, name: str, failed: int) -> None:
    run.rows(name, 5, failed)
    assert run.exit_code(ratio="1", p95="60000") == 1
    assert "no echo came" in run.line()


def test_without_a_limit_there_is_no_verdict(run: Run) -> None:
    run.rows("echo_response", 5, failed=5)
    assert run.exit_code() is None
    assert run.line() == ""


def test_one_line_names_figures_and_limits_once(run: Run) -> None:
    run.rows("echo_response", 12)
    run.exit_code(ratio="0.01", p95="200")
    run.exit_code(ratio="0.01", p95="200")  # as Locust may come here twice
    assert run.line() == (
        "locust: verdict passed: fail ratio 0 (limit 0.01), 95th percentile 12 ms (limit 200)\n"
    )


def test_an_exception_in_a_task_fails_a_run_as_locust_has_it(run: Run) -> None:
    run.rows("echo_response", 5)
    run.runner.log_exception("local", "NameError", "the user's own mistake")
    assert run.exit_code(ratio="0.01") == 7  # --exit-code-on-error


def test_a_failure_that_another_plugin_found_stays(run: Run) -> None:
    run.rows("echo_response", 5)
    run.environment.process_exit_code = 3
    assert run.exit_code(ratio="0.01") == 3


def test_a_wrong_limit_of_the_web_form_fails_and_says_what_to_write(run: Run) -> None:
    run.rows("echo_response", 5)
    assert run.exit_code(ratio="few") == 1
    assert "'few' is not a valid fail ratio: use 0 to 1, such as 0.01" in run.line()


# -------------------------------------------------------------------------- the command, as it is


def documented() -> list[str]:
    """Return the arguments of the command that the first lines show."""
    command, *_ = documented_commands(verdict.__doc__)
    _, *arguments = shlex.split(command)
    return arguments


def verdicts(output: str) -> list[str]:
    """Return the lines that say a verdict."""
    return [line for line in output.splitlines() if line.startswith("locust: verdict ")]


@pytest.mark.together
def test_the_documented_command_with_a_server_that_echoes(start: Start, serve: Serve) -> None:
    host = f"--host={serve(echo).address}"
    running = start(*QUICK_LOCUST, *documented(), host, *SHORT, GENEROUS)
    assert running.ends() == 0
    assert running.output.index("Response time percentiles") < running.output.index("\nchat: ")
    (line,) = verdicts(running.output)
    assert line == running.output.splitlines()[-1]
    assert line.startswith("locust: verdict passed: fail ratio 0 (limit 0.01), 95th percentile ")
    assert line.endswith(" ms (limit 60000)")


@pytest.mark.together
@pytest.mark.parametrize("processes", [(), ("--processes=2", *bus_options())])
def test_a_headless_run_without_a_limit_does_not_start(
    start: Start, serve: Serve, processes: tuple[str, ...]
) -> None:
    server = serve(echo)
    running = start(*QUICK_LOCUST, *FILES, f"--host={server.address}", *SHORT, *processes)
    assert running.ends() == 1
    said = [line for line in running.output.splitlines() if "INFO" not in line]
    assert said == [
        "locust: error: verdict.py has no limit to judge by: "
        "use --chat-max-fail-ratio=0.01, --chat-max-p95=200 or both"
    ]
    assert server.opened == 0


LOGIN = """
import locustfile

class Member(locustfile.ChatClient):
    def on_connect(self):
        if self.client.send_chat("PASS secret", echo="any") != "welcome":
            raise ConnectionError("the login failed")
"""


@pytest.mark.together
def test_a_server_that_refuses_every_login_fails(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    member = tmp_path / "member.py"
    member.write_text(LOGIN)
    files = ("-f", f"{member},plugins/verdict.py")
    limits = ("--chat-max-fail-ratio=0.9", GENEROUS)
    server = serve(Answers(in_turn(b"wrong password\n")))
    running = start(*QUICK_LOCUST, *files, f"--host={server.address}", *SHORT, *limits)
    assert running.ends() == 1
    (line,) = verdicts(running.output)
    assert line.startswith("locust: verdict failed: ")
    assert line.endswith("no echo came")


@pytest.mark.together
def test_a_server_that_disconnects_everybody_after_40_messages_fails(
    start: Start, serve: Serve
) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection), 1):
            connection.sendall(line + b"\n")
            if number == 40:
                return

    listening = serve(server)
    limits = ("--chat-max-fail-ratio=0.01", GENEROUS)
    host = f"--host={listening.address}"
    endless = ("--run-time=10m", "--chat-wait=0")
    running = start(*QUICK_LOCUST, *FILES, host, *SHORT, *endless, *limits)
    wait_until(lambda: listening.opened > 20)
    assert running.stop() == 1
    (line,) = verdicts(running.output)
    assert line.startswith("locust: verdict failed: fail ratio 0.02")  # one of 41
    assert "no echo came" not in line


@pytest.mark.together
def test_a_server_that_never_answers_fails(start: Start, serve: Serve) -> None:
    host = f"--host={serve(silent).address}"
    options = ("--chat-timeout=60", "--stop-timeout=0", "--chat-max-fail-ratio=1")
    running = start(*QUICK_LOCUST, *FILES, host, *SHORT, *options)
    assert running.ends() == 1
    assert verdicts(running.output) == [
        "locust: verdict failed: fail ratio 0 (limit 1), no echo came"
    ]


@pytest.mark.together
def test_the_master_judges_with_the_last_reports_of_a_worker_that_has_its_files_from_it(
    start: Start, serve: Serve
) -> None:
    chat = Answers(lambda line: line[: 20 if len(chat.received) % 2 else None] + b"\n")
    bus = bus_options()
    host = f"--host={serve(chat).address}"
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", "--headless", *bus)  # no limit on a worker
    options = "--headless --expect-workers=1 --users=2 --spawn-rate=9 --chat-wait=0.1"
    files = ("-f", "locustfile.py,plugins/delivery.py,plugins/verdict.py", "RoomClient")
    master = start(*QUICK_LOCUST, *files, "--master", *bus, host, *options.split(), GENEROUS)
    wait_until(lambda: len(chat.received) > 5)  # the master hears every 3 s
    assert (master.stop(), worker.ends()) == (1, 0)
    (line,) = verdicts(master.output)
    infinite = r"95th percentile infinite \(limit 60000\) as [1-9]\d* of \d+ echoes failed"
    assert re.match(f"locust: verdict failed: {infinite}", line)
    assert "no echo came" not in line
    assert "verdict" not in worker.output


class Distributed:
    """A master with two workers that report often, and whose absence is soon noticed."""

    def __init__(self, start: Start, serve: Serve, directory: Path, *options: str) -> None:
        chat = Answers(with_the_line)
        bus = bus_options()
        self.workers = [start(*QUICK_LOCUST, "-f", "-", "--worker", *bus) for _ in range(2)]
        files = "locustfile.py,plugins/verdict.py,tests/locustfiles/quick_heartbeat.py"
        users = "--headless --expect-workers=2 --users=4 --spawn-rate=9 --chat-wait=0.1"
        host = f"--host={serve(chat).address}"
        self.master = start(
            *QUICK_LOCUST, "-f", files, "--master", *bus, host, *users.split(), *options
        )
        wait_until(lambda: len(chat.received) > 20)

    def kill_worker(self) -> None:
        """Kill a worker, as a machine without memory does."""
        self.workers[0].process.send_signal(signal.SIGKILL)


@pytest.mark.together
def test_with_a_worker_that_is_killed_the_verdict_is_unknown(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    run = Distributed(start, serve, tmp_path, "--chat-max-fail-ratio=1", GENEROUS)
    run.kill_worker()
    run.master.prints("1 of 2 workers lost")
    assert run.master.stop() == 1
    (line,) = verdicts(run.master.output)
    assert line.startswith("locust: verdict unknown: fail ratio 0 (limit 1), 95th percentile ")
    assert line.endswith(", 1 of 2 workers lost")


@pytest.mark.together
def test_with_a_worker_that_is_killed_just_before_the_end_the_verdict_is_unknown(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    run = Distributed(start, serve, tmp_path, GENEROUS)
    run.kill_worker()
    assert run.master.stop() == 1
    (line,) = verdicts(run.master.output)
    assert line.startswith("locust: verdict unknown: ")
    assert "1 of 2 workers " in line


def hold_up(running: Program, chat: Answers) -> None:
    """Let a generator that has begun stand still for two seconds, and notice it."""
    wait_until(lambda: len(chat.received) > 20)
    os.kill(running.process.pid, signal.SIGSTOP)
    gevent.sleep(2)
    os.kill(running.process.pid, signal.SIGCONT)
    running.prints("the generator stood still for ")


@pytest.mark.together
def test_a_generator_that_stood_still_is_named_beside_what_the_server_did(
    start: Start, serve: Serve
) -> None:
    chat = Answers(with_the_line)
    host = f"--host={serve(chat).address}"
    running = start(*QUICK_LOCUST, *FILES, host, *SHORT, "--run-time=10m", GENEROUS)
    hold_up(running, chat)
    assert running.stop() == 0
    (line,) = verdicts(running.output)
    assert line.startswith("locust: verdict passed: 95th percentile ")
    assert ", the generator stood still for " in line


@pytest.mark.together
def test_in_open_loop_a_generator_that_stood_still_makes_the_verdict_unknown(
    start: Start, serve: Serve
) -> None:
    chat = Answers(with_the_line)
    host = f"--host={serve(chat).address}"
    options = "--headless --users=4 --spawn-rate=4 --chat-rate=10"
    running = start(*QUICK_LOCUST, *FILES, host, *options.split(), GENEROUS)
    hold_up(running, chat)
    assert running.stop() == 1
    (line,) = verdicts(running.output)
    assert line.startswith("locust: verdict unknown: 95th percentile ")
    assert re.search(r", the generator started \d+ of \d+ messages in time", line)


@pytest.mark.together
def test_a_verdict_that_is_listed_after_what_has_imported_it_is_one_line(start: Start) -> None:
    files = "locustfile.py,plugins/find_capacity.py,plugins/verdict.py"
    running = start(*QUICK_LOCUST, "-f", files, "--headless", "--host=127.0.0.1:1")
    assert running.ends() == 1
    said = "locust: error: -f has to list verdict.py before find_capacity.py\n"
    assert running.output == said


@pytest.mark.together
def test_limits_from_the_form_of_the_web_ui(start: Start, serve: Serve) -> None:
    web_ui = WebUI()
    host = f"--host={serve(echo).address}"
    running = start(*QUICK_LOCUST, *FILES, *web_ui.options, host, "--chat-wait=0.02")
    web_ui.swarm(chat_max_p95="60000")
    wait_until(web_ui.has_echoes)
    assert running.stop() == 0
    (line,) = verdicts(running.output)
    assert line.startswith("locust: verdict passed: 95th percentile ")


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("chat-max-fail-ratio", "2", "fail ratio: use 0 to 1, such as 0.01"),
        ("chat-max-p95", "fast", "percentile: use ms above 0, such as 200"),
    ],
)
def test_a_wrong_limit_is_one_line_that_says_what_to_write_instead(
    capsys: pytest.CaptureFixture[str], option: str, value: str, instead: str
) -> None:
    with pytest.raises(SystemExit):
        get_parser(default_config_files=[]).parse_args([f"--{option}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": error: argument --{option}: {value!r} is not a valid {instead}")
