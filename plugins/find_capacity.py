"""Find how many users a chat server holds.

    locust -f locustfile.py,plugins/find_capacity.py --headless --host=127.0.0.1:12345

Users are added in steps, until the 95th percentile of the echoes in a step, or the share of
failures, breaks its limit. The last step that held is measured again. The answer is the last line
(in the web UI: under Logs): the most users, and the messages a second, that held, and what broke at
how many users. In open loop (``--chat-rate``, or ``rate`` of the user class) it also says the
messages a second that fell due, beside those that came back.

List this file after that of the users. It imports ``verdict.py``, which stands beside it, and
which a worker with ``-f -`` gets with it.

Options, each also in the environment, as CAPACITY_STEP and so on:

--capacity-step            users that each step adds, and that start a second, at most 100 (10)
--capacity-step-time       seconds that a step is measured; longer than --chat-timeout (10)
--capacity-max-p95         largest 95th percentile of echoes with which a step holds, in ms (100)
--capacity-max-fail-ratio  largest share of failures with which a step holds (0.01)
--capacity-max-users       upper bound of users, for a server that never breaks (1000)

Exit code 0: found, or all users up to the upper bound held; 1: not even the first step held, a task
has raised an exception, or the answer is ``unknown``. It is unknown where the generator broke
first: a worker was lost, a process ran out of processor, or in open loop under 95 % of the messages
that fell due were started in time; and where the run ended early. What else the generator did
wrong, such as standing still, stands in the line.

Fail ratio and percentile are those of ``verdict.py``: failures of every row break a step, and a
failed echo is infinitely slow. A step breaks, too, where connections are lost or refused more often
than the share of failures allows for so many users, and where no echo came.
"""

from __future__ import annotations

from locust import LoadTestShape, env, events, runners, stats  # isort: skip

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import gevent
from locust.argument_parser import LocustArgumentParser

import locustfile

try:
    import verdict
except ImportError:
    sys.exit("locust: error: find_capacity.py needs verdict.py: put both into one directory")

logger = logging.getLogger(__name__)

SETTLING = 1.0  # seconds after the last user of a step was started: by then all have connected
SPAWN_LIMIT = 10.0  # seconds to reach a count of users: those that raised an exception stay missing
FASTEST_START = 100  # users a second; Locust warns above it
POLL_INTERVAL = 0.1  # seconds
COUNT = re.compile(r"[1-9]\d{0,6}", re.ASCII)


# --------------------------------------------------------------------------------------- options


def parse_count(value: object) -> int:
    """Return a whole number above 0."""
    if not COUNT.fullmatch(str(value)):
        raise locustfile.SettingError(value, "count", "a whole number above 0")
    return int(str(value))


def parse_seconds(value: object) -> float:
    """Return seconds above 0."""
    return locustfile.parse_positive(value, "time", "seconds above 0")


STEP = locustfile.Option(
    "capacity-step", parse_count, "Users that each step adds, and that start a second (at most 100)"
)
STEP_TIME = locustfile.Option(
    "capacity-step-time",
    parse_seconds,
    "Seconds that a step is measured; longer than --chat-timeout",
)
MAX_P95 = locustfile.Option(
    "capacity-max-p95",
    verdict.parse_p95,
    "Largest 95th percentile of echoes, in ms, with which a step holds",
)
MAX_FAIL_RATIO = locustfile.Option(
    "capacity-max-fail-ratio",
    verdict.parse_fail_ratio,
    "Largest share of failures, 0 to 1, with which a step holds",
)
MAX_USERS = locustfile.Option(
    "capacity-max-users", parse_count, "Upper bound of users, for a server that never breaks"
)
DEFAULTS = {STEP: "10", STEP_TIME: "10", MAX_P95: "100", MAX_FAIL_RATIO: "0.01", MAX_USERS: "1000"}


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add this file's options to Locust's."""
    for option, default in DEFAULTS.items():
        option.add_to(parser, default)


class Plan(NamedTuple):
    """The steps to take, and with what a step holds."""

    step: int  # users
    step_time: float  # seconds
    max_users: int
    limits: verdict.Limits

    @property
    def spawn_rate(self) -> int:
        """How many users start a second."""
        return min(self.step, FASTEST_START)

    def steps(self) -> Iterator[int]:
        """Yield the users of each step up to the upper bound."""
        yield from range(self.step, self.max_users, self.step)
        yield self.max_users


def plan_of(environment: env.Environment) -> Plan:
    """Return what the parsed options say; empty ones mean their defaults.

    :raises SettingError: for a wrong one, typed into the web UI
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}

    def text(option: locustfile.Option) -> object:
        return options.get(option.key) or DEFAULTS[option]

    return Plan(
        step=parse_count(text(STEP)),
        step_time=parse_seconds(text(STEP_TIME)),
        max_users=parse_count(text(MAX_USERS)),
        limits=verdict.Limits(
            fail_ratio=verdict.parse_fail_ratio(text(MAX_FAIL_RATIO)),
            p95=verdict.parse_p95(text(MAX_P95)),
        ),
    )


