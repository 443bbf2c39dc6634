"""Starts the servers and the load generators, looks at them from outside, and ends them.

Messages are counted by the server and processor time by the system, so that no generator is judged
by its own word.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
START_LIMIT = 180  # seconds until all users have sent a message; more is a failure
END_LIMIT = 60  # seconds to end after SIGTERM
MOST_FILES = 100_000  # that any process needs
SHARES = (0, 50, 75, 95, 99, 100)  # percentiles that are looked at: minimum to maximum


class BenchmarkError(Exception):
    """A measurement is not valid. The text says why."""


class Skipped(Exception):
    """A measurement cannot be made here. The text says why."""


class Bench:
    """A temporary folder, the compiled server in it, and all processes: they end with the context.

    :param quick: short runs with few users, to see that everything works
    :param writes: whether RESULTS.md is written, and its picture
    """

    def __init__(self, *, quick: bool = False, writes: bool = False) -> None:
        self.quick = quick
        self.writes = writes
        self.most_files = raise_file_limit()
        self.prefix: list[str] = []  # what all that is started is started by: nsenter, say
        self._temporary = tempfile.TemporaryDirectory(prefix="benchmarks-")
        self._files = 0
        self._processes: list[subprocess.Popen[str]] = []
        self.server = str(self.new_path())
        try:
            command = ["cc", "-O2", "-o", self.server, str(FOLDER / "echo_server.c")]
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError):
            sys.exit("no echo server: install a C compiler as cc; it is for Linux only")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()
        self._temporary.cleanup()

    def pick(self, full: int, quick: int) -> int:
        """Return the number for this kind of run."""
        return quick if self.quick else full

    def new_path(self) -> Path:
        """Return a path in the temporary folder that nothing else uses."""
        self._files += 1
        return Path(self._temporary.name, str(self._files))

    def start(
        self,
        command: list[str],
        variables: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        stdout: int | TextIO = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start a program as the leader of a process group.

        The group stays in our session. So, if we are killed, the system ends the paused ones, and
        the others end by themselves: servers find their input closed, generators have a limit.

        :param variables: of the environment, besides the ones that there are
        """
        process = subprocess.Popen(
            [*self.prefix, *command],
            stdin=stdin,
            stdout=stdout,
            stderr=None if stdout == subprocess.PIPE else subprocess.STDOUT,
            env={**os.environ, **variables},
            text=True,
            cwd=ROOT,
            process_group=0,
        )
        self._processes.append(process)
        return process

    def end_all(self) -> None:
        """Kill everything that was started and still runs."""
        self.prefix = []
        while self._processes:
            kill(self._processes.pop())


