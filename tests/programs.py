"""Programs that run beside a test: the ``locust`` command, real servers, and what they print."""

from __future__ import annotations

import locust  # isort: skip  # replaces blocking calls with gevent's

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import gevent.os
import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCUST = (Path(sys.executable).with_name("locust"),)
# For commands of the documents: "locust" is this one.
PATH = f"{LOCUST[0].parent}{os.pathsep}{os.environ['PATH']}"
STANDALONE = (sys.executable, ROOT / "locustfile.py")
VERSION = locust.__version__


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as condition is true; fail the test if it is false after so many seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition has not come true"
        gevent.sleep(0.01)


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


def rows_of(output: str) -> dict[str, tuple[int, int]]:
    """Return requests and failures by name, out of the last table that Locust printed."""
    end = output.index("Response time percentiles")
    table = output[output.rindex("Type     Name", 0, end) :]
    found = re.findall(r"^TCP +(\w+) +(\d+) +(\d+)\(", table, re.MULTILINE)
    return {name: (int(requests), int(failures)) for name, requests, failures in found}


def quiet(output: str) -> bool:
    """Return whether nothing in what Locust printed looks like an error."""
    errors = "Traceback|ERROR|CRITICAL|WARNING|Exception|KeyboardInterrupt|Error report"
    return not re.search(errors, output)


class Program:
    """A program that runs beside the test, with all that it prints."""

    def __init__(self, *command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
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

    def kill(self) -> None:
        """Kill the program and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self._reader.kill()
