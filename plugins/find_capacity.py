"""Find how many users a chat server holds.

    locust -f locustfile.py,plugins/find_capacity.py --headless --host=127.0.0.1:12345

Users are added in steps, until the 95th percentile of the echoes in a step, or the share of
failures, breaks its limit. The last step that held is measured again. The answer is the last line
(in the web UI: under Logs): the most users, and the messages a second, that held, and what broke at
how many users. In open loop (``--chat-rate``, or ``rate`` of the user class) it also says the
messages a second that were due, users × rate, beside those that came back.

List this file after that of the users.

Options, each also in the environment, as CAPACITY_STEP and so on:

--capacity-step            users that each step adds, and that start a second, at most 100 (10)
--capacity-step-time       seconds that a step is measured; longer than --chat-timeout (10)
--capacity-max-p95         largest 95th percentile of echoes with which a step holds, in ms (100)
--capacity-max-fail-ratio  largest share of failures with which a step holds (0.01)
--capacity-max-users       upper bound of users, for a server that never breaks (1000)

Exit code 0: found, or all users up to the upper bound held; 1: not even the first step held, or the
generator ran out of processor first, or a task has raised an exception.

Failures of every row break a step. They are compared with what users tried: with themselves and the
successes of every row but ``connect`` and ``send_chat``, which only serve a message. The rows
``delivery`` and ``received`` tell of what others sent, and are compared with themselves; the larger
of the two shares counts.
"""

from __future__ import annotations

from locust import LoadTestShape, env, events, runners, stats  # isort: skip

import logging
import re
from collections import Counter
from collections.abc import Iterator
from time import perf_counter, process_time
from typing import NamedTuple

import gevent
from locust.argument_parser import LocustArgumentParser

import locustfile

logger = logging.getLogger(__name__)

SETTLING = 1.0  # seconds after the last user of a step was started: by then all have connected
PATIENCE = 10.0  # seconds for Locust to reach a count: users that raised an exception stay missing
FASTEST_START = 100  # users a second; Locust warns above it
LOOK_INTERVAL = 0.1  # seconds between two looks at what is waited for
SERVING_ROWS = ("connect", "send_chat")  # their successes are no tries
ARRIVAL_ROWS = ("delivery", "received")  # they tell of what others sent
COUNT = re.compile(r"[1-9]\d{0,6}", re.ASCII)
SHARE = re.compile(r"[01]|0?\.\d{1,9}", re.ASCII)


# --------------------------------------------------------------------------------------- options


def parse_count(value: object) -> int:
    """Return a whole number above 0."""
    if not COUNT.fullmatch(str(value)):
        raise locustfile.SettingError(value, "a whole number above 0")
    return int(str(value))


def parse_seconds(value: object) -> float:
    """Return seconds above 0."""
    return locustfile.parse_positive(value, "seconds above 0")


def parse_milliseconds(value: object) -> float:
    """Return milliseconds above 0."""
    return locustfile.parse_positive(value, "ms above 0")