def raise_file_limit() -> int:
    """Raise the limit of open files for all that is started; return what it is then."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # over the hard limit, if we may
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, max(most, MOST_FILES)))
        return MOST_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def free_port() -> str:
    """Return a port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a program and the rest of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def percentiles_of(values: Sequence[float]) -> dict[int, float]:
    """Return the percentiles of some values, of which there is at least one."""
    ordered = sorted(values)
    return {share: ordered[(len(ordered) - 1) * share // 100] for share in SHARES}


def each(things: Iterable[object], name: str) -> list[float]:
    """Return an attribute of each of some things."""
    return [getattr(thing, name) for thing in things]


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return how many times as much each value is as its neighbour among the others."""
    return [value / other for value, other in zip(values, others, strict=True)]


class Server:
    """An echo server in a process of its own; ``echo_server.c`` says what behaviours there are."""

    def __init__(self, bench: Bench, *behaviour: str) -> None:
        pipe = subprocess.PIPE
        self.process = bench.start([bench.server, *behaviour], {}, stdin=pipe, stdout=pipe)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._questions = self.process.stdin
        self._answers = self.process.stdout
        self.port = int(self._answers.readline())
        self.host = f"127.0.0.1:{self.port}"

    def counters(self) -> dict[str, float]:
        """Return accepted, open, active, lines and late_us, as ``echo_server.c`` says."""
        self._questions.write("\n")
        self._questions.flush()
        return dict(json.loads(self._answers.readline()))


class Look(NamedTuple):
    """What was counted until a moment; or, as a difference of two, in the time between."""

    seconds: float
    lines: float
    """Messages that the server received."""
    user: float
    """Processor seconds of the generator's processes, outside the kernel."""
    system: float
    """Processor seconds of the generator's processes in the kernel."""
    server: float
    """Processor seconds of the server."""
    machine: float
    """Processor seconds of the whole machine."""

    def since(self, earlier: Look) -> Look:
        """Return what happened since an earlier look."""
        return Look(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.lines / self.seconds

    @property
    def cost(self) -> float:
        """Processor microseconds of the generator for each message."""
        return (self.user + self.system) / self.lines * 1e6

    @property
    def busy(self) -> float:
        """What the generator used, of one processor."""
        return (self.user + self.system) / self.seconds

    @property
    def server_busy(self) -> float:
        """What the server used, of one processor."""
        return self.server / self.seconds

    @property
    def kernel_cost(self) -> float:
        """Processor microseconds of the generator in the kernel, for each message."""
        return self.system / self.lines * 1e6

    @property
    def others(self) -> float:
        """What other processes used, of one processor, where only this generator ran."""
        return (self.machine - self.user - self.system - self.server) / self.seconds


class Generator:
    """A load generator in a process of its own.

    :param users: how many connections it is going to hold
    :param servers: where to
    :param variables: of the environment, besides the ones that there are
    """

    def __init__(
        self,
        bench: Bench,
        users: int,
        servers: list[Server],
        command: list[str],
        variables: Mapping[str, str],
    ) -> None:
        self.users = users
        self.servers = servers
        self._output = bench.new_path()
        with self._output.open("w") as output:
            self.process = bench.start(command, variables, stdout=output)

    def processes(self) -> list[psutil.Process]:
        """Return the process and all that it has started."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def counted(self, name: str) -> float:
        """Return the sum of a counter over the servers."""
        return sum(server.counters()[name] for server in self.servers)

    def wait_until_steady(self) -> None:
        """Return when all users have connected and as many messages were sent, and a bit later."""
        limit = time.monotonic() + START_LIMIT
        while min(self.counted("accepted"), self.counted("lines")) < self.users:
            if self.process.poll() is not None or time.monotonic() > limit:
                came = self.counted("accepted")
                raise self.error(f"only {came:.0f} of {self.users} users have connected")
            time.sleep(0.1)
        time.sleep(0.5)

    def look(self) -> Look:
        """Return what was counted until now."""
        own = [process.cpu_times() for process in self.processes()]
        servers = [psutil.Process(server.process.pid) for server in self.servers]
        serving = [process.cpu_times() for process in servers]
        machine = psutil.cpu_times()
        return Look(
            seconds=time.perf_counter(),
            lines=self.counted("lines"),
            user=sum(times.user for times in own),
            system=sum(times.system for times in own),
            server=sum(times.user + times.system for times in serving),
            machine=sum(machine) - machine.idle - machine.iowait,
        )

    def pause(self) -> None:
        """Stop all its processes until ``resume``; it must not be for longer than a time-out."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def finish(self) -> str:
        """End it in an orderly way; return what it printed."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> str:
        """Wait until it has ended; return what it printed."""
        try:
            self.process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            raise self.error("it did not end") from None
        finally:
            kill(self.process)
        return self._output.read_text()

    def finish_clean(self) -> None:
        """End it; raise BenchmarkError where it tells of failures."""
        self.finish()

    def percentiles(self) -> dict[int, float]:
        """Return percentiles of the round trips that it reports, in ms, after its end."""
        trips = self.round_trips()
        if not trips:
            raise self.error("it has reported no round trips")
        return percentiles_of(trips)

    def round_trips(self) -> Sequence[float]:
        """Return all of these round trips."""
        raise NotImplementedError

    def error(self, text: str) -> BenchmarkError:
        """Return an error with the last words that the generator itself has printed."""
        return BenchmarkError(" ".join([text, *self._output.read_text().split()[-30:]]))


class Locust(Generator):
    """Locust without web UI.

    :param options: of Locust
    :param scripts: what it runs, separated by commas
    :param limit: seconds after which it ends even if nobody ends it
    :param exact_seconds: how long to keep every round trip, as ``exact.py`` says
    """

    def __init__(
        self,
        bench: Bench,
        users: int,
        servers: list[Server],
        *options: str,
        scripts: str = "locustfile.py",
        limit: float = 300,
        exact_seconds: float = 0,
    ) -> None:
        self._trips = bench.new_path()
        variables = {"EXACT_FILE": str(self._trips), "EXACT_SECONDS": str(exact_seconds)}
        if exact_seconds:
            scripts += ",benchmarks/exact.py"
        command = [sys.executable, "-m", "locust", "-f", scripts, "--headless", "--json"]
        command += ["--skip-log-setup", "--only-summary", "--host", servers[0].host]
        command += ["--users", str(users), "--spawn-rate", str(min(users, 1000))]
        command += ["--run-time", f"{limit:.0f}s", *options]
        super().__init__(bench, users, servers, command, variables)

    def finish_statistics(self) -> dict[str, dict[str, float]]:
        """End it and return its statistics: the entries of ``--json`` by their names."""
        output = self.finish()
        # Worker processes print lists, too, of what they have not told their master.
        lists = [json.loads(text) for text in re.findall(r"^\[\n.*?^\]", output, re.M | re.S)]
        entries = max(lists, key=lambda each: sum(entry["num_requests"] for entry in each))
        return {entry["name"]: entry for entry in entries}

    def finish_clean(self) -> None:
        """End it; raise BenchmarkError if a request failed."""
        self.check_clean(self.finish_statistics())

    def check_clean(self, statistics: Mapping[str, Mapping[str, float]]) -> None:
        """Raise BenchmarkError if a request failed."""
        for name, entry in statistics.items():
            if entry["num_failures"]:
                raise self.error(f"{entry['num_failures']} requests {name} failed")

    def round_trips(self) -> Sequence[float]:
        """Return the round trips that ``exact.py`` has kept."""
        trips = array("d")
        trips.frombytes(self._trips.read_bytes())
        return trips


def watch(generator: Generator, seconds: float) -> Look:
    """Return what a generator does in the next seconds."""
    before = generator.look()
    time.sleep(seconds)
    return generator.look().since(before)


def watch_in_turn(
    generators: Mapping[str, Generator], turns: int, seconds: float
) -> list[dict[str, Look]]:
    """Let one generator at a time run, the rest paused; return what each did, round by round.

    The speed of a shared machine changes within seconds, by more than what is to be measured. Turns
    as short as these meet it alike; runs one after the other do not.
    """
    for generator in generators.values():
        generator.wait_until_steady()
    for generator in generators.values():
        generator.pause()
    rounds = []
    for _ in range(turns):
        rounds.append({name: take_turn(each, seconds) for name, each in generators.items()})
    for generator in generators.values():
        generator.resume()
    return rounds


def take_turn(generator: Generator, seconds: float) -> Look:
    """Let a paused generator run for so many seconds; return what it did."""
    generator.resume()
    time.sleep(seconds / 5)  # for what has come in the meantime
    window = watch(generator, seconds)
    generator.pause()
    return window
