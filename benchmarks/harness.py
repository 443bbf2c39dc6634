"""Starts the servers and the load generators of the benchmarks, looks at them from outside, and
ends them.

Messages are counted by the server and processor time by the system, so that no generator is judged
by its own word."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
START_LIMIT = 150  # seconds until all users have sent a message; more is a failure
END_LIMIT = 60  # seconds to end after SIGTERM; then it is killed
# Of a processor: what others may use during a turn, with the inaccuracy of the system's figures.
QUIET = 0.2


class BenchmarkError(Exception):
    """A measurement is not valid. The text says why."""


@dataclass
class Window:
    """What happened from one look at a generator and its server to the next."""

    seconds: float
    lines: float
    """Messages that the server received."""
    user: float
    """Processor seconds of the generator and its children, outside the kernel."""
    system: float
    """Processor seconds of the generator and its children in the kernel."""
    server: float
    """Processor seconds of the server: if near ``seconds``, the server was the bottleneck."""
    others: float = 0.0
    """Processor seconds of whatever else ran on the machine."""

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.lines / self.seconds

    @property
    def share(self) -> float:
        """Share of one processor that the generator used."""
        return (self.user + self.system) / self.seconds

    @property
    def cost(self) -> float:
        """Processor microseconds of the generator for each message."""
        return (self.user + self.system) / self.lines * 1e6


class Bench:
    """A temporary folder, the compiled programs in it, and all processes. They end with the
    context, at the latest.

    :param quick: short runs with few users, to see that everything works
    """

    def __init__(self, quick: bool) -> None:
        self.rounds, self.turns = (1, 2) if quick else (3, 7)
        self._quick = quick
        self._temporary = tempfile.TemporaryDirectory(prefix="benchmarks-")
        self._folder, self._files = Path(self._temporary.name), 0
        self._processes: list[subprocess.Popen[str]] = []
        self.client = self._compile("client.c")
        server = self._compile("echo_server.c")
        self.server_command = (
            [server] if server else [sys.executable, str(FOLDER / "echo_server.py")]
        )
        self.server_name = (
            "echo_server.c"
            if server
            else "echo_server.py, itself the bottleneck, as no C was compiled"
        )

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()
        self._temporary.cleanup()

    def scaled(self, users: int) -> int:
        """Return the number of users, or a tenth of it in a quick run."""
        return users // 10 if self._quick else users

    def _compile(self, source: str) -> str | None:
        """Return the path of the compiled program, or None without a compiler, or where there is no
        epoll."""
        compiler, program = shutil.which("cc"), str(self._folder / Path(source).stem)
        command = [compiler or "", "-O2", "-o", program, str(FOLDER / source)]
        return (
            program
            if compiler and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
            else None
        )

    def new_file(self) -> Path:
        """Return a path in the temporary folder that nothing else uses."""
        self._files += 1
        return self._folder / str(self._files)

    def start(self, command: list[str], **settings: Any) -> subprocess.Popen[str]:
        """Start a program as the leader of a process group.

        The group stays in our session: so, if we are killed, the system ends the paused ones, and
        the others end by themselves, as servers find their standard input closed and generators
        have a limit of time."""
        process = subprocess.Popen(command, text=True, cwd=ROOT, process_group=0, **settings)
        self._processes.append(process)
        return process

    def end_all(self) -> None:
        """Kill everything that was started and still runs."""
        while self._processes:
            kill(self._processes.pop())


def free_port() -> str:
    """Return a port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a program and the rest of its process group."""
    with contextlib.suppress(
        ProcessLookupError, PermissionError
    ):  # macOS says the latter of a group that has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def processor_seconds(pid: int) -> tuple[float, float]:
    """Return the user and the system seconds of a process and its children, as far as those still
    run."""
    user = system = 0.0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            user, system = user + times.user, system + times.system
    return user, system


class Server:
    """An echo server in a process of its own; ``echo_server.c`` describes the modes.

    :param python: take ``echo_server.py``, which can do TLS
    :param environment: variables to set besides the ones that there are
    """

    def __init__(
        self, bench: Bench, mode: str, argument: int = 0, python: bool = False, **environment: str
    ) -> None:
        program = (
            [sys.executable, str(FOLDER / "echo_server.py")] if python else bench.server_command
        )
        settings: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "env": os.environ | environment,
        }
        self.process = bench.start([*program, mode, str(argument)], **settings)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._questions, self._answers = self.process.stdin, self.process.stdout
        self.port = int(self._answers.readline())
        self.host = f"127.0.0.1:{self.port}"

    def counters(self) -> dict[str, float]:
        """Return accepted, open, active, lines and late_us; ``echo_server.c`` says what they
        are."""
        self._questions.write("\n")
        self._questions.flush()
        return dict(json.loads(self._answers.readline()))


class Generator:
    """A load generator in a process of its own.

    :param users: how many connections it is going to hold
    :param servers: where to
    :param environment: variables to set besides the ones that there are
    """

    def __init__(
        self,
        bench: Bench,
        users: int,
        servers: list[Server],
        command: list[str],
        **environment: str,
    ) -> None:
        self.users, self.servers = users, servers
        self._output, self._errors = bench.new_file(), bench.new_file()
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.process = bench.start(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=os.environ | environment,
            )

    def counted(self, name: str) -> float:
        """Return the sum of a counter over the servers."""
        return sum(server.counters()[name] for server in self.servers)

    def wait_until_steady(self) -> None:
        """Return when all users are connected and have sent a message each, and half a second more
        has passed."""
        limit = time.monotonic() + START_LIMIT
        while min(self.counted("open"), self.counted("lines")) < self.users:
            if self.process.poll() is not None or time.monotonic() > limit:
                raise self.error(f"only {self.counted('open')} of {self.users} users were there")
            time.sleep(0.1)
        time.sleep(0.5)

    def look(self) -> tuple[float, float, float, float, float]:
        """Return the values of which a Window holds the differences."""
        served = sum(sum(processor_seconds(server.process.pid)) for server in self.servers)
        return (
            time.perf_counter(),
            self.counted("lines"),
            *processor_seconds(self.process.pid),
            served,
        )

    def pause(self) -> None:
        """Stop all its processes until ``resume``; after more than its time-out, its requests would
        fail."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def finish(self) -> str:
        """End it in an orderly way and return what it printed on its standard output."""
        self.process.terminate()
        try:
            self.process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            raise self.error("it did not end after SIGTERM") from None
        finally:
            kill(self.process)
        return self._output.read_text()

    def check(self, echoed: int) -> None:
        """Raise BenchmarkError unless the servers received as many messages as it has counted
        echoes."""
        received = self.counted("lines")
        # What is in flight at the end is received and not counted: at most one message of each
        # user.
        if not 0 <= received - echoed <= self.users:
            raise self.error(f"{echoed} echoes counted, {received:.0f} messages received")

    def error(self, text: str) -> BenchmarkError:
        """Return an error with the last lines of the generator's own messages."""
        return BenchmarkError(" ".join([text, *self._errors.read_text().split()[-30:]]))