# ------------------------------------------------------------------------------------- snapshots


class Timer(NamedTuple):
    """How long a process that makes load has been running, in seconds."""

    elapsed: float  # since some moment
    processor: float


WORKER_TIMERS: dict[str, Timer] = {}  # of each worker, as its latest report says


@events.report_to_master.add_listener
def send_timer(data: dict[str, object], **_: object) -> None:
    """Say up to when a worker's report reaches: the master knows only when it came."""
    data["timer"] = (perf_counter(), process_time())


@events.worker_report.add_listener
def keep_timer(client_id: str, data: dict[str, tuple[float, float]], **_: object) -> None:
    """Keep the timer of a worker. One that was started without this file sends none."""
    WORKER_TIMERS[client_id] = Timer(*data.get("timer", (perf_counter(), 0.0)))


class Snapshot(NamedTuple):
    """What is known of a run at one moment."""

    timers: dict[str, Timer]  # of each process that makes load
    figures: verdict.Figures
    totals: locustfile.Totals
    lost_connections: int  # requests that failed with the connection, or because there was none


def take_snapshot(environment: env.Environment) -> Snapshot:
    """Return what is known of a run now."""
    timers = {"": Timer(perf_counter(), process_time())}
    if isinstance(environment.runner, runners.MasterRunner):
        workers = environment.runner.clients
        timers = {name: WORKER_TIMERS[name] for name in workers if name in WORKER_TIMERS}
    errors = environment.stats.errors.values()
    return Snapshot(
        timers,
        verdict.figures_of(environment),
        locustfile.run_totals(environment),
        sum(error.occurrences for error in errors if tells_of_lost_connection(error)),
    )


def tells_of_lost_connection(error: stats.StatsError) -> bool:
    """Return whether a failure is more than a late, damaged, refused or missing message."""
    text = stats.StatsError.parse_error(error.error)
    return error.method == "TCP" and not text.startswith(("Echo", "Delivery"))


def times_between(before: Snapshot, after: Snapshot) -> list[Timer]:
    """Return how long each process has been running between two snapshots."""
    spent = []
    for name, end in after.timers.items():
        start = before.timers.get(name)
        if start is not None:
            spent.append(Timer(end.elapsed - start.elapsed, end.processor - start.processor))
    return spent


# ----------------------------------------------------------------------------------------- steps