def parse_share(value: object) -> float:
    """Return a share from 0 to 1."""
    if not SHARE.fullmatch(str(value)):
        raise locustfile.SettingError(value, "0 to 1")
    return float(str(value))


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
    parse_milliseconds,
    "Largest 95th percentile of echoes, in ms, with which a step holds",
)
MAX_FAIL_RATIO = locustfile.Option(
    "capacity-max-fail-ratio",
    parse_share,
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


class Limits(NamedTuple):
    """The steps to take, and with what a step holds."""

    step: int  # users
    step_time: float  # seconds
    p95: float  # ms
    fail_ratio: float
    users: int
    rate: float | None  # messages a second of each user in open loop

    @property
    def spawn_rate(self) -> int:
        """How many users start a second."""
        return min(self.step, FASTEST_START)

    def steps(self) -> Iterator[int]:
        """Yield the users of each step up to the upper bound."""
        yield from range(self.step, self.users, self.step)
        yield self.users


def limits_of(environment: env.Environment) -> Limits:
    """Return what the parsed options say; empty ones mean their defaults.

    :raises SettingError: for a wrong one, typed into the web UI
    """
    options = vars(environment.parsed_options) if environment.parsed_options else {}

    def text(option: locustfile.Option) -> object:
        return options.get(option.key) or DEFAULTS[option]

    return Limits(
        step=parse_count(text(STEP)),
        step_time=parse_seconds(text(STEP_TIME)),
        p95=parse_milliseconds(text(MAX_P95)),
        fail_ratio=parse_share(text(MAX_FAIL_RATIO)),
        users=parse_count(text(MAX_USERS)),
        rate=rate_of(environment),
    )


def rate_of(environment: env.Environment) -> float | None:
    """Return the messages a second of each user in open loop.

    None in closed loop, and where users have different rates.
    """
    rates = set()
    for user_class in environment.user_classes:
        if issubclass(user_class, locustfile.TCPChatUser):
            rates.add(locustfile.settings_of(user_class, environment).rate)
    if len(rates) == 1:
        return rates.pop()
    return None


# ------------------------------------------------------------------------------ looks at the rows


class Clock(NamedTuple):
    """What a process that makes load has spent, both in seconds."""

    time: float  # since some moment
    processor: float


def clock() -> Clock:
    """Return the clock of this process."""
    return Clock(perf_counter(), process_time())


WORKER_CLOCKS: dict[str, Clock] = {}  # of each worker, as its latest report says


@events.report_to_master.add_listener
def stamp_report(data: dict[str, object], **_: object) -> None:
    """Say up to when a worker's report reaches: the master knows only when it came."""
    data["clock"] = clock()


@events.worker_report.add_listener
def keep_stamp(client_id: str, data: dict[str, tuple[float, float]], **_: object) -> None:
    """Keep the stamp of a worker. One that was started without this file sends none."""
    if "clock" in data:
        time, processor = data["clock"]
        WORKER_CLOCKS[client_id] = Clock(time, processor)
    else:
        WORKER_CLOCKS[client_id] = Clock(perf_counter(), 0.0)


class Count:
    """How many requests of some rows have succeeded and failed."""

    def __init__(self) -> None:
        self.successes = 0
        self.failures = 0

    def add(self, row: stats.StatsEntry) -> None:
        """Count a row too."""
        self.failures += row.num_failures
        if row.name not in SERVING_ROWS:
            self.successes += row.num_requests - row.num_failures

    def since(self, earlier: Count) -> Count:
        """Return how many have come after an earlier count."""
        difference = Count()
        difference.successes = self.successes - earlier.successes
        difference.failures = self.failures - earlier.failures
        return difference

    @property
    def share_of_failures(self) -> float:
        """The share of the failures; 0 where there was nothing."""
        if self.failures == 0:
            return 0.0
        return self.failures / (self.failures + self.successes)


class Look:
    """The statistics at one moment."""

    def __init__(self, runner: runners.Runner) -> None:
        self.clocks = clocks_of(runner)
        self.echo_times: Counter[int] = Counter()  # how many echoes took so many ms
        self.failed_echoes = 0  # they are among those times
        self.tries = Count()
        self.arrivals = Count()
        self.losses = 0  # requests that failed with the connection, or because there was none
        for row in runner.stats.entries.values():
            self._add(row)
        for error in runner.stats.errors.values():
            if tells_of_lost_connection(error):
                self.losses += error.occurrences

    def _add(self, row: stats.StatsEntry) -> None:
        if row.name in ARRIVAL_ROWS:
            self.arrivals.add(row)
        else:
            self.tries.add(row)
        if row.name == "echo_response" and row.method == "TCP":
            self.echo_times.update(row.response_times)
            self.failed_echoes = row.num_failures

    def seconds_since(self, earlier: Look) -> list[float]:
        """Return how much later each process has reported than at an earlier look."""
        return [spent.time for spent in self.spent_since(earlier)]

    def spent_since(self, earlier: Look) -> list[Clock]:
        """Return what each process has spent since an earlier look."""
        spent = []
        for name, now in self.clocks.items():
            before = earlier.clocks.get(name)
            if before is not None:
                spent.append(Clock(now.time - before.time, now.processor - before.processor))
        return spent


def clocks_of(runner: runners.Runner) -> dict[str, Clock]:
    """Return the clocks of the processes that make the load: this one, or a master's workers."""
    if not isinstance(runner, runners.MasterRunner):
        return {"": clock()}
    clocks = {}
    for name, worker in runner.clients.items():
        if worker.state != runners.STATE_MISSING and name in WORKER_CLOCKS:
            clocks[name] = WORKER_CLOCKS[name]
    return clocks


def tells_of_lost_connection(error: stats.StatsError) -> bool:
    """Return whether a failure is more than a late, damaged, refused or missing message."""
    text = stats.StatsError.parse_error(error.error)
    return error.method == "TCP" and not text.startswith(("Echo", "Delivery"))


def look_after(runner: runners.Runner, earlier: Look, seconds: float) -> Look:
    """Return a look as soon as each process has reported so much later than at an earlier one."""
    while True:
        look = Look(runner)
        passed = look.seconds_since(earlier)
        if passed and min(passed) > seconds:
            return look
        gevent.sleep(LOOK_INTERVAL)


# -------------------------------------------------------------------------------------- the steps


class Step:
    """What was measured with so many users, between two looks.

    ``fault`` says what broke, and is empty if the step held.
    """

    def __init__(self, users: int, running: int, limits: Limits, before: Look, after: Look) -> None:
        self.users = users
        self._running = running
        self._limits = limits
        spent = after.spent_since(before)
        self.processor = max(100 * used / seconds for seconds, used in spent)  # % of a core
        self.losses = after.losses - before.losses
        times = after.echo_times - before.echo_times
        self._echoes = times.total() - (after.failed_echoes - before.failed_echoes)
        self._rate = self._echoes * len(spent) / sum(seconds for seconds, _ in spent)
        self.p95 = stats.calculate_response_time_percentile(times, times.total(), 0.95)  # ms
        tries = after.tries.since(before.tries)
        arrivals = after.arrivals.since(before.arrivals)
        self._fail_ratio = max(tries.share_of_failures, arrivals.share_of_failures)
        self.fault = self._find_fault()

    @property
    def is_exhausted(self) -> bool:
        """Whether it was the generator that broke, not the server.

        Locust's own warning looks every 10 s, and so would mix steps.
        """
        return self.processor > runners.CPU_WARNING_THRESHOLD

    @property
    def load(self) -> str:
        """The users, and in open loop what they were to send."""
        if self._limits.rate is None:
            return f"{self.users} users"
        due = self.users * self._limits.rate
        return f"{self.users} users × {self._limits.rate:g} = {due:g} messages a second due"

    @property
    def figures(self) -> str:
        """All that was measured, as text."""
        reached = f"{self._rate:.1f} messages a second"
        if self._limits.rate is not None:
            reached = f"{self._rate:.1f} reached"
        return f"{self.load}, {reached} ({self._slowness}; {self._failing})"

    @property
    def broken(self) -> str:
        """At what load which limit broke, as text."""
        if self._limits.rate is None:
            return f"at {self.load} {self.fault}"
        return f"at {self.load}, {self._rate:.1f} reached: {self.fault}"

    @property
    def _slowness(self) -> str:
        return f"95th percentile {self.p95:.4g} ms, limit {self._limits.p95:.4g} ms"

    @property
    def _failing(self) -> str:
        limit = self._limits.fail_ratio
        return f"failed {self._fail_ratio * 100:.3g} %, limit {limit * 100:.3g} %"

    def _find_fault(self) -> str:
        """Return the first limit that broke, as text; empty if none did."""
        limits = self._limits
        if self.is_exhausted:
            return f"the generator ran out of processor ({self.processor:.0f} % of a core)"
        if self._running < self.users:
            return f"only {self._running} were running"
        if self._echoes == 0:
            if self._fail_ratio == 0:
                return "no message was echoed"
            return f"no message was echoed ({self._failing})"
        if self._fail_ratio > limits.fail_ratio:
            return self._failing
        # These are few among the thousands of messages of those who could stay.
        if self.losses > limits.fail_ratio * self.users:
            return (
                f"{self.losses} times a connection was lost or refused, "
                f"limit {limits.fail_ratio:.3g} a user"
            )
        if self.p95 > limits.p95:
            return self._slowness
        return ""


class Measurement:
    """Measures step after step."""

    def __init__(self, runner: runners.Runner, limits: Limits) -> None:
        self._runner = runner
        self._limits = limits
        # Seconds until the server has answered what the last step sent, and users who were
        # refused have tried again.
        self._leftover = 0.0

    def of(self, users: int) -> Step:
        """Wait for so many users, then for their statistics; return what these alone say."""
        self._wait_for(users)
        before, after = self._look_twice()
        step = Step(users, self._runner.user_count, self._limits, before, after)
        self._leftover = step.p95 / 1000
        if step.losses:
            self._leftover = max(self._leftover, self._limits.step_time)
        logger.info("%s: %s", step.figures, step.fault or "held")
        return step

    def _wait_for(self, users: int) -> None:
        # A master has no such greenlet: there Locust waits before it asks for the next step.
        if self._runner.spawning_greenlet:
            self._runner.spawning_greenlet.join()
        with gevent.Timeout(PATIENCE + self._runner.environment.stop_timeout, False):
            while self._runner.user_count != users:
                gevent.sleep(LOOK_INTERVAL)

    def _look_twice(self) -> tuple[Look, Look]:
        """Return two looks that are a step apart, after the settling."""
        while True:
            gevent.sleep(SETTLING + self._leftover)
            # Each worker has to have made a report since.
            before = look_after(self._runner, Look(self._runner), 0)
            after = look_after(self._runner, before, self._limits.step_time)
            if after.echo_times >= before.echo_times:  # else the statistics were reset meanwhile
                return before, after


# ------------------------------------------------------------------------------------- the search


class FindCapacity(LoadTestShape):
    """Adds users until a limit breaks, then goes back to what held."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: Iterator[tuple[int, float]] = iter(())

    def tick(self) -> tuple[int, float] | None:
        """Return users and spawn rate of the next step, once the present one has been measured.

        None at the end.
        """
        if self.runner is None:
            return None
        if self.runner.state == runners.STATE_INIT:  # a new run; Locust keeps this object for all
            self._targets = search(self.runner)
        return next(self._targets, None)


def search(runner: runners.Runner) -> Iterator[tuple[int, float]]:
    """Yield users and spawn rate of each step; measure the step when asked for the next.

    At the end it says the answer and sets the exit code.
    """
    environment = runner.environment
    environment.process_exit_code = 1  # until a capacity is found
    try:
        limits = limits_of(environment)
    except locustfile.SettingError as error:
        say(runner, f"unknown: {error}")
        return
    if isinstance(runner, runners.MasterRunner) and not runner.worker_count:
        say(runner, "unknown: no worker has connected")
        return
    found = Search(Measurement(runner, limits), limits)
    yield from found.climb()
    yield from found.go_back()
    # An exception in a task is a mistake of the locustfile, and fails the run as ever.
    if found.has_answer and not runner.exceptions:
        environment.process_exit_code = 0
    say(runner, found.answer)


class Search:
    """The steps that held so far, and the one that did not."""

    def __init__(self, measurement: Measurement, limits: Limits) -> None:
        self._measurement = measurement
        self._limits = limits
        self._held: list[Step] = []
        self._broken: Step | None = None

    def climb(self) -> Iterator[tuple[int, float]]:
        """Add users until a limit breaks."""
        for users in self._limits.steps():
            yield users, self._limits.spawn_rate
            step = self._measurement.of(users)
            if step.fault:
                self._broken = step
                return
            self._held.append(step)

    def go_back(self) -> Iterator[tuple[int, float]]:
        """After a fault of the server, measure again what held, down to a step that still does."""
        while self._held and self._broken and not self._broken.is_exhausted:
            users = self._held.pop().users
            yield users, self._limits.spawn_rate
            step = self._measurement.of(users)
            if not step.fault:
                self._held.append(step)
                return
            if step.is_exhausted:
                self._broken = step

    @property
    def has_answer(self) -> bool:
        """Whether the capacity, or that the upper bound is below it, is known."""
        return bool(self._held) and not (self._broken and self._broken.is_exhausted)

    @property
    def answer(self) -> str:
        """What was found, as text."""
        best = self._held[-1].figures if self._held else ""
        broken = self._broken
        if broken is None:
            return f"at least {best}; no limit was reached up to the upper bound"
        if broken.is_exhausted:
            answer = f"unknown: {broken.broken}: use --processes, or more machines"
            return f"{answer}; before it held {best}" if best else answer
        if best:
            return f"{best}; {broken.broken}"
        if broken.users > self._limits.step:
            return f"none: {broken.broken}, then no step held"
        return f"none: {broken.broken}"


def say(runner: runners.Runner, answer: str) -> None:
    """Print the answer: without a web UI below the tables that end the run, else now."""
    line = f"capacity: {answer}"

    def print_line(**_: object) -> None:
        stats.console_logger.info(line)

    if runner.environment.web_ui:
        print_line()
    else:
        runner.environment.events.quit.add_listener(print_line)