class Locust(Generator):
    """Locust without web UI, with one of our scripts, or several joined by commas.

    :param rate: users to start a second
    :param limit: seconds after which it ends even if nobody ends it
    """

    def __init__(
        self,
        bench: Bench,
        users: int,
        servers: list[Server],
        scripts: str,
        *options: str,
        rate: float,
        limit: float = 300,
        **environment: str,
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "locust",
            "--headless",
            "--json",
            "--skip-log-setup",
            "--only-summary",
        ]
        numbers = ["--users", str(users), "--spawn-rate", str(rate), "--run-time", f"{limit:.0f}s"]
        super().__init__(
            bench, users, servers, [*command, "-f", scripts, *numbers, *options], **environment
        )

    def finish_statistics(self) -> dict[str, dict[str, Any]]:
        """End it and return its statistics: the entries of ``--json`` by their names."""
        output = "\n" + self.finish()
        try:
            # Each worker process prints an empty list, on one line.
            entries, _ = json.JSONDecoder().raw_decode(output[output.index("\n[\n") + 1 :])
            return {entry["name"]: entry for entry in entries}
        except ValueError:
            raise self.error("it printed no statistics") from None

    def finish_clean(self) -> None:
        """End it; raise BenchmarkError if a request failed, or if the servers received other
        messages."""
        entries = self.finish_statistics()
        if failures := {
            name: entry["num_failures"] for name, entry in entries.items() if entry["num_failures"]
        }:
            raise self.error(f"requests failed: {failures}")
        self.check(entries["echo_response"]["num_requests"])


def watch(generators: Mapping[str, Generator], seconds: float) -> dict[str, Window]:
    """Return what each generator does in the next seconds."""
    busy, before = (
        busy_seconds(),
        {name: generator.look() for name, generator in generators.items()},
    )
    time.sleep(seconds)
    after = {name: generator.look() for name, generator in generators.items()}
    windows = {
        name: Window(*(now - then for now, then in zip(after[name], before[name], strict=True)))
        for name in generators
    }
    others = (
        busy_seconds()
        - busy
        - sum(each.user + each.system + each.server for each in windows.values())
    )
    for window in windows.values():
        window.others = others
    return windows


def watch_in_turn(
    generators: Mapping[str, Generator], turns: int, seconds: float
) -> dict[str, list[Window]]:
    """Let one generator after the other run alone while the rest is paused; return what each did in
    each turn.

    The speed of a shared machine changes within seconds, by more than what is to be measured. Turns
    as short as these meet it alike; runs one after the other do not. Rounds that other processes
    disturb are repeated, up to twice as many as wanted, and the least disturbed ones count."""
    for generator in generators.values():
        generator.wait_until_steady()
    for generator in generators.values():
        generator.pause()
    rounds: list[dict[str, Window]] = []
    while (
        len(rounds) < 2 * turns
        and sum(disturbance(windows.values()) < QUIET for windows in rounds) < turns
    ):
        rounds.append({})
        for name, generator in generators.items():
            generator.resume()
            time.sleep(seconds / 5)  # for what has come in the meantime
            rounds[-1] |= watch({name: generator}, seconds)
            generator.pause()
    for generator in generators.values():
        generator.resume()
    rounds.sort(key=lambda windows: disturbance(windows.values()))
    return {name: [windows[name] for windows in rounds[:turns]] for name in generators}


def disturbance(windows: Iterable[Window]) -> float:
    """Return the most of a processor that other processes used in one of the windows."""
    return max(window.others / window.seconds for window in windows)


def busy_seconds() -> float:
    """Return the processor seconds that the whole machine has been busy."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


def holdings(generator: Generator) -> tuple[float, float, float]:
    """Return the resident MB, open files and TCP sockets of a generator: the most of some looks
    within three seconds, as connections come and go."""
    process, looks = psutil.Process(generator.process.pid), []
    for _ in range(11):
        resident = process.memory_info().rss / 1e6
        looks.append((resident, process.num_fds(), len(process.net_connections("tcp"))))
        time.sleep(0.3)
    memory, files, sockets = map(max, zip(*looks, strict=True))
    return memory, files, sockets


def exact_figures(file: Path) -> dict[str, float]:
    """Return what ``exact.py`` has written."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        raise BenchmarkError("exact.py has written nothing") from None
