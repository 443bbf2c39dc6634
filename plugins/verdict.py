r"""Let the exit code say whether the server has passed: 0 if it has, 1 if not or if nobody can say.

    locust -f locustfile.py,plugins/verdict.py --headless --users=100 --spawn-rate=10 \
        --run-time=5m --host=127.0.0.1:12345 --chat-max-fail-ratio=0.01 --chat-max-p95=200

One line after Locust's tables says ``passed``, ``failed`` or ``unknown``, with figures and limits.
List this file after that of the users, whichever it is: ``-f
plugins/delivery.py,plugins/verdict.py``. In a distributed run the master judges. An exception in a
task fails the run as Locust always has it. A headless run without a limit does not start (exit
code 1). With ``find_capacity.py``, which imports this file, there is no verdict.

--chat-max-fail-ratio (CHAT_MAX_FAIL_RATIO)  largest share of failures that passes, from 0 to 1
--chat-max-p95 (CHAT_MAX_P95)                largest 95th percentile that passes, in ms

- Failures of every row count, also of ``disconnect``, ``login`` and rows of your own. They are
  compared with what users tried: with themselves and the successes of every row but ``connect``
  and ``send_chat``. These two only serve a message: that the kernel has taken it does not show
  that the server has. So a message and its echo are one try, and one that awaits no echo is none
  until it fails.
- The rows ``delivery`` and ``received`` tell of what others sent, many times as often in a large
  room. They are compared with themselves. The fail ratio is the larger of the two shares.
- The percentile is that of ``echo_response``, with a failed echo counted as infinitely slow: where
  more than 5 % of the echoes failed, no limit holds. Without failures it is the one in Locust's
  table. A row that ``send_chat(name=…)`` names is a try like any other, but no echo, as it may be
  that of a login: leave the messages unnamed whose times are to be judged.
- No run passes in which no echo came, whichever limit was given: with ``--chat-echo=none`` take
  Locust's own exit code instead.
- The verdict is ``unknown`` where a worker was lost, and in open loop where under 95 % of the
  messages that fell due were started in time: that load was not the one asked for. A worker is
  lost, too, whose last report comes later than half a second after the end, as with
  ``--stop-timeout`` and a slow server. What else the generator did wrong, such as standing still,
  stands in the line.
"""

from __future__ import annotations

from locust import env, events, runners, stats  # isort: skip

import argparse
import math
import re
import sys
import weakref
from collections import Counter
from typing import NamedTuple

import gevent
from locust.argument_parser import LocustArgumentParser

import locustfile

SHARE = re.compile(r"[01]|0?\.\d{1,9}", re.ASCII)

# How many failed echoes took so many ms. Locust's row has these times among those of the good ones.
FAILED_ECHO_TIMES: Counter[int] = Counter()
# The runs whose line is said: at a signal Locust may come to its end twice.
SAID: weakref.WeakSet[env.Environment] = weakref.WeakSet()


# --------------------------------------------------------------------------------------- options


def parse_fail_ratio(value: object) -> float:
    """Return a share from 0 to 1."""
    if not SHARE.fullmatch(str(value)):
        raise locustfile.SettingError(value, "fail ratio", "0 to 1, such as 0.01")
    return float(str(value))


def parse_p95(value: object) -> float:
    """Return milliseconds above 0."""
    return locustfile.parse_positive(value, "percentile", "ms above 0, such as 200")


FAIL_RATIO = locustfile.Option(
    "chat-max-fail-ratio", parse_fail_ratio, "Verdict: largest share of failures, such as 0.01"
)
P95 = locustfile.Option(
    "chat-max-p95", parse_p95, "Verdict: largest 95th percentile of echoes, in ms"
)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add the limits to Locust's options."""
    try:
        for option in (FAIL_RATIO, P95):
            option.add_to(parser)
    except argparse.ArgumentError:  # find_capacity.py has imported this file already
        sys.exit("locust: error: -f has to list verdict.py before find_capacity.py")


@events.init.add_listener
def refuse_to_start_without_limit(environment: env.Environment, **_: object) -> None:
    """End a headless Locust with one line where there is nothing to judge by."""
    options = environment.parsed_options
    if isinstance(environment.runner, runners.WorkerRunner) or options is None:
        return
    if options.headless and not has_limit(environment) and not is_search(environment):
        instead = f"--{FAIL_RATIO.name}=0.01, --{P95.name}=200 or both"
        reason = f"verdict.py has no limit to judge by: use {instead}"
        locustfile.refuse_to_start(environment, reason)


