"""``plugins/find_capacity.py``: the search, the steps, and whole runs against capped servers."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from locust.argument_parser import get_parser
from locust.env import Environment
from programs import FREQUENT_REPORTS, LOCUST, ROOT, Program, WebUI, bus_options, wait_until
from rows import fire
from servers import Handler, Server, echo, lines

import locustfile

sys.path.insert(0, str(ROOT / "plugins"))

import delivery
import find_capacity
from find_capacity import Clock, Limits, Look, Search, Step

Serve = Callable[..., Server]
Start = Callable[..., Program]
FILES = "locustfile.py,plugins/find_capacity.py"

# ------------------------------------------------------------------------------- what a step says


class Rows:
    """A run whose rows the test fires itself, and whose clocks it sets."""

    def __init__(self) -> None:
        self.environment = Environment()
        self.runner = self.environment.create_local_runner()
        self._before = self.look_at(0.0)

    def look_at(self, seconds: float, processor: float = 0.0) -> Look:
        """Return a look as if two processes had gone on for so many seconds."""
        look = Look(self.runner)
        look.clocks = {name: Clock(seconds, processor) for name in ("one", "other")}
        return look

    def fire(
        self, name: str, count: int, error: Exception | None = None, milliseconds: int = 10
    ) -> None:
        """Fire so many rows that succeeded, or failed with an error."""
        for _ in range(count):
            fire(self.environment, name, milliseconds, error)

    def step(
        self, users: int = 10, running: int = 10, rate: float | None = None, used: float = 0.0
    ) -> Step:
        """Return the step of two seconds in which these rows came, and begin the next one."""
        limits = Limits(step=10, step_time=2, p95=100, fail_ratio=0.01, users=50, rate=rate)
        after = self.look_at(2.0, used)
        step = Step(users, running, limits, self._before, after)
        self._before = self.look_at(0.0)
        return step


@pytest.fixture
def rows() -> Iterator[Rows]:
    """Return a run without any row."""
    rows = Rows()
    yield rows
    rows.runner.quit()


def test_a_step_counts_only_what_came_in_it_from_all_processes(rows: Rows) -> None:
    rows.fire("echo_response", 10, locustfile.EchoTimeout(), milliseconds=5000)
    rows.step()
    rows.fire("echo_response", 100)
    step = rows.step()
    assert step.fault == ""
    assert step.figures == (
        "10 users, 50.0 messages a second "
        "(95th percentile 10 ms, limit 100 ms; failed 0 %, limit 1 %)"
    )


def test_in_open_loop_a_step_says_what_was_due_and_what_was_reached(rows: Rows) -> None:
    rows.fire("echo_response", 90)
    rows.fire("echo_response", 10, milliseconds=200)
    step = rows.step(rate=5.5)
    assert step.figures == (
        "10 users × 5.5 = 55 messages a second due, 50.0 reached "
        "(95th percentile 200 ms, limit 100 ms; failed 0 %, limit 1 %)"
    )
    assert step.broken == (
        "at 10 users × 5.5 = 55 messages a second due, 50.0 reached: "
        "95th percentile 200 ms, limit 100 ms"
    )


def test_slow_echoes_break_a_step(rows: Rows) -> None:
    rows.fire("echo_response", 90)
    rows.fire("echo_response", 10, milliseconds=200)
    assert rows.step().broken == "at 10 users 95th percentile 200 ms, limit 100 ms"


@pytest.mark.parametrize(
    "name", ["connect", "send_chat", "echo_response", "login", "disconnect", "bought"]
)
def test_failures_of_every_row_break_a_step(rows: Rows, name: str) -> None:
    rows.fire("connect", 1000)
    rows.fire("send_chat", 1000)
    rows.fire("echo_response", 95)
    rows.fire(name, 5, locustfile.ConnectionClosed())
    assert rows.step().fault == "failed 5 %, limit 1 %"


def test_lost_deliveries_break_a_step_and_good_ones_hide_no_failure(rows: Rows) -> None:
    rows.fire("echo_response", 1000)
    rows.fire("delivery", 98)
    rows.fire("delivery", 2, delivery.DeliveryLost())
    assert rows.step().fault == "failed 2 %, limit 1 %"
    rows.fire("echo_response", 97)
    rows.fire("echo_response", 3, locustfile.EchoAltered())
    rows.fire("delivery", 9900)
    assert rows.step().fault == "failed 3 %, limit 1 %"


def test_a_few_lost_connections_among_thousands_of_messages_break_a_step(rows: Rows) -> None:
    rows.fire("echo_response", 1000)
    rows.fire("echo_response", 1, locustfile.EchoTimeout())
    rows.fire("delivery", 999)
    rows.fire("delivery", 1, delivery.DeliveryLost())
    assert rows.step().fault == ""  # a late echo is no lost connection, nor is a lost delivery
    rows.fire("echo_response", 1000)
    rows.fire("disconnect", 1, locustfile.ConnectionClosed())
    rows.fire("connect", 1, ConnectionRefusedError(111, "Connection refused"))
    assert rows.step().fault == "2 times a connection was lost or refused, limit 0.01 a user"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (None, "no message was echoed"),
        (locustfile.EchoTimeout(), "no message was echoed (failed 100 %, limit 1 %)"),
    ],
)
def test_a_step_without_an_echo_does_not_hold(
    rows: Rows, error: Exception | None, fault: str
) -> None:
    rows.fire("send_chat", 5)
    if error is not None:
        rows.fire("echo_response", 5, error)
    assert rows.step().fault == fault


def test_users_that_did_not_start_break_a_step(rows: Rows) -> None:
    rows.fire("echo_response", 100)
    assert rows.step(running=9).fault == "only 9 were running"


def test_a_generator_without_processor_time_is_the_first_fault(rows: Rows) -> None:
    rows.fire("echo_response", 100, milliseconds=9000)
    step = rows.step(used=1.9)
    assert step.is_exhausted
    assert step.fault == "the generator ran out of processor (95 % of a core)"


@pytest.mark.parametrize(
    ("rates", "expected"), [((5.0,), 5.0), ((None,), None), ((5.0, 5.0), 5.0), ((5.0, 2.0), None)]
)
def test_the_rate_of_the_user_classes_is_that_of_a_step(
    rates: tuple[float | None, ...], expected: float | None
) -> None:
    classes = []
    for number, rate in enumerate(rates):
        attributes = {"rate": rate}
        classes.append(type(f"User{number}", (locustfile.ChatClient,), attributes))
    environment = Environment(user_classes=classes, host="127.0.0.1:1")
    assert find_capacity.limits_of(environment).rate == expected


# ------------------------------------------------------------------------------------- the search


class ScriptedSteps(find_capacity.Measurement):
    """Gives the steps that a test has scripted, in their order."""

    def __init__(self, rows: Rows, *script: str) -> None:
        self._rows = rows
        self._script = iter(script)

    def of(self, users: int) -> Step:
        """Return a step that held, broke, or found the generator exhausted, as the script says."""
        outcome = next(self._script)
        error = locustfile.EchoAltered() if outcome == "breaks" else None
        self._rows.fire("echo_response", 100, error)
        return self._rows.step(users, users, used=2.0 if outcome == "exhausts" else 0.0)


@pytest.mark.parametrize(
    ("script", "steps", "answer", "is_known"),
    [
        ("holds holds", [10, 15], r"at least 15 users, .*; no limit was reached up to.*", True),
        ("holds breaks holds", [10, 15, 10], r"10 users, .*; at 15 users no message.*", True),
        ("holds breaks breaks", [10, 15, 10], r"none: at 15 users .*, then no step held", False),
        ("breaks", [10], r"none: at 10 users no message was echoed \(failed .*\)", False),
        ("exhausts", [10], r"unknown: at 10 users the gen.*: use --processes, or more m.*s", False),
        ("holds exhausts", [10, 15], r"unknown: at 15 .*; before it held 10 users, .*", False),
        ("holds breaks exhausts", [10, 15, 10], r"unknown: at 10 users the generator .*", False),
    ],
)
def test_the_search(rows: Rows, script: str, steps: list[int], answer: str, is_known: bool) -> None:
    limits = Limits(step=10, step_time=2, p95=100, fail_ratio=0.01, users=15, rate=None)
    search = Search(ScriptedSteps(rows, *script.split()), limits)
    targets = [*search.climb(), *search.go_back()]
    assert targets == [(users, 10) for users in steps]
    assert re.fullmatch(answer, search.answer)
    assert search.has_answer == is_known


# ------------------------------------------------------------------------------------- whole runs

SHORT_SETTLING = """
import find_capacity