class Step:
    """What was measured with so many users between two snapshots.

    :param running: how many of the users were running at the end
    """

    def __init__(
        self, plan: Plan, users: int, running: int, before: Snapshot, after: Snapshot
    ) -> None:
        self.users = users
        self._plan = plan
        self._running = running
        self._figures = after.figures.since(before.figures)
        self._lost_connections = after.lost_connections - before.lost_connections
        self._due = after.totals.due - before.totals.due
        self._started_in_time = after.totals.started_in_time - before.totals.started_in_time
        spent = times_between(before, after)
        self._processor = max(100 * timer.processor / timer.elapsed for timer in spent)
        self._seconds = sum(timer.elapsed for timer in spent) / len(spent)

    @property
    def load(self) -> str:
        """The users, in open loop what was due, and what came back, as text."""
        due = f"{self._due / self._seconds:.1f} messages a second due, " if self._due else ""
        echoed = f"{self._figures.echoes / self._seconds:.1f} messages a second echoed"
        return f"{self.users} users, {due}{echoed}"

    @property
    def figures(self) -> str:
        """The figures beside their limits, as text."""
        return ", ".join(verdict.compare(self._figures, self._plan.limits))

    @property
    def fault(self) -> str:
        """What broke first, as text; empty if the step held."""
        return self.generator_fault or self._server_fault

    @property
    def generator_fault(self) -> str:
        """What the generator could not do, as text; empty if there was nothing."""
        # Locust's own warning looks every 10 s, and so would mix steps.
        if self._processor > runners.CPU_WARNING_THRESHOLD:
            return f"the generator ran out of processor ({self._processor:.0f} % of a core)"
        return verdict.schedule_fault(self._due, self._started_in_time)

    @property
    def _server_fault(self) -> str:
        limits = self._plan.limits
        if self._running < self.users:
            return f"only {self._running} were running"
        if self._figures.echoes == 0:
            return self.figures
        # These are few among the thousands of messages of those who could stay.
        if self._lost_connections > (limits.fail_ratio or 0) * self.users:
            lost = f"{self._lost_connections} times a connection was lost or refused"
            return f"{lost} (limit {limits.fail_ratio:.9g} a user)"
        return verdict.broken_limit(self._figures, limits)


class WorkerLost(Exception):
    """There is no worker, or one whose report never comes. The text says which."""


def measure(environment: env.Environment, plan: Plan, users: int, settling: float) -> Step:
    """Wait for so many users, then for their statistics; return what these alone say.

    :param settling: seconds to wait before the step begins
    :raises WorkerLost: where that happens meanwhile
    """
    runner = environment.runner
    assert runner is not None
    wait_for_users(runner, users)
    while True:
        gevent.sleep(settling)
        # Each worker has to have made a report since.
        before = snapshot_after(environment, take_snapshot(environment), 0)
        after = snapshot_after(environment, before, plan.step_time)
        if after.figures.echo_times >= before.figures.echo_times:  # else they were reset meanwhile
            step = Step(plan, users, runner.user_count, before, after)
            logger.info("%s (%s): %s", step.load, step.figures, step.fault or "held")
            return step


def wait_for_users(runner: runners.Runner, users: int) -> None:
    """Wait until so many users are running, or until the missing ones can be given up."""
    # A master has no such greenlet: there Locust waits before it asks for the next step.
    if runner.spawning_greenlet:
        runner.spawning_greenlet.join()
    with gevent.Timeout(SPAWN_LIMIT + runner.environment.stop_timeout, False):
        while runner.user_count != users and not locustfile.lost_workers(runner.environment):
            gevent.sleep(POLL_INTERVAL)


def snapshot_after(environment: env.Environment, earlier: Snapshot, seconds: float) -> Snapshot:
    """Return a snapshot as soon as each process has reported so much later than at an earlier one.

    :raises WorkerLost: where that happens meanwhile
    """
    while not locustfile.lost_workers(environment):
        snapshot = take_snapshot(environment)
        spent = times_between(earlier, snapshot)
        if spent and min(spent).elapsed > seconds:
            return snapshot
        gevent.sleep(POLL_INTERVAL)
    raise WorkerLost("a worker was lost")


# ------------------------------------------------------------------------------------ the search


