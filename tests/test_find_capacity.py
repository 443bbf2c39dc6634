"""``examples/find_capacity.py`` with the real ``locust`` command, against servers whose capacity is known."""

from __future__ import annotations

import functools
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import LOCUST, Handler, Program, Server, echo, free_port, lines, wait_until

QUICK = """
import find_capacity
from locust import runners
find_capacity.SETTLING, runners.WORKER_REPORT_INTERVAL = 0.2, 0.2
"""
LIMITS = "--capacity-step=2 --capacity-step-time=0.5 --capacity-max-p95=150 --capacity-max-users=9"


def holding(users: int, above: Callable[[list[int]], float], damaged_for: int | None = None) -> Handler:
    """Return a server that answers after 5 ms up to so many connections; with more, after what above returns. Once that
    has happened, damaged_for is how many it still holds."""
    present = [0, users]

    def server(connection: socket.socket) -> None:
        present[0] += 1
        try:
            for line in lines(connection):
                gevent.sleep(0.005 if present[0] <= present[1] else above(present))
                if present[0] > present[1] and damaged_for is not None:
                    present[1] = damaged_for
                connection.sendall(line + b"\n")
        finally:
            present[0] -= 1

    return server


def dropping_above(users: int) -> Handler:
    """Return a server that hangs up on those who come when there are so many."""
    present = [0]

    def server(connection: socket.socket) -> None:
        present[0] += 1
        try:
            for line in lines(connection) if present[0] <= users else ():
                gevent.sleep(0.005)
                connection.sendall(line + b"\n")
        finally:
            present[0] -= 1

    return server


def one_at_a_time() -> Handler:
    """Return a server that answers 28.6 messages a second at most, one after the other."""
    free_at = [0.0]

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            free_at[0] = max(free_at[0], time.monotonic()) + 0.035
            gevent.sleep(free_at[0] - time.monotonic())
            connection.sendall(line + b"\n")

    return server


def silent(connection: socket.socket) -> None:
    for _ in lines(connection):
        pass


def slow(_present: list[int]) -> float:
    return 0.3


SCENARIOS: dict[str, tuple[Handler | None, str]] = {
    "throughput": (one_at_a_time(), "--chat-wait=0 --processes=2 --capacity-step=3"),
    "damaged": (holding(5, slow, damaged_for=3), "--chat-wait=0.05"),
    "slow": (holding(5, slow), "--chat-wait=0.05 --capacity-max-fail-ratio=0"),
    "dropping": (
        dropping_above(5),
        "--chat-wait=0 --capacity-max-fail-ratio=0.05 --capacity-step=5 --capacity-step-time=1",
    ),
    "unbroken": (echo, "--chat-wait=0.05"),
    "silent": (silent, "--chat-timeout=0.2 --chat-wait=0"),
    "nobody": (None, "--capacity-step-time=2.5"),
    "exhausted": (holding(5, slow), "--chat-wait=0"),
}


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    """Return the runs of all scenarios, which go on side by side: they spend their time waiting."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "quick.py").write_text(QUICK)
    (folder / "easily_exhausted.py").write_text(QUICK + "runners.CPU_WARNING_THRESHOLD = 0.1\n")
    servers, programs = [], {}
    for name, (handler, arguments) in SCENARIOS.items():
        port = free_port()
        if handler is not None:
            servers.append(Server(handler))
            port = servers[-1].port
        quick = folder / ("easily_exhausted.py" if name == "exhausted" else "quick.py")
        programs[name] = start_locust(quick, port, f"--headless {arguments}")
    yield programs
    for program in programs.values():
        program.kill()
    for server in servers:
        server.stop()


def start_locust(quick: Path | None, port: int, arguments: str) -> Program:
    bus = str(free_port())
    return Program(
        *LOCUST,
        *["-f", f"locustfile.py,examples/find_capacity.py{f',{quick}' if quick else ''}", f"--host=127.0.0.1:{port}"],
        *[*LIMITS.split(), *arguments.split()],
        LOCUST_MASTER_BIND_PORT=bus,
        LOCUST_MASTER_NODE_PORT=bus,
    )


def run_thrice(quick: Path) -> str:
    """Start three runs of one Locust from its web UI; return what it has printed."""
    server, port = Server(holding(3, slow)), free_port()
    run = start_locust(quick, server.port, f"--web-host=127.0.0.1 --web-port={port} --chat-wait=0.05")
    try:
        run.prints("Starting web interface")
        forms = {
            "capacity_step=2": "2 users,",
            "capacity_step=3&capacity_max_users=3": "at l",
            "capacity_step=x": "unkn",
        }
        for form, expected in forms.items():
            wait_until(functools.partial(asked, port, "swarm", form.encode()))
            run.prints(f"\ncapacity: {expected}")
            wait_until(lambda: b'"state":"stopped"' in asked(port, "stats/requests").replace(b" ", b""))
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 1
        return run.output
    finally:
        run.kill()
        server.stop()


def asked(port: int, path: str, data: bytes | None = None) -> bytes:
    """Return what the web UI answers; nothing while it is not there yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", data, 5) as response:
            return bytes(response.read())
    except OSError:
        return b""


