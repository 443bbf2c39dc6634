"""``plugins/find_capacity.py``: the search, the steps, and whole runs against capped servers."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import delivery
import find_capacity
import gevent
import pytest
import verdict
from find_capacity import Plan, Step, Timer
from locust.argument_parser import get_parser
from locust.env import Environment
from locust.runners import STATE_RUNNING
from programs import (
    QUICK_LOCUST,
    ROOT,
    Program,
    Start,
    WebUI,
    bus_options,
    documented_commands,
    wait_until,
)
from rows import fire
from servers import Answers, Handler, Serve, Server, echo, lines, with_the_line

import locustfile

FILES = "locustfile.py,plugins/find_capacity.py"

# ------------------------------------------------------------------------------- what a step says


class Measured:
    """A run whose rows the test fires itself, and whose timers and totals it sets."""

    def __init__(self) -> None:
        self.environment = Environment()
        self.environment.events.request.add_listener(verdict.keep_failed_echo)
        self.runner = self.environment.create_local_runner()
        verdict.forget_failed_echoes()
        self._before = self._snapshot(0.0, 0.0, locustfile.Totals())

    def _snapshot(
        self, seconds: float, processor: float, totals: locustfile.Totals
    ) -> find_capacity.Snapshot:
        """Return a snapshot as if two processes had gone on for so many seconds."""
        timers = dict.fromkeys(("one", "other"), Timer(seconds, processor))
        snapshot = find_capacity.take_snapshot(self.environment)
        return snapshot._replace(timers=timers, totals=totals)

    def fire(
        self, name: str, count: int, error: Exception | None = None, milliseconds: int = 10
    ) -> None:
        """Fire so many rows that succeeded, or failed with an error."""
        for _ in range(count):
            fire(self.environment, name, milliseconds, error)

    def step(
        self,
        users: int = 10,
        missing: int = 0,
        processor: float = 0.0,
        **totals: int,
    ) -> Step:
        """Return the step of two seconds in which these rows came, some users missing at its end.

        :param totals: what the generator did
        """
        after = self._snapshot(2.0, processor, locustfile.Totals()._replace(**totals))
        step = Step(PLAN, users, users - missing, self._before, after)
        self._before = self._snapshot(0.0, 0.0, locustfile.Totals())
        return step


PLAN = Plan(step=10, step_time=2, max_users=50, limits=verdict.Limits(fail_ratio=0.01, p95=100))


@pytest.fixture
def rows() -> Iterator[Measured]:
    """Return a run without any row."""
    rows = Measured()
    yield rows
    rows.runner.quit()


def test_a_step_counts_only_what_came_in_it_from_all_processes(rows: Measured) -> None:
    rows.fire("echo_response", 10, locustfile.EchoTimeout(), milliseconds=5000)
    rows.step()
    rows.fire("echo_response", 100)
    step = rows.step()
    assert step.fault == ""
    assert step.load == "10 users, 50.0 messages a second echoed"
    assert step.figures == "fail ratio 0 (limit 0.01), 95th percentile 10 ms (limit 100)"


def test_in_open_loop_a_step_says_what_was_due_and_what_was_reached(rows: Measured) -> None:
    rows.fire("echo_response", 90)
    rows.fire("echo_response", 10, milliseconds=200)
    step = rows.step(due=110, started_in_time=108)
    assert step.load == "10 users, 55.0 messages a second due, 50.0 messages a second echoed"
    assert step.fault == "95th percentile 200 ms (limit 100)"


def test_slow_echoes_break_a_step(rows: Measured) -> None:
    rows.fire("echo_response", 90)
    rows.fire("echo_response", 10, milliseconds=200)
    assert rows.step().fault == "95th percentile 200 ms (limit 100)"


@pytest.mark.parametrize(
    "name", ["connect", "send_chat", "echo_response", "login", "disconnect", "bought"]
)
def test_failures_of_every_row_break_a_step(rows: Measured, name: str) -> None:
    rows.fire("connect", 1000)
    rows.fire("send_chat", 1000)
    rows.fire("echo_response", 95)
    rows.fire(name, 5, locustfile.EchoRefused())
    assert rows.step().fault == "fail ratio 0.05 (limit 0.01)"


def test_lost_deliveries_break_a_step_and_good_ones_hide_no_failure(rows: Measured) -> None:
    rows.fire("echo_response", 1000)
    rows.fire("delivery", 98)
    rows.fire("delivery", 2, delivery.DeliveryLost())
    assert rows.step().fault == "fail ratio 0.02 (limit 0.01)"
    rows.fire("echo_response", 97)
    rows.fire("echo_response", 3, locustfile.EchoAltered())
    rows.fire("delivery", 9900)
    assert rows.step().fault == "fail ratio 0.03 (limit 0.01)"


def test_a_failed_echo_is_infinitely_slow(rows: Measured) -> None:
    rows.fire("echo_response", 94)
    rows.fire("echo_response", 6, locustfile.EchoAltered(), milliseconds=1)
    assert rows.step().figures == (
        "fail ratio 0.06 (limit 0.01), "
        "95th percentile infinite (limit 100) as 6 of 100 echoes failed"
    )


def test_a_few_lost_connections_among_thousands_of_messages_break_a_step(rows: Measured) -> None:
    rows.fire("echo_response", 1000)
    rows.fire("echo_response", 1, locustfile.EchoTimeout())
    rows.fire("delivery", 999)
    rows.fire("delivery", 1, delivery.DeliveryLost())
    assert rows.step().fault == ""  # a late echo is no lost connection, nor is a lost delivery
    rows.fire("echo_response", 1000)
    rows.fire("disconnect", 1, locustfile.ConnectionClosed())
    rows.fire("connect", 1, ConnectionRefusedError(111, "Connection refused"))
    assert rows.step().fault == "2 times a connection was lost or refused (limit 0.01 a user)"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (None, "fail ratio 0 (limit 0.01), no echo came"),
        (
            locustfile.EchoTimeout(),
            "fail ratio 1 (limit 0.01), "
            "95th percentile infinite (limit 100) as 5 of 5 echoes failed, no echo came",
        ),
    ],
)
def test_a_step_without_an_echo_does_not_hold(
    rows: Measured, error: Exception | None, fault: str
) -> None:
    rows.fire("send_chat", 5)
    if error is not None:
        rows.fire("echo_response", 5, error)
    assert rows.step().fault == fault


def test_users_that_did_not_start_break_a_step(rows: Measured) -> None:
    rows.fire("echo_response", 100)
    assert rows.step(missing=1).fault == "only 9 were running"


def test_a_generator_without_processor_time_is_the_first_fault(rows: Measured) -> None:
    rows.fire("echo_response", 100, milliseconds=9000)
    step = rows.step(processor=1.9)
    assert step.fault == step.generator_fault
    assert step.fault == "the generator ran out of processor (95 % of a core)"


def test_a_generator_behind_its_schedule_is_the_first_fault(rows: Measured) -> None:
    rows.fire("echo_response", 100, milliseconds=9000)
    step = rows.step(due=100, started_in_time=94)
    assert step.fault == step.generator_fault
    assert step.fault == "the generator started 94 of 100 messages in time"


# ------------------------------------------------------------------------------------- the search


class ScriptedSteps:
    """Gives the steps that a test has scripted, in their order, in place of measured ones."""

    def __init__(self, rows: Measured, *script: str) -> None:
        self._rows = rows
        self._script = iter(script)

    def measure(self, environment: Environment, plan: Plan, users: int, settling: float) -> Step:
        """Return a step that held, broke, or found the generator exhausted, as the script says."""
        outcome = next(self._script)
        if outcome == "dies":
            raise find_capacity.WorkerLost("a worker was lost")
        if outcome == "ends":  # as Locust ends a run
            raise gevent.GreenletExit
        error = locustfile.EchoAltered() if outcome == "breaks" else None
        self._rows.fire("echo_response", 100, error)
        return self._rows.step(users, processor=2.0 if outcome == "exhausts" else 0.0)


@pytest.mark.parametrize(
    ("script", "steps", "answer", "is_found"),
    [
        ("holds holds", [10, 15], r"at least 15 users, .*; no limit was reached up to.*", True),
        ("holds breaks holds", [10, 15, 10], r"10 users, .*; at 15 users, .*: fail ratio.*", True),
        ("holds breaks breaks", [10, 15, 10], r"none; at 15 users, .*; then no step held", False),
        ("breaks", [10], r"none; at 10 users, 0.0 messages .*: fail ratio .* no echo came", False),
        (
            "exhausts",
            [10],
            r"unknown: at 10 users.*: the gen.*: use --processes, or more m.*",
            False,
        ),
        ("holds exhausts", [10, 15], r"unknown: at 15 .*; before it held 10 users, .*", False),
        ("holds breaks exhausts", [10, 15, 10], r"unknown: at 10 users.*: the generator .*", False),
        ("holds dies", [10, 15], r"unknown: a worker was lost; before it held 10 users.*", False),
        (
            "holds ends",
            [10, 15],
            r"unknown: the run ended before a limit .*; before it held 10.*",
            False,
        ),
    ],
)
def test_the_search(
    rows: Measured,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    steps: list[int],
    answer: str,
    is_found: bool,
) -> None:
    monkeypatch.setattr(find_capacity, "measure", ScriptedSteps(rows, *script.split()).measure)
    rows.environment.parsed_options = Namespace(capacity_max_users="15")
    search = find_capacity.FindCapacity()
    search.runner = rows.runner
    targets = []
    with contextlib.suppress(gevent.GreenletExit):
        while target := search.tick():
            targets.append(target)
            rows.runner.state = STATE_RUNNING
    assert targets == [(users, 10) for users in steps]
    assert re.fullmatch(answer, search.answer(rows.environment))
    assert search.is_found(rows.environment) == is_found


# ------------------------------------------------------------------------------------- whole runs

QUICK_FILES = f"{FILES},tests/locustfiles/short_settling.py"
# Limits that a machine ten times slower keeps.
LIMITS = "--capacity-step=2 --capacity-step-time=0.5 --capacity-max-p95=1000 --capacity-max-users=6"


def arguments(server: Server, more: str = "") -> list[str]:
    """Return the arguments of a run with that server; more wins over LIMITS."""
    return [f"--host={server.address}", *bus_options(), *LIMITS.split(), *more.split()]


def documented() -> list[str]:
    """Return the arguments of the command that the first lines show, with shorter pauses."""
    command, *_ = documented_commands(find_capacity.__doc__)
    _, option, files, *rest = shlex.split(command)
    assert (option, files) == ("-f", FILES)
    return [option, QUICK_FILES, *rest]


def answer(run: Program) -> str:
    """Return the last line of a run; it must be the only one that says a capacity."""
    assert "Traceback" not in run.output
    assert len(re.findall("^capacity: ", run.output, re.MULTILINE)) == 1
    return run.output.splitlines()[-1]


def slow_above(users: int) -> Handler:
    """Return a server that answers at once, and after 1.5 s while it has more connections."""
    present: set[socket.socket] = set()

    def server(connection: socket.socket) -> None:
        present.add(connection)
        try:
            for line in lines(connection):
                if len(present) > users:
                    gevent.sleep(1.5)
                connection.sendall(line + b"\n")
        finally:
            present.discard(connection)

    return server


def damaged_above(users: int, afterwards: int) -> Handler:
    """Return a server that cuts echoes while it has more connections, and then holds fewer."""
    present: set[socket.socket] = set()
    held = [users]

    def server(connection: socket.socket) -> None:
        present.add(connection)
        try:
            for line in lines(connection):
                if len(present) > held[0]:
                    held[0] = min(held[0], afterwards)
                    line = line[:20]
                connection.sendall(line + b"\n")
        finally:
            present.discard(connection)

    return server


@pytest.mark.together
def test_the_documented_command_with_a_server_that_gets_slow_above_its_capacity(
    start: Start, serve: Serve
) -> None:
    options = "--chat-wait=0.05 --capacity-step=4 --capacity-step-time=2 --capacity-max-users=8"
    run = start(*QUICK_LOCUST, *documented(), *arguments(serve(slow_above(5)), options))
    assert run.ends() == 0
    assert re.fullmatch(
        r"capacity: 4 users, [\d.]+ messages a second echoed "
        r"\(fail ratio 0 \(limit 0.01\), 95th percentile [\d.]+ ms \(limit 1000\)\); "
        r"at 8 users, .* echoed: 95th percentile [\d.]+ ms \(limit 1000\)(; .*)?",
        answer(run),
    )
    assert run.output.index("Response time percentiles") < run.output.index("\nchat: ")


@pytest.mark.together
def test_a_master_with_a_worker_that_has_its_files_from_it_and_a_server_that_stays_damaged(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    server = serve(damaged_above(5, afterwards=3))
    bus = bus_options()
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus, cwd=tmp_path, TMPDIR=str(tmp_path))
    options = "--headless --master --expect-workers=1 --chat-wait=0.05"
    files = ("-f", QUICK_FILES)
    master = start(*QUICK_LOCUST, *files, *arguments(server, options), *bus)
    assert (master.ends(), worker.ends()) == (0, 0)
    line = answer(master)
    assert line.startswith("capacity: 2 users, ")
    assert re.search(r"; at (4|6) users, .*: fail ratio .* \(limit 0.01\)", line)


def test_open_loop_in_two_processes(start: Start, serve: Serve) -> None:
    options = "--headless --processes=2 --chat-rate=5 --capacity-step=3"
    run = start(*QUICK_LOCUST, "-f", QUICK_FILES, *arguments(serve(echo), options))
    assert run.ends() == 0
    assert re.fullmatch(
        r"capacity: at least 6 users, [\d.]+ messages a second due, "
        r"[\d.]+ messages a second echoed \(fail ratio .*\); "
        r"no limit was reached up to the upper bound(; .*)?",
        answer(run),
    )


@pytest.mark.together
def test_where_nobody_listens_there_is_no_capacity(start: Start, serve: Serve) -> None:
    server = serve(echo)
    server.stop()
    options = "--headless --chat-wait=0.05 --capacity-step-time=3"  # longer than all pauses
    run = start(*QUICK_LOCUST, "-f", QUICK_FILES, *arguments(server, options))
    assert run.ends() == 1
    assert answer(run).startswith(
        "capacity: none; at 2 users, 0.0 messages a second echoed: "
        "fail ratio 1 (limit 0.01), no echo came"
    )


ENDLESS = "--capacity-step-time=0.5 --capacity-max-users=1000000 --chat-wait=0.1"


@pytest.mark.together
@pytest.mark.parametrize("workers", [1, 2])
def test_where_a_worker_is_killed_the_capacity_is_unknown_also_where_all_are(
    start: Start, serve: Serve, tmp_path: Path, workers: int
) -> None:
    files = f"{QUICK_FILES},tests/locustfiles/quick_heartbeat.py"
    bus = bus_options()
    options = arguments(serve(echo), f"--headless --master --expect-workers={workers} {ENDLESS}")
    master = start(*QUICK_LOCUST, "-f", files, *options, *bus)
    started = [start(*QUICK_LOCUST, "-f", "-", "--worker", *bus) for _ in range(workers)]
    master.prints("messages a second echoed")  # one step has been measured
    started[0].process.send_signal(signal.SIGKILL)
    assert master.ends() == 1
    unknown = f"capacity: unknown: 1 of {workers} workers lost; before it held "
    assert answer(master).startswith(unknown)


@pytest.mark.together
def test_a_run_that_is_ended_before_a_limit_was_found_has_no_answer(
    start: Start, serve: Serve
) -> None:
    options = arguments(serve(echo), f"--headless {ENDLESS}")
    run = start(*QUICK_LOCUST, "-f", QUICK_FILES, *options)
    run.prints("messages a second echoed")
    assert run.interrupt() == 1
    unknown = "capacity: unknown: the run ended before a limit was found; before it held "
    assert answer(run).startswith(unknown)


@pytest.mark.together
@pytest.mark.parametrize(
    ("load", "code", "said"),
    [
        ("--chat-wait=0.02", 0, r"capacity: at least 2 users, .*; the generator stood still for.*"),
        (
            "--chat-rate=20",
            1,
            r"capacity: unknown: .*: the generator started \d+ of \d+ messages.*",
        ),
    ],
)
def test_a_generator_that_stood_still_is_named_and_in_open_loop_is_exhausted(
    start: Start, serve: Serve, load: str, code: int, said: str
) -> None:
    chat = Answers(with_the_line)
    limits = "--capacity-step-time=3 --capacity-max-users=2 --capacity-max-p95=60000"
    options = arguments(serve(chat), f"--headless {limits} {load}")
    run = start(*QUICK_LOCUST, "-f", QUICK_FILES, *options)
    run.prints("All users spawned")
    begun = len(chat.received)
    wait_until(lambda: len(chat.received) > begun + 40)  # so the settling is over
    os.kill(run.process.pid, signal.SIGSTOP)
    gevent.sleep(1.5)
    os.kill(run.process.pid, signal.SIGCONT)
    assert run.ends() == code
    assert re.fullmatch(said, answer(run))


@pytest.mark.together
def test_a_worker_that_cannot_have_the_limits_says_what_it_needs(
    start: Start, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    shutil.copy(ROOT / "plugins/find_capacity.py", tmp_path)
    run = start(*QUICK_LOCUST, "-f", "locustfile.py,find_capacity.py", "--worker", cwd=tmp_path)
    assert run.ends() == 1
    said = "locust: error: find_capacity.py needs verdict.py: put both into one directory\n"
    assert run.output == said


@pytest.mark.together
def test_run_after_run_from_the_web_ui_with_the_options_of_its_form(
    start: Start, serve: Serve
) -> None:
    server = serve(damaged_above(3, afterwards=3))
    web_ui = WebUI()
    options = arguments(server, "--chat-wait=0.05")
    run = start(*QUICK_LOCUST, "-f", QUICK_FILES, *options, *web_ui.options)

    def search(expected: str, **form: str) -> None:
        """Start a run, and wait until it has said what is expected and has stopped."""
        web_ui.swarm(**form)
        run.prints(f"\n{expected}")
        wait_until(lambda: web_ui.statistics()["state"] == "stopped")

    search("capacity: 2 users,", capacity_step="2")
    search("capacity: at least 3 ", capacity_step="3", capacity_max_users="3")
    search("capacity: unknown: 'x' is not a valid count: use a whole", capacity_step="x")
    assert run.stop() == 1
    assert run.output.splitlines()[-1].startswith("capacity: unknown: 'x' is not")
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("max-users", "0", "count: use a whole number above 0"),
        ("max-p95", "fast", "percentile: use ms above 0, such as 200"),
        ("max-fail-ratio", "2", "fail ratio: use 0 to 1, such as 0.01"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_write_instead(
    capsys: pytest.CaptureFixture[str], option: str, value: str, instead: str
) -> None:
    with pytest.raises(SystemExit):
        get_parser(default_config_files=[]).parse_args([f"--capacity-{option}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f": error: argument --capacity-{option}: {value!r} is not a valid {instead}"
    )