find_capacity.SETTLING = 0.2
"""
# Limits that a machine ten times slower keeps.
LIMITS = "--capacity-step=2 --capacity-step-time=0.5 --capacity-max-p95=1000 --capacity-max-users=6"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file for ``-f`` that makes the fixed pauses shorter."""
    path = tmp_path_factory.mktemp("quick") / "quick.py"
    path.write_text(FREQUENT_REPORTS + SHORT_SETTLING)
    return path


def arguments(server: Server, more: str = "") -> list[str]:
    """Return the arguments of a run with that server; more wins over LIMITS."""
    return [f"--host={server.address}", *bus_options(), *LIMITS.split(), *more.split()]


def documented(more_files: Path) -> list[str]:
    """Return the arguments of the command that the first lines show, with more files."""
    text = find_capacity.__doc__ or ""
    program, option, files, *rest = shlex.split(text.split("\n\n")[1])
    assert (program, option, files) == ("locust", "-f", FILES)
    return [option, f"{files},{more_files}", *rest]


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


def test_the_documented_command_with_a_server_that_gets_slow_above_its_capacity(
    start: Start, serve: Serve, quick: Path
) -> None:
    options = "--chat-wait=0.05 --capacity-step=4 --capacity-step-time=2 --capacity-max-users=8"
    run = start(*LOCUST, *documented(quick), *arguments(serve(slow_above(5)), options))
    assert run.ends() == 0
    assert re.fullmatch(
        r"capacity: 4 users, [\d.]+ messages a second "
        r"\(95th percentile [\d.]+ ms, limit 1000 ms; failed 0 %, limit 1 %\); "
        r"at 8 users 95th percentile [\d.]+ ms, limit 1000 ms",
        answer(run),
    )


