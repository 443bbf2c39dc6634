"""``docs/results.md``: its commands run, its pictures are there, its server is ill."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import LOCUST, ROOT, Program, quiet, rows_of, wait_until
from rows import Rows
from servers import Server, echo, free_port

from locustfile import TCPSocketClient

TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [block.strip() for block in BLOCKS]
Start = Callable[..., Program]
Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_runs_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path, command: str
) -> None:
    server = serve(echo)
    arguments = re.sub(r"--spawn-rate=\S+", "--spawn-rate=20", command)
    arguments = re.sub(r"--users=\d+", "--users=20", arguments)
    arguments = arguments.replace("12345", str(server.port))
    arguments = arguments.replace("-f locustfile.py", f"-f {ROOT / 'locustfile.py'}")
    running = start(*LOCUST, *arguments.split()[1:], cwd=tmp_path)
    wait_until(lambda: server.opened == 20)
    running.prints("All users spawned")
    assert quiet(running.output)  # with --run-time, gevent prints what Ctrl-C raises
    running.process.send_signal(signal.SIGINT)
    assert running.ends() == 0
    assert rows_of(running.output)["connect"] == (20, 0)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_every_picture_is_used_and_every_picture_used_is_there() -> None:
    guide = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"images/([\w-]+\.png)", TEXT + guide))
    assert used == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in (ROOT / "docs" / "images").iterdir()
    )


def test_the_options_and_illnesses_of_the_document_exist() -> None:
    from locust.argument_parser import get_parser

    options = set(get_parser(default_config_files=[])._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= options
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "sick_server.py", "--help"], capture_output=True, text=True
    )
    modes = set(re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE))
    assert set(re.findall(r"sick_server\.py (\w+)", TEXT)) <= modes


def test_the_script_of_the_pictures_makes_all_of_them() -> None:
    script = ROOT / "docs" / "take_pictures.py"
    done = subprocess.run(
        [sys.executable, script, "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    runs = set(re.findall(r"\w+", done.stderr.rpartition("write some of ")[2]))
    assert {path.stem for path in (ROOT / "docs" / "images").iterdir()} == runs | {
        "web-ui",
        "report",
    }


def sick(start: Start, *arguments: str) -> int:
    """Start the sick server; return its port."""
    port = free_port()
    start(sys.executable, ROOT / "docs" / "sick_server.py", *arguments, f"--port={port}").prints(
        "Ctrl-C ends it"
    )
    return port


@pytest.mark.parametrize(
    ("illness", "first", "last"),
    [
        (["healthy"], 20, 20),
        (["step", "0"], 220, 220),
        (["leak", "50000"], 70, 270),
        (["queue", "50"], 50, 50),
        (["pieces"], 0, 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_sick_server_has_its_illness(
    start: Start, connect: Connect, rows: Rows, illness: list[str], first: float, last: float
) -> None:
    client = connect(sick(start, *illness))
    assert all(client.send_chat("hello") for _ in range(5))
    times = [row["response_time"] for row in rows.named("echo_response")]
    assert times[0] >= first
    assert times[-1] >= last


@pytest.mark.parametrize(
    "illness", [["limit", "0"], ["stall", "20000"]], ids=lambda value: str(value[0])
)
def test_the_sick_server_does_not_answer(
    start: Start, connect: Connect, illness: list[str]
) -> None:
    assert connect(sick(start, *illness), timeout=0.5).send_chat("hello") is None
