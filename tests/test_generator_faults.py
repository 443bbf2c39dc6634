"""What the generator did wrong is said once a run, with figures, in the log and in the result."""

from __future__ import annotations

import logging
import os
import re
import signal

import gevent
import gevent.monkey
import pytest
from clients import Connect
from locust import constant, task
from plain_servers import ServerProcess, echo
from programs import QUICK_LOCUST, Program, Start, bus_options, wait_until
from rows import Run, RunUsers
from servers import Answers, Serve, in_turn, with_the_line

import locustfile
from locustfile import LineFraming, TCPChatUser, generator_faults, run_totals

busy = gevent.monkey.get_original("time", "sleep")  # holds up the event loop


class Patient(TCPChatUser):
    """Says nothing of its own accord."""

    wait_time = constant(0)

    @task
    def wait(self) -> None:
        gevent.sleep(600)


def clients_of(run: Run, users: int = 1) -> list[locustfile.TCPSocketClient]:
    """Return the clients of a run's users, once so many have connected."""
    wait_until(lambda: run.count("connect") == users)
    return [greenlet.args[0].client for greenlet in run.runner.user_greenlets]


def results(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the result lines that were logged."""
    logged = (record.getMessage() for record in caplog.records)
    return [text for text in logged if text.startswith("chat: ")]


def warnings(caplog: pytest.LogCaptureFixture, about: str) -> list[str]:
    """Return the warnings that say something, less the results."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING
        and about in record.getMessage()
        and record.getMessage() not in results(caplog)
    ]


def fault_of(run: Run, about: str) -> str:
    """Return the fault of a run that says something; it is there once."""
    (fault,) = (text for text in generator_faults(run.environment) if about in text)
    return fault


# -------------------------------------------------------------------------------------- stood still


def seconds_in(text: str) -> float:
    """Return how long the generator stood still, as a text has it."""
    match = re.match(r"the generator stood still for (\d+\.\d) s", text)
    assert match is not None
    return float(match[1])


