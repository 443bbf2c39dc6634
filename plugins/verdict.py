r"""Let the exit code say whether the server has passed: 0 if it has, 1 if not.

    locust -f locustfile.py,plugins/verdict.py --headless --users=100 --spawn-rate=10 \
        --run-time=5m --host=127.0.0.1:12345 --chat-max-fail-ratio=0.01 --chat-max-p95=200

One line at the end names figures and limits. List this file after that of the users, whichever it
is: ``-f plugins/delivery.py,plugins/verdict.py``. In a distributed run the master judges. An
exception in a task fails the run as Locust always has it. Without a limit there is no verdict.

--chat-max-fail-ratio (CHAT_MAX_FAIL_RATIO)  largest share of failures that passes, from 0 to 1
--chat-max-p95 (CHAT_MAX_P95)                largest 95th percentile that passes, in ms

- Failures of every row count, also of ``disconnect``, ``login`` and rows of your own. They are
  compared with what users tried: with themselves and the successes of every row but ``connect``
  and ``send_chat``. These two only serve a message: that the kernel has taken it does not show
  that the server has. So a message and its echo are one try, and one that awaits no echo is none
  until it fails.
- The rows ``delivery`` and ``received`` tell of what others sent, many times as often in a large
  room. They are compared with themselves. The fail ratio is the larger of the two shares.
- No run passes in which no echo came, whichever limit was given: with ``--chat-echo=none`` take
  Locust's own exit code instead.
- The percentile is that of ``echo_response``, as Locust reports it. A row that
  ``send_chat(name=…)`` names is a try like any other, but no echo, as it may be that of a login:
  leave the messages unnamed whose times are to be judged.
"""

from __future__ import annotations

from locust import env, events, runners, stats  # isort: skip

import re
import sys
import weakref
from collections.abc import Collection
from typing import NamedTuple

import gevent
from locust.argument_parser import LocustArgumentParser

import locustfile

SERVING_ROWS = ("connect", "send_chat")  # their successes are no tries
ARRIVAL_ROWS = ("delivery", "received")  # they tell of what others sent
LAST_REPORT = 0.5  # seconds, at most, that the last report of a worker is on its way
SHARE = re.compile(r"[01]|0?\.\d{1,9}", re.ASCII)
# The runs whose verdict is said: at a signal Locust may come to its end twice.
JUDGED: weakref.WeakSet[env.Environment] = weakref.WeakSet()


def parse_share(value: object) -> float:
    """Return a share from 0 to 1."""
    if not SHARE.fullmatch(str(value)):
        raise locustfile.SettingError(value, "0 to 1, such as 0.01")
    return float(str(value))


def parse_milliseconds(value: object) -> float:
    """Return milliseconds above 0."""
    return locustfile.parse_positive(value, "ms above 0, such as 200")


FAIL_RATIO = locustfile.Option(
    "chat-max-fail-ratio", parse_share, "Verdict: largest share of failures, 0 to 1, such as 0.01"
)
P95 = locustfile.Option(
    "chat-max-p95", parse_milliseconds, "Verdict: largest 95th percentile of echoes, in ms"
)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add the limits to Locust's options."""
    for option in (FAIL_RATIO, P95):
        option.add_to(parser)


class Limits(NamedTuple):
    """The largest figures with which a server passes; None where no limit was given."""

    fail_ratio: float | None
    p95: float | None  # ms


class Figures(NamedTuple):
    """What the rows of a run say."""

    fail_ratio: float
    p95: float  # ms
    echoes: int  # how many came


@events.quitting.add_listener
def judge(environment: env.Environment, **_: object) -> None:
    """Set the exit code where a limit was given, and say in one line why."""
    runner = environment.runner
    if runner is None or isinstance(runner, runners.WorkerRunner) or not is_wanted(environment):
        return
    end_and_hear_of_it(runner)
    if environment in JUDGED:
        return
    JUDGED.add(environment)
    try:
        limits = limits_of(environment)
    except locustfile.SettingError as error:  # typed into the web UI
        environment.process_exit_code = 1
        say("failed", str(error))
        return
    figures = figures_of(runner.stats)
    passed = has_passed(figures, limits)
    # Another plugin may have failed the run for a reason of its own.
    environment.process_exit_code = environment.process_exit_code or exit_code(
        runner, passed=passed
    )
    say("passed" if passed else "failed", comparison(figures, limits))


def is_wanted(environment: env.Environment) -> bool:
    """Return whether a limit was given."""
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    return bool(options.get(FAIL_RATIO.key) or options.get(P95.key))


def limits_of(environment: env.Environment) -> Limits:
    """Return the limits that were given.

    :raises SettingError: for a wrong one
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    fail_ratio = options.get(FAIL_RATIO.key)
    p95 = options.get(P95.key)
    return Limits(
        fail_ratio=parse_share(fail_ratio) if fail_ratio else None,
        p95=parse_milliseconds(p95) if p95 else None,
    )


def end_and_hear_of_it(runner: runners.Runner) -> None:
    """Stop the users, which are still there after Ctrl-C, and wait for the last rows."""
    runner.stop()
    seconds = 0.0  # some rows are reported by greenlets of their own, which now get their turn
    if isinstance(runner, runners.MasterRunner):
        seconds = runners.WORKER_REPORT_INTERVAL + LAST_REPORT
    gevent.sleep(seconds)


def figures_of(statistics: stats.RequestStats) -> Figures:
    """Return what the rows of a run say."""
    tries = []
    arrivals = []
    for row in statistics.entries.values():
        if row.name in ARRIVAL_ROWS:
            arrivals.append(row)
        else:
            tries.append(row)
    echo_row = statistics.entries.get(("echo_response", "TCP"))
    return Figures(
        fail_ratio=max(share_of_failures(tries), share_of_failures(arrivals)),
        p95=echo_row.get_response_time_percentile(0.95) if echo_row else 0.0,
        echoes=echo_row.num_requests - echo_row.num_failures if echo_row else 0,
    )


def share_of_failures(rows: Collection[stats.StatsEntry]) -> float:
    """Return the share of the failures among what was tried; 0 where nothing was."""
    failures = 0
    successes = 0
    for row in rows:
        failures += row.num_failures
        if row.name not in SERVING_ROWS:
            successes += row.num_requests - row.num_failures
    if failures == 0:
        return 0.0
    return failures / (failures + successes)


def has_passed(figures: Figures, limits: Limits) -> bool:
    """Return whether there were echoes, and each limit was kept."""
    if figures.echoes == 0:
        return False
    if limits.fail_ratio is not None and figures.fail_ratio > limits.fail_ratio:
        return False
    return limits.p95 is None or figures.p95 <= limits.p95


def exit_code(runner: runners.Runner, *, passed: bool) -> int:
    """Return 0 for a server that has passed, unless a task has raised an exception: see above."""
    if not passed:
        return 1
    if runner.exceptions:
        options = runner.environment.parsed_options
        return int(options.exit_code_on_error) if options else 1
    return 0


def comparison(figures: Figures, limits: Limits) -> str:
    """Return the figures beside their limits, as text."""
    parts = []
    if limits.fail_ratio is not None:
        parts.append(f"fail ratio {figures.fail_ratio:.4g} (limit {limits.fail_ratio:.9g})")
    if limits.p95 is not None:
        parts.append(f"95th percentile {figures.p95:.4g} ms (limit {limits.p95:.9g})")
    if figures.echoes == 0:
        parts.append("no echo came")
    return ", ".join(parts)


def say(result: str, reason: str) -> None:
    """Print the verdict."""
    print(f"locust: verdict {result}: {reason}", file=sys.stderr)