@pytest.fixture(scope="module", autouse=True)
def web(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what will be the output of the runs from the web UI, which go on beside the others."""
    quick = tmp_path_factory.mktemp("web") / "quick.py"
    quick.write_text(QUICK)
    return gevent.spawn(run_thrice, quick)


def answer(run: Program) -> tuple[int, str]:
    """Return the exit code and the last line of a run; it must be the only one that says a capacity."""
    code = run.ends()
    assert "Traceback" not in run.output
    assert len(re.findall("^capacity: ", run.output, re.MULTILINE)) == 1
    return code, run.output.splitlines()[-1]


def test_a_server_that_gets_slow_above_its_capacity(runs: dict[str, Program]) -> None:
    code, line = answer(runs["slow"])
    assert code == 0
    assert re.fullmatch(
        r"capacity: 4 users, [\d.]+ messages a second "
        r"\(95th percentile [\d.]+ ms, limit 150 ms; failed 0 %, limit 0 %\); "
        r"at 6 users 95th percentile 3\d\d ms, limit 150 ms",
        line,
    )


def test_what_held_on_the_way_up_and_no_longer_holds_is_not_the_answer(runs: dict[str, Program]) -> None:
    code, line = answer(runs["damaged"])
    assert (code, line[:18], "; at 6 users 95th" in line) == (0, "capacity: 2 users,", True)


def test_a_server_that_hangs_up_on_a_few_among_thousands_of_messages(runs: dict[str, Program]) -> None:
    code, line = answer(runs["dropping"])
    assert (code, line[:18]) == (0, "capacity: 5 users,")
    assert re.search(r"; at 9 users \d+ times a connection was lost or refused, limit 0.05 a user$", line)
    assert "Error report" in runs["dropping"].output


def test_the_messages_a_second_of_a_server_with_a_limited_throughput_from_two_processes(
    runs: dict[str, Program],
) -> None:
    code, line = answer(runs["throughput"])
    match = re.match(r"capacity: 3 users, ([\d.]+) messages a second \(95th percentile 1\d\d ms", line)
    assert code == 0 and match is not None, line
    assert 25 < float(match[1]) < 30


def test_a_server_that_never_breaks_within_the_upper_bound(runs: dict[str, Program]) -> None:
    code, line = answer(runs["unbroken"])
    assert (code, line[:27]) == (0, "capacity: at least 9 users,")
    assert line.endswith("; no limit was reached up to the upper bound")


@pytest.mark.parametrize("name", ["silent", "nobody"])
def test_where_nothing_is_echoed_there_is_no_capacity(runs: dict[str, Program], name: str) -> None:
    assert answer(runs[name]) == (1, "capacity: none: at 2 users no message was echoed (failed 100 %, limit 1 %)")


def test_a_generator_without_processor_time_left_does_not_know_the_capacity(runs: dict[str, Program]) -> None:
    code, line = answer(runs["exhausted"])
    assert code == 1
    assert re.match(r"capacity: unknown: at \d users the generator ran out of processor \(\d+ % of a core\)", line)


def test_run_after_run_from_the_web_ui_with_the_options_of_its_form(runs: dict[str, Program], web: Any) -> None:
    output = web.get(timeout=30)
    answers = re.findall("^capacity: ((?:at least )?(?:\\d users,|unknown:))", output, re.MULTILINE)
    assert answers == ["2 users,", "at least 3 users,", "unknown:"]
    assert "unknown: 'x' will not do: write a whole number above 0" in output
    assert "Traceback" not in output


def test_wrong_values_are_one_line_that_says_what_to_write_instead() -> None:
    wrong = {
        "max-users=0": "write a whole number above 0",
        "max-p95=fast": "write ms above 0",
        "max-fail-ratio=2": "write 0 to 1",
    }
    runs = {text: start_locust(None, 1, f"--headless --capacity-{text}") for text in wrong}
    for text, instead in wrong.items():
        assert runs[text].ends() != 0
        option, _, value = text.partition("=")
        assert f"argument --capacity-{option}: {value!r} will not do: {instead}" in runs[text].output
        assert len(runs[text].output.splitlines()) == 1