def test_that_the_generator_stood_still_is_said_once_a_run_with_figures(
    serve: Serve, run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning has the first time, the result the longest."""
    caplog.set_level(logging.INFO)
    server = serve(Answers(with_the_line))
    for runs in (1, 2):
        run = run_users(Patient, server.address, is_recorded=True)
        clients_of(run)
        for pauses, seconds in enumerate((0.7, 1.2), 1):
            busy(seconds)
            wait_until(lambda: run_totals(run.environment).stalls >= pauses)  # noqa: B023
            gevent.sleep(0.2)  # the generator looks at itself
            assert len(warnings(caplog, "stood still")) == runs
        assert seconds_in(warnings(caplog, "stood still")[-1]) >= 0.5
        fault = fault_of(run, "stood still")
        assert seconds_in(fault) >= 1
        run.runner.stop()
        assert len(results(caplog)) == runs
        assert results(caplog)[-1].count(f"; {fault}") == 1


# --------------------------------------------------------------------------------------- reads late


def hold_up_reads(clients: list[locustfile.TCPSocketClient], seconds: float) -> None:
    """Let each client send, and the event loop stand still when the echoes come."""
    for client in clients:
        client.send_chat("hello", wait=False)
    gevent.sleep(0)
    gevent.sleep(0)
    busy(seconds)


def test_that_reads_come_late_is_said_once_a_run_with_figures(
    run_users: RunUsers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ServerProcess(echo) as server:
        run = run_users(Patient, server.address, users=20, is_recorded=True)
        clients = clients_of(run, 20)
        for rounds in range(1, 101):
            hold_up_reads(clients, 0.06)
            wait_until(lambda: run.count("echo_response") == 20 * rounds)  # noqa: B023
            if warnings(caplog, "of the reads"):
                break
        totals = run_totals(run.environment)
        assert totals.late_reads > totals.reads * 0.01
        (warning,) = warnings(caplog, "of the reads")
        share = re.match(
            r"(\d+\.\d)% of the reads came over 20 ms after the bytes "
            r"\(the round trips are corrected for it\); ",
            warning,
        )
        assert share is not None
        assert 1 < float(share[1]) <= 100
        hold_up_reads(clients, 0.3)  # worse still
        gevent.sleep(0.3)
        assert len(warnings(caplog, "of the reads")) == 1
        assert not run.errors
        fault = fault_of(run, "of the reads")
        run.runner.stop()
        assert results(caplog)[-1].count(f"; {fault}") == 1


def test_a_few_late_reads_are_no_fault(run_users: RunUsers) -> None:
    """Under a hundred reads, a share says nothing."""
    with ServerProcess(echo) as server:
        run = run_users(Patient, server.address, users=5, is_recorded=True)
        hold_up_reads(clients_of(run, 5), 0.1)
        wait_until(lambda: run.count("echo_response") == 5)
        wait_until(lambda: run_totals(run.environment).late_reads)
        gevent.sleep(0.2)  # the generator looks at itself
        assert not any("of the reads" in text for text in generator_faults(run.environment))


# --------------------------------------------------------------------------------------- slow hooks


class SlowFraming(LineFraming):
    """Lines, cut slowly."""

    def feed(self, data: bytes) -> list[bytes]:
        busy(0.03)
        return list(super().feed(data))


def slowly(payload: bytes) -> bool:
    """Say no to a payload, slowly."""
    busy(0.03)
    return False


@pytest.mark.parametrize(
    ("hook", "client_settings", "message_settings"),
    [
        ("is_refusal", {"is_refusal": slowly}, {}),
        ("feed", {"framing": SlowFraming}, {}),
        ("echo function", {}, {"echo": lambda line: slowly(line) or line != b"news"}),
    ],
)
def test_a_slow_hook_on_the_event_loop_is_named_once_a_run(
    serve: Serve,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    begun_run: None,
    hook: str,
    client_settings: dict[str, object],
    message_settings: dict[str, object],
) -> None:
    client = connect(serve(Answers(lambda line: b"news\n" + line + b"\n")).port, **client_settings)
    for _ in range(3):
        assert client.send_chat("hello", **message_settings) is not None  # type: ignore[arg-type]
    (warning,) = warnings(caplog, f"{hook} took")
    took = re.match(rf"{hook} took (\d+) ms on the event loop", warning)
    assert took is not None
    assert int(took[1]) >= 30


def test_quick_hooks_are_not_named(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, begun_run: None
) -> None:
    client = connect(
        serve(Answers(in_turn(b"one\n", b"two\n"))).port, is_refusal=lambda payload: False
    )
    for _ in range(10):
        assert client.send_chat("/who", echo=lambda line: True) is not None
    assert not warnings(caplog, "is_refusal took")


# ----------------------------------------------------------------------------- master and workers

BUSY_WORKER = "locustfile.py,tests/locustfiles/busy_worker.py,tests/locustfiles/quick_heartbeat.py"


def said(running: Program, what: str) -> list[str]:
    """Return the lines of a program that say something, less its result."""
    lines = [line for line in running.output.splitlines() if re.search(what, line)]
    return [line for line in lines if not line.startswith("chat: ")]


def test_the_masters_result_has_the_faults_of_its_workers_and_those_that_were_lost(
    start: Start,
) -> None:
    """Of four workers, one is busy, one is stopped until it counts as lost and then goes on, one is
    killed, and one leaves in good order.
    """
    bus = ("--master-host=127.0.0.1", "--master-bind-host=127.0.0.1", *bus_options())
    with ServerProcess(echo) as server:
        master = start(
            *QUICK_LOCUST,
            *("-f", BUSY_WORKER, "--master", "--expect-workers=4", "--headless", "--users=16"),
            *("--spawn-rate=16", "--chat-rate=10", f"--host={server.address}", *bus),
        )
        command = (*QUICK_LOCUST, "-f", BUSY_WORKER, "--worker", *bus)
        busy_one = start(*command, BUSY="1")
        stopped, killed, leaving = (start(*command) for _ in range(3))
        busy_one.prints("this machine cannot keep the schedule")
        os.kill(stopped.process.pid, signal.SIGSTOP)
        os.kill(killed.process.pid, signal.SIGKILL)
        leaving.interrupt()
        master.prints("2 of 4 workers lost")
        os.kill(stopped.process.pid, signal.SIGCONT)
        stopped.prints("stood still")
        busy_one.prints("of the reads came over 20 ms")
        gevent.sleep(1)  # which these two report meanwhile
        assert master.interrupt() == 0
        stopped.ends()
        busy_one.ends()
    line = master.output.splitlines()[-1]
    assert line.startswith("chat: ")
    assert "; 2 of 4 workers lost; " in line
    still = re.search(r"the generator stood still for (\d+\.\d) s, in [1-4] of 4 workers", line)
    assert still is not None
    assert float(still[1]) > 2
    assert re.search(r"% of the reads came over 20 ms .*, in [1-4] of 4 workers", line)
    assert re.search(r"only \d+\.\d% of the messages due .*, in [1-4] of 4 workers", line)
    for running, fault in (
        (master, "workers? lost"),
        (stopped, "stood still"),
        (busy_one, "of the reads came over 20 ms"),
        (busy_one, "cannot keep the schedule"),
    ):
        assert len(said(running, fault)) == 1