def has_limit(environment: env.Environment) -> bool:
    """Return whether a limit was given."""
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    return bool(options.get(FAIL_RATIO.key) or options.get(P95.key))


def is_search(environment: env.Environment) -> bool:
    """Return whether ``find_capacity.py`` runs the test. It breaks limits on purpose."""
    return type(environment.shape_class).__name__ == "FindCapacity"


class Limits(NamedTuple):
    """The largest figures with which a server passes; None where no limit was given."""

    fail_ratio: float | None
    p95: float | None  # ms


def limits_of(environment: env.Environment) -> Limits:
    """Return the limits that were given.

    :raises SettingError: for a wrong one
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    fail_ratio = options.get(FAIL_RATIO.key)
    p95 = options.get(P95.key)
    return Limits(
        fail_ratio=parse_fail_ratio(fail_ratio) if fail_ratio else None,
        p95=parse_p95(p95) if p95 else None,
    )


# --------------------------------------------------------------------------------------- figures


class Figures(NamedTuple):
    """Counts out of the rows of a run. They only grow: differences tell of the time between."""

    tries: int
    failed_tries: int
    arrivals: int
    failed_arrivals: int
    echo_times: Counter[int]  # how many echoes took so many ms, failed ones included
    failed_echo_times: Counter[int]

    def since(self, earlier: Figures) -> Figures:
        """Return what has come after earlier figures."""
        return Figures(
            tries=self.tries - earlier.tries,
            failed_tries=self.failed_tries - earlier.failed_tries,
            arrivals=self.arrivals - earlier.arrivals,
            failed_arrivals=self.failed_arrivals - earlier.failed_arrivals,
            echo_times=self.echo_times - earlier.echo_times,
            failed_echo_times=self.failed_echo_times - earlier.failed_echo_times,
        )

    @property
    def fail_ratio(self) -> float:
        """The share of failures among what was tried, or among what came if that is larger."""
        return max(share(self.failed_tries, self.tries), share(self.failed_arrivals, self.arrivals))

    @property
    def echoes(self) -> int:
        """How many good echoes came."""
        return (self.echo_times - self.failed_echo_times).total()

    @property
    def p95(self) -> float:
        """The 95th percentile in ms: infinite where over 5 % of the echoes failed, or all."""
        times = self.echo_times - self.failed_echo_times
        attempts = self.echo_times.total()
        failed = attempts - times.total()
        if not times or 20 * failed > attempts:
            return math.inf
        times[max(times)] += failed  # at most 5 %: behind all good ones is slow enough
        return stats.calculate_response_time_percentile(times, attempts, 0.95)


def share(part: int, whole: int) -> float:
    """Return the share of a part; 0 where there is none."""
    return part / whole if part else 0.0


def figures_of(environment: env.Environment) -> Figures:
    """Return the figures of a run up to now."""
    tries = []
    arrivals = []
    for row in environment.stats.entries.values():
        if row.name in locustfile.ARRIVAL_ROWS:
            arrivals.append(row)
        else:
            tries.append(row)
    echo_row = environment.stats.entries.get(locustfile.ECHO_ROW)
    return Figures(
        *locustfile.tries_and_failures(tries),
        *locustfile.tries_and_failures(arrivals),
        echo_times=Counter(echo_row.response_times if echo_row else ()),
        failed_echo_times=Counter(FAILED_ECHO_TIMES),
    )


@events.request.add_listener
def keep_failed_echo(
    request_type: str,
    name: str,
    response_time: float,
    exception: Exception | None = None,
    **_: object,
) -> None:
    """Keep the time of a failed echo."""
    if exception is not None and (name, request_type) == locustfile.ECHO_ROW:
        FAILED_ECHO_TIMES[stats.bucket_response_time(response_time)] += 1


@events.report_to_master.add_listener
def send_failed_echoes(data: dict[str, object], **_: object) -> None:
    """Add the failed echoes to a worker's report, which begins new counts as Locust's rows do."""
    data["failed_echo_times"] = dict(FAILED_ECHO_TIMES)
    FAILED_ECHO_TIMES.clear()


@events.worker_report.add_listener
def add_failed_echoes(data: dict[str, dict[int, int]], **_: object) -> None:
    """Add the failed echoes of a worker. One that was started without this file sends none."""
    FAILED_ECHO_TIMES.update(data.get("failed_echo_times", {}))


@events.test_start.add_listener
@events.reset_stats.add_listener
def forget_failed_echoes(**_: object) -> None:
    """Begin new counts where Locust's rows do."""
    FAILED_ECHO_TIMES.clear()


