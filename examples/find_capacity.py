"""Find how many users a chat server holds.

    locust -f locustfile.py,examples/find_capacity.py --headless --host=127.0.0.1:12345

Users are added in steps, until the 95th percentile of the echoes in a step, or the share of failures, breaks its limit.
The last step that held is measured again. The answer is the last line (in the web UI: under Logs): the most users, and
the messages a second, that held, and what broke at how many users. Exit code 0: found, or all users up to the upper
bound held; 1: not even the first step held, or the generator ran out of processor first. OPTIONS lists the limits.
"""

from __future__ import annotations

from locust import LoadTestShape, argument_parser, events, runners, stats  # isort: skip

import argparse
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from time import perf_counter, process_time
from typing import Any, NamedTuple

import gevent

SETTLING = 1.0  # seconds after a step's last user was started: connecting is over, and what waited is worked off
PATIENCE = 10.0  # seconds for Locust to reach the wanted count: users that raised an exception are missing for good
COUNT, NUMBER = r"[1-9]\d{0,6}", r"(?=.*[1-9])\d{1,9}(\.\d{1,9})?"
OPTIONS = {  # default, what a value looks like, what it means, what can be written
    "step": ("10", COUNT, "Users that each step adds, and that start a second (at most 100)", "a whole number above 0"),
    "step-time": ("10", NUMBER, "How long a step is measured; longer than --chat-timeout", "seconds above 0"),
    "max-p95": ("100", NUMBER, "Largest 95th percentile of echoes with which a step holds", "ms above 0"),
    "max-fail-ratio": ("0.01", r"[01]|0?\.\d{1,9}", "Largest share of failures with which a step holds", "0 to 1"),
    "max-users": ("1000", COUNT, "Upper bound of users, for a server that never breaks", "a whole number above 0"),
}
CLOCKS: dict[str, Sequence[float]] = {}  # what a worker's clock() was at its latest report


def checked(option: str, text: str) -> float:
    """Return the number that an option means, empty for its default; raise ``ArgumentTypeError`` for a wrong text."""
    default, pattern, _, instead = OPTIONS[option]
    if not re.fullmatch(pattern, text or default, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} will not do: write {instead}")
    return float(text or default)


@events.init_command_line_parser.add_listener
def add_options(parser: argument_parser.LocustArgumentParser) -> None:
    """Add the options to Locust's. Values stay text, as the web form has them."""
    for option, (default, _, meaning, instead) in OPTIONS.items():
        check = functools.partial(lambda text, option: (checked(option, text), text)[1], option=option)
        name, value = f"capacity-{option}", f"<{option.rpartition('-')[2]}>"
        variable, text = name.upper().replace("-", "_"), f"{meaning}: {instead} (default {default})"
        parser.add_argument(f"--{name}", metavar=value, env_var=variable, type=check, default=default, help=text)


def clock() -> tuple[float, float]:
    """Return the time, and how long this process has used the processor, both in seconds."""
    return perf_counter(), process_time()


@events.report_to_master.add_listener
def stamp_report(data: dict[str, Any], **_: Any) -> None:
    """Say up to when a worker's report reaches: they come 3 s apart, so the master's clock could not tell."""
    data["clock"] = clock()


@events.worker_report.add_listener
def keep_stamp(client_id: str, data: dict[str, Any], **_: Any) -> None:
    """Keep the stamp; a worker that was started without this file sends none."""
    CLOCKS[client_id] = data.get("clock") or (perf_counter(), 0.0)


class Look(NamedTuple):
    """The statistics at one moment."""

    clocks: dict[str, Sequence[float]]  # of the processes that make the load
    times: Counter[Any]  # how many echoes took so many ms
    failures: Counter[str]  # "echo", "other" (these messages were not even sent), and "lost": with the connection

    def spent_since(self, earlier: Look) -> list[tuple[float, float]]:
        """Return how many seconds have passed for each process, and how many of the processor it has used."""
        pairs = [(earlier.clocks[name], now) for name, now in self.clocks.items() if name in earlier.clocks]
        return [(now[0] - before[0], now[1] - before[1]) for before, now in pairs]


class Step(NamedTuple):
    """What was measured with so many users; the fault is empty if the step held."""

    users: int
    figures: str = ""
    fault: str = ""
    exhausted: bool = False  # the generator, not the server