class FindCapacity(LoadTestShape):
    """Adds users until a limit breaks, then goes back to what held."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: Iterator[tuple[int, int]] = iter(())
        self._held: list[Step] = []
        self._broken: Step | None = None
        self._went_back = False
        self._unfinished = "no run was started"  # why there is no answer; empty if there is one

    def tick(self) -> tuple[int, float] | None:
        """Return users and spawn rate of the next step, once the present one has been measured.

        None at the end.
        """
        if self.runner is None:
            return None
        if self.runner.state == runners.STATE_INIT:  # a new run; Locust keeps this object for all
            self._targets = self._search(self.runner)
        return next(self._targets, None)

    def _search(self, runner: runners.Runner) -> Iterator[tuple[int, int]]:
        """Yield users and spawn rate of each step; measure the step when asked for the next."""
        self._held = []
        self._broken = None
        self._went_back = False
        self._unfinished = "the run ended before a limit was found"
        try:
            plan = plan_of(runner.environment)
            if isinstance(runner, runners.MasterRunner) and not runner.worker_count:
                raise WorkerLost("no worker has connected")
            yield from self._climb(runner.environment, plan)
            yield from self._go_back(runner.environment, plan)
            self._unfinished = ""
        except (locustfile.SettingError, WorkerLost) as error:
            self._unfinished = str(error)
        if runner.environment.web_ui:
            stats.console_logger.info(f"capacity: {self.answer(runner.environment)}")

    def _climb(self, environment: env.Environment, plan: Plan) -> Iterator[tuple[int, int]]:
        """Add users until a limit breaks."""
        for users in plan.steps():
            yield users, plan.spawn_rate
            step = measure(environment, plan, users, SETTLING)
            if step.fault:
                self._broken = step
                return
            self._held.append(step)

    def _go_back(self, environment: env.Environment, plan: Plan) -> Iterator[tuple[int, int]]:
        """After a fault of the server, measure again what held, down to a step that still does."""
        # The server has to answer what the last step sent, and who was refused tries again.
        settling = SETTLING + plan.step_time
        while self._held and self._broken and not self._broken.generator_fault:
            self._went_back = True
            users = self._held.pop().users
            yield users, plan.spawn_rate
            step = measure(environment, plan, users, settling)
            if not step.fault:
                self._held.append(step)
                return
            if step.generator_fault:
                self._broken = step

    def is_found(self, environment: env.Environment) -> bool:
        """Return whether the capacity, or that the upper bound is below it, is known."""
        return bool(self._held) and not self._reasons_for_unknown(environment)

    def answer(self, environment: env.Environment) -> str:
        """Return what was found, and what the generator did wrong, as text."""
        held = [f"{step.load} ({step.figures})" for step in self._held[-1:]]
        reasons = self._reasons_for_unknown(environment)
        if reasons:
            parts = [f"unknown: {', '.join(reasons)}", *(f"before it held {text}" for text in held)]
        elif self._broken is None:
            parts = [f"at least {held[0]}", "no limit was reached up to the upper bound"]
        else:
            parts = [*(held or ["none"]), f"at {self._broken.load}: {self._broken.fault}"]
            if self._went_back and not held:
                parts.append("then no step held")
        faults = locustfile.generator_faults(environment)
        return "; ".join([*parts, *(fault for fault in faults if fault not in reasons)])

    def _reasons_for_unknown(self, environment: env.Environment) -> list[str]:
        """Return what keeps the search from an answer, as texts; none where it has one."""
        if locustfile.lost_workers(environment):
            return locustfile.generator_faults(environment)
        if self._broken and self._broken.generator_fault:
            fault = f"at {self._broken.load}: {self._broken.generator_fault}"
            return [f"{fault}: use --processes, or more machines"]
        return [self._unfinished] if self._unfinished else []


@events.quitting.add_listener
def end(environment: env.Environment, **_: object) -> None:
    """Set the exit code, and let the answer be the last line."""
    runner = environment.runner
    search = environment.shape_class
    if runner is None or not isinstance(search, FindCapacity):
        return
    if isinstance(runner, runners.WorkerRunner):
        return
    runner.stop()  # after Ctrl-C the users are still there
    # An exception in a task is a mistake of the locustfile, and fails the run as ever.
    code = 0 if search.is_found(environment) and not runner.exceptions else 1
    environment.process_exit_code = environment.process_exit_code or code
    verdict.say_after_tables(environment, f"capacity: {search.answer(environment)}")


@events.init.add_listener
def send_verdict_to_workers(environment: env.Environment, **_: object) -> None:
    """Let workers with ``-f -`` have ``verdict.py``, too: they get the files of this list."""
    files = environment.parsed_locustfiles or []
    names = [Path(file).name for file in files]
    this = Path(__file__).name
    if this in names and "verdict.py" not in names:
        files.insert(names.index(this), str(verdict.__file__))