@events.init.add_listener
def watch_reset_stats(environment: env.Environment, **_: object) -> None:
    """Begin new counts with ``--reset-stats``, too."""
    if environment.reset_stats:
        environment.events.spawning_complete.add_listener(forget_failed_echoes)


# --------------------------------------------------------------------------------------- verdict


@events.quitting.add_listener
def judge(environment: env.Environment, **_: object) -> None:
    """Set the exit code where a limit was given, and say why at the end."""
    runner = environment.runner
    if runner is None or isinstance(runner, runners.WorkerRunner):
        return
    if not has_limit(environment) or is_search(environment):
        return
    runner.stop()  # after Ctrl-C the users are still there
    gevent.sleep(0)  # lets the rows come that are fired by greenlets of their own
    result, reason = verdict_of(environment)
    # Another plugin may have failed the run for a reason of its own.
    environment.process_exit_code = environment.process_exit_code or exit_code(environment, result)
    say_after_tables(environment, f"locust: verdict {result}: {reason}")


def verdict_of(environment: env.Environment) -> tuple[str, str]:
    """Return ``passed``, ``failed`` or ``unknown``, and the figures that say why."""
    try:
        limits = limits_of(environment)
    except locustfile.SettingError as error:  # typed into the web UI
        return "failed", str(error)
    figures = figures_of(environment)
    totals = locustfile.run_totals(environment)
    lag = schedule_fault(totals.due, totals.started_in_time)
    reasons = compare(figures, limits)
    if lag:
        reasons.append(lag)
    reasons += locustfile.generator_faults(environment)
    if lag or locustfile.lost_workers(environment):
        result = "unknown"
    elif figures.echoes and not broken_limit(figures, limits):
        result = "passed"
    else:
        result = "failed"
    return result, ", ".join(reasons)


def schedule_fault(due: int, started_in_time: int) -> str:
    """Return what is wrong where an open loop has started too few messages; empty if nothing is."""
    if started_in_time < locustfile.KEPT_SCHEDULE * due:
        return f"the generator started {started_in_time:,} of {due:,} messages in time"
    return ""


def exit_code(environment: env.Environment, result: str) -> int:
    """Return 0 for a server that has passed, unless a task has raised an exception: see above."""
    if result != "passed":
        return 1
    if environment.runner and environment.runner.exceptions:
        options = environment.parsed_options
        return int(options.exit_code_on_error) if options else 1
    return 0


def broken_limit(figures: Figures, limits: Limits) -> str:
    """Return the first figure that is over its limit, with the limit; empty if none is."""
    if limits.fail_ratio is not None and figures.fail_ratio > limits.fail_ratio:
        return compare_fail_ratio(figures, limits.fail_ratio)
    if limits.p95 is not None and figures.p95 > limits.p95:
        return compare_p95(figures, limits.p95)
    return ""


def compare(figures: Figures, limits: Limits) -> list[str]:
    """Return the figures beside their limits, as texts."""
    parts = []
    if limits.fail_ratio is not None:
        parts.append(compare_fail_ratio(figures, limits.fail_ratio))
    if limits.p95 is not None and figures.echo_times:
        parts.append(compare_p95(figures, limits.p95))
    if figures.echoes == 0:
        parts.append("no echo came")
    return parts


def compare_fail_ratio(figures: Figures, limit: float) -> str:
    """Return the fail ratio beside its limit, as text."""
    return f"fail ratio {figures.fail_ratio:.4g} (limit {limit:.9g})"


def compare_p95(figures: Figures, limit: float) -> str:
    """Return the percentile beside its limit, as text; where it is infinite, also why."""
    if figures.p95 < math.inf:
        return f"95th percentile {figures.p95:.9g} ms (limit {limit:.9g})"
    attempts = figures.echo_times.total()
    failed = attempts - figures.echoes
    return f"95th percentile infinite (limit {limit:.9g}) as {failed} of {attempts} echoes failed"


def say_after_tables(environment: env.Environment, line: str) -> None:
    """Print the last line of a run, once, after Locust's tables."""
    if environment not in SAID:
        SAID.add(environment)
        environment.events.quit.add_listener(lambda **_: print(line, file=sys.stderr))