class FindCapacity(LoadTestShape):
    """Adds users until a limit breaks, then goes back to what held."""

    runner: Any

    def tick(self) -> tuple[int, float] | None:
        """Return users and spawn rate of the next step, once the present one has been measured; None at the end."""
        if self.runner.state == runners.STATE_INIT:  # a new run; Locust keeps this object for all of them
            self._search = self._steps()
        return next(self._search, None)

    def _steps(self) -> Iterator[tuple[int, float]]:
        options, environment = vars(self.runner.environment.parsed_options), self.runner.environment
        environment.process_exit_code, self._leftover = 1, 0.0  # until a capacity is found
        try:
            self._given = {name: checked(name, options[f"capacity_{name.replace('-', '_')}"]) for name in OPTIONS}
        except argparse.ArgumentTypeError as error:  # typed into the web UI
            return self._say(f"unknown: {error}")
        if not self.runner.worker_count:
            return self._say("unknown: no worker has connected")
        step, most = int(self._given["step"]), int(self._given["max-users"])
        held, last, rate = list[Step](), Step(0), min(step, 100)  # users a second: above, Locust warns
        for users in (*range(step, most, step), most):
            yield users, rate
            last = self._measure(users)
            if last.fault:
                break
            held.append(last)
        while held and last.fault and not last.exhausted:
            yield held[-1].users, rate
            again = self._measure(held.pop().users)
            if not again.fault:
                held.append(again)
                break
            if again.exhausted:
                last = again
        best, why = held[-1].figures if held else "", f"at {last.users} users {last.fault}"
        # An exception in a task is a mistake of the locustfile, and fails the run as Locust always has it.
        environment.process_exit_code = int(not held or last.exhausted or bool(self.runner.exceptions))
        if not last.fault:
            self._say(f"at least {best}; no limit was reached up to the upper bound")
        elif last.exhausted:
            self._say(f"unknown: {why}: use --processes, or more machines" + (best and f"; before it held {best}"))
        else:
            self._say(f"{best}; {why}" if held else f"none: {why}" + (", then no step held" * (last.users > step)))

    def _measure(self, users: int) -> Step:
        """Wait for the users of a step, then for their statistics; return what these alone say."""
        if self.runner.spawning_greenlet:  # a master has none: there Locust waits before it asks for the next step
            self.runner.spawning_greenlet.join()
        with gevent.Timeout(PATIENCE + self.runner.environment.stop_timeout, False):
            while self.runner.user_count != users:
                gevent.sleep(0.1)
        gevent.sleep(SETTLING + self._leftover)
        before = self._look_after(self._look(), 0)  # with a report of each worker from after the settling
        after = self._look_after(before, self._given["step-time"])
        if not after.times >= before.times:  # somebody has reset the statistics
            return self._measure(users)
        times, failures, spent = after.times - before.times, after.failures - before.failures, after.spent_since(before)
        tries, echoes = times.total() + failures["other"], times.total() - failures["echo"]
        rate = echoes * len(spent) / sum(seconds for seconds, _ in spent)
        p95, most_p95 = stats.calculate_response_time_percentile(times, times.total(), 0.95), self._given["max-p95"]
        failed = (tries - echoes) / max(1, tries)
        most_failed = self._given["max-fail-ratio"]
        # Seconds until the server has answered what this step sent, and users who were refused have tried again.
        self._leftover = max(p95 / 1000, self._given["step-time"] if failures["lost"] else 0)
        slow = f"95th percentile {p95:.4g} ms, limit {most_p95:.4g} ms"
        failing = f"failed {failed * 100:.3g} %, limit {most_failed * 100:.3g} %"
        losing = f"{failures['lost']} times a connection was lost or refused, limit {most_failed:.3g} a user"
        processor = max(used / seconds for seconds, used in spent) * 100
        exhausted = processor > runners.CPU_WARNING_THRESHOLD  # Locust's own warning mixes steps: it looks every 10 s
        faults = {
            f"the generator ran out of processor ({processor:.0f} % of a core)": exhausted,
            f"only {self.runner.user_count} were running": self.runner.user_count < users,
            "no message was echoed" + f" ({failing})" * (tries > 0): echoes == 0,
            failing: failed > most_failed,
            # These are few failures among the thousands of messages of those who could stay.
            losing: failures["lost"] > most_failed * users,
            slow: p95 > most_p95,
        }
        fault = next((text for text, broken in faults.items() if broken), "")
        figures = f"{users} users, {rate:.1f} messages a second ({slow}; {failing})"
        logging.getLogger(__name__).info(f"{figures}: {fault or 'held'}")
        return Step(users, figures, fault, exhausted)

    def _look(self) -> Look:
        clocks: dict[str, Sequence[float]] = {"": clock()}
        if isinstance(self.runner, runners.MasterRunner):
            present = [name for name, worker in self.runner.clients.items() if worker.state != runners.STATE_MISSING]
            clocks = {name: CLOCKS[name] for name in present if name in CLOCKS}
        times, failures = Counter[Any](), Counter[str]()
        for (name, kind), entry in self.runner.stats.entries.items():
            if (name, kind) == ("echo_response", "TCP"):
                times.update(entry.response_times)
        for error in (error for error in self.runner.stats.errors.values() if error.method == "TCP"):
            failures["echo" if error.name == "echo_response" else "other"] += error.occurrences
            failures["lost"] += error.occurrences * (": Echo" not in error.to_name())  # all but late or damaged echoes
        return Look(clocks, times, failures)

    def _look_after(self, earlier: Look, seconds: float) -> Look:
        """Return a look as soon as the statistics of each process reach so much further than that earlier one."""
        while True:
            look = self._look()
            spent = look.spent_since(earlier)
            if spent and min(spent)[0] > seconds:
                return look
            gevent.sleep(0.1)

    def _say(self, answer: str) -> None:
        """Print the answer: without a web UI below the tables that end the run, else now."""
        environment, line = self.runner.environment, f"capacity: {answer}"
        if environment.web_ui:
            stats.console_logger.info(line)
        else:
            environment.events.quit.add_listener(lambda **_: stats.console_logger.info(line))
