"""Programs that run beside a test: the ``locust`` command, real servers, and what they print.

And what documents say of them: their commands and sections.
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.os
import pytest
from servers import Answers, free_port

ROOT = Path(__file__).resolve().parent.parent
LOCUST = (Path(sys.executable).with_name("locust"),)
QUICK_LOCUST = (sys.executable, ROOT / "tests" / "quick_locust.py")
# For commands of the documents: "locust" is this one.
PATH = f"{LOCUST[0].parent}{os.pathsep}{os.environ['PATH']}"
STANDALONE = (sys.executable, ROOT / "locustfile.py")


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as condition is true; fail the test if it is false after so many seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition has not come true"
        gevent.sleep(0.01)


def wait_for_lines(chat: Answers, count: int) -> None:
    """Return as soon as a server has received so many lines."""
    wait_until(lambda: len(chat.received) >= count)


def program(name: str) -> str:
    """Return where a program of the operating system is; skip the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def environment_variables(**variables: str) -> dict[str, str]:
    """Return the environment of this process, less what could configure Locust, plus variables."""
    ours = ("LOCUST_", "CHAT_", "TCP_PORT", "CAPACITY_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


def content_of(path: str | Path) -> str:
    """Return what is in a file of the project, by its path in it."""
    return (ROOT / path).read_text(encoding="utf-8")


def documented_commands(docstring: str | None) -> list[str]:
    """Return the commands of ``locust`` that stand in a docstring, each in one line."""
    joined = re.sub(r"\\\n\s*", "", docstring or "")
    return re.findall(r"^    (locust .*)", joined, re.MULTILINE)


def code_blocks(document: str, language: str) -> list[str]:
    """Return the blocks of code in a document that are marked with a language."""
    block = rf"^```{language}\n(.*?)^```"
    return re.findall(block, document, re.MULTILINE | re.DOTALL)


def section_of(document: str, heading: str) -> str:
    """Return what stands in a document below a heading of the second level."""
    _, found, rest = document.partition(f"\n## {heading}\n")
    assert found, f"there is no section {heading!r}"
    section, _, _ = rest.partition("\n## ")
    return section


def the_one_with(word: str, texts: Iterable[str]) -> str:
    """Return the one text that has this word in it."""
    found = [text for text in texts if word in text]
    assert len(found) == 1, f"{len(found)} texts have {word!r} in them"
    return found[0]


class Counts(NamedTuple):
    """What a table says of a row."""

    requests: int
    failures: int

    @property
    def successes(self) -> int:
        """How many requests have succeeded."""
        return self.requests - self.failures


def counts_in(text: str) -> dict[str, Counts]:
    """Return the counts of each row by its name; the last ones where a row stands there again."""
    counts = {}
    row = re.compile(r"^TCP +(\w+) +(\d+) +(\d+)\(", re.MULTILINE)
    for name, requests, failures in row.findall(text):
        counts[name] = Counts(int(requests), int(failures))
    return counts


def rows_of(output: str) -> dict[str, Counts]:
    """Return the counts of each row, out of the table that Locust prints at the end."""
    end = output.index("Response time percentiles")
    start = output.rindex("Type     Name", 0, end)
    return counts_in(output[start:end])


def latest_counts(running: Program, name: str) -> Counts:
    """Return the counts of a row in the latest table that a run has printed so far."""
    return counts_in(running.output).get(name, Counts(0, 0))


def stopped(running: Program) -> dict[str, Counts]:
    """Stop a run without failures; return the counts of its rows."""
    assert running.stop() == 0, running.output
    assert not re.search("Traceback|ERROR|CRITICAL|Error report", running.output), running.output
    rows = rows_of(running.output)
    assert all(counts.failures == 0 for counts in rows.values()), running.output
    return rows


def last_line(running: Program) -> str:
    """Return the last line of a run, after Locust's tables and the line of the core."""
    tables, _, rest = running.output.rpartition("\nchat: ")
    assert "Response time percentiles" in tables
    return rest.splitlines()[-1]


def quiet(output: str) -> bool:
    """Return whether nothing in what Locust printed looks like an error.

    That the machine is busy, which Locust and the core warn of, is none.
    """
    output = re.sub(r"^.*/WARNING/(locustfile|root): .*$", "", output, flags=re.MULTILINE)
    errors = "Traceback|ERROR|CRITICAL|WARNING|Exception|KeyboardInterrupt|Error report"
    return not re.search(errors, output)


class Program:
    """A program that runs beside the test, with all that it prints."""

    def __init__(self, *command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
        # A worker of ``-f -`` writes the files of its master there, and removes them at its end:
        # those of two workers must not be the same.
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        if "-" in command:
            variables = {"TMPDIR": self._folder.name, **variables}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment_variables(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""
        self._reader = gevent.spawn(self._read)

    def _read(self) -> None:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while data := gevent.os.nb_read(descriptor, 65536):
            self.output += data.decode("utf-8", "replace")

    def prints(self, text: str, seconds: float = 90.0) -> None:
        """Wait until the program has printed text."""
        limit = time.monotonic() + seconds
        while text not in self.output:
            is_over = time.monotonic() > limit or self._reader.ready()
            assert not is_over, f"{text!r} is not in: {self.output}"
            gevent.sleep(0.02)

    def ends(self, seconds: float = 120.0) -> int:
        """Wait until the program has ended; return its exit code."""
        self._reader.join(seconds)
        assert self._reader.ready(), f"still running: {self.output}"
        return self.process.wait()

    def stop(self) -> int:
        """End the program in good order; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def interrupt(self) -> int:
        """Press Ctrl-C, and again where a run has not ended long after; return its exit code.

        Locust drops a Ctrl-C that comes while it prints its table.
        """
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self._reader.join(29)  # no multiple of the 2 s between two tables
        return self.ends()

    def kill(self) -> None:
        """Kill the program and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self._reader.kill()
        self._folder.cleanup()


Start = Callable[..., Program]  # what the fixture ``start`` returns


@contextlib.contextmanager
def programs() -> Iterator[Start]:
    """Give a function that starts a program; all are killed when the context ends."""
    started: list[Program] = []

    def start(*command: str | Path, **keywords: Any) -> Program:
        started.append(Program(*command, **keywords))
        return started[-1]

    try:
        yield start
    finally:
        for running in started:
            running.kill()


def bus_options() -> tuple[str, ...]:
    """Return the options that give a master and its workers a port of their own to speak over."""
    port = next(filter(is_free, iter(lambda: random.randrange(20_000, 32_000), None)))
    return f"--master-bind-port={port}", f"--master-port={port}"


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port.

    One that the system chooses could be taken by any connection before the program listens.
    """
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def narrow_network(*command: str) -> list[str]:
    """Return a command in a network of its own, whose addresses have 20 ports each.

    Skips the test where that cannot be had.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can have a network with few ports")
    unshare = program("unshare")
    ip = program("ip")
    if subprocess.run([unshare, "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody have a network of his own")
    ports = "echo 40000 40019 > /proc/sys/net/ipv4/ip_local_port_range"
    script = f'{ip} link set lo up; {ports}; exec "$@"'
    return [unshare, "--net", "sh", "-c", script, "-", *command]


class WebUI:
    """The web UI of a run, spoken to as its pages do; ``options`` let Locust serve it."""

    def __init__(self) -> None:
        port = free_port()
        self.options = ("--web-host=127.0.0.1", f"--web-port={port}")
        self.address = f"http://127.0.0.1:{port}"

    def swarm(self, **form: str) -> None:
        """Send the form that starts a run, as soon as somebody takes it."""
        fields = {"user_count": "2", "spawn_rate": "9", **form}
        data = urllib.parse.urlencode(fields).encode()
        wait_until(lambda: self._asked("swarm", data).get("success"))

    def stop(self) -> None:
        """End the run; the web UI stays."""
        wait_until(lambda: self._asked("stop", b"").get("success"))

    def statistics(self) -> dict[str, Any]:
        """Return what the page of statistics shows; nothing while there is none."""
        return self._asked("stats/requests")

    def has_echoes(self) -> bool:
        """Return whether the statistics have a row ``echo_response``."""
        rows = self.statistics().get("stats", ())
        return any(row["name"] == "echo_response" for row in rows)

    def _asked(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.address}/{path}", data, 60) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except OSError:  # nobody listens yet
            return {}