def test_a_master_with_a_worker_that_has_its_files_from_it_and_a_server_that_stays_damaged(
    start: Start, serve: Serve, quick: Path
) -> None:
    server = serve(damaged_above(5, afterwards=3))
    bus = bus_options()
    worker = start(*LOCUST, "-f", "-", "--worker", *bus)
    options = "--headless --master --expect-workers=1 --chat-wait=0.05"
    files = ("-f", f"{FILES},{quick}")
    master = start(*LOCUST, *files, *arguments(server, options), *bus)
    assert (master.ends(), worker.ends()) == (0, 0)
    line = answer(master)
    assert line.startswith("capacity: 2 users, ")
    assert re.search("; at 6 users failed .* %, limit 1 %$", line)


def test_open_loop_in_two_processes(start: Start, serve: Serve, quick: Path) -> None:
    options = "--headless --processes=2 --chat-rate=5 --capacity-step=3"
    run = start(*LOCUST, "-f", f"{FILES},{quick}", *arguments(serve(echo), options))
    assert run.ends() == 0
    assert re.fullmatch(
        r"capacity: at least 6 users × 5 = 30 messages a second due, [\d.]+ reached \(95th .*\); "
        r"no limit was reached up to the upper bound",
        answer(run),
    )


def test_where_nobody_listens_there_is_no_capacity(start: Start, serve: Serve, quick: Path) -> None:
    server = serve(echo)
    server.stop()
    options = "--headless --chat-wait=0.05 --capacity-step-time=3"  # longer than all pauses
    run = start(*LOCUST, "-f", f"{FILES},{quick}", *arguments(server, options))
    assert run.ends() == 1
    assert answer(run) == (
        "capacity: none: at 2 users no message was echoed (failed 100 %, limit 1 %)"
    )


def test_run_after_run_from_the_web_ui_with_the_options_of_its_form(
    start: Start, serve: Serve, quick: Path
) -> None:
    server = serve(damaged_above(3, afterwards=3))
    web_ui = WebUI()
    options = arguments(server, "--chat-wait=0.05")
    run = start(*LOCUST, "-f", f"{FILES},{quick}", *options, *web_ui.options)

    def search(expected: str, **form: str) -> None:
        """Start a run, and wait until it has said what is expected and has stopped."""
        web_ui.swarm(**form)
        run.prints(f"\n{expected}")
        wait_until(lambda: web_ui.statistics()["state"] == "stopped")

    search("capacity: 2 users,", capacity_step="2")
    search("capacity: at least 3 ", capacity_step="3", capacity_max_users="3")
    search("capacity: unknown: 'x' will not do: write a whole", capacity_step="x")
    assert run.stop() == 1
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("max-users", "0", "a whole number above 0"),
        ("max-p95", "fast", "ms above 0"),
        ("max-fail-ratio", "2", "0 to 1"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_write_instead(
    capsys: pytest.CaptureFixture[str], option: str, value: str, instead: str
) -> None:
    with pytest.raises(SystemExit):
        get_parser(default_config_files=[]).parse_args([f"--capacity-{option}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f": error: argument --capacity-{option}: {value!r} will not do: write {instead}"
    )
