"""``docs/results.md``: its commands run, its pictures are there, and its server has the illnesses that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import LOCUST, ROOT, Ahead, Program, Rows, Server, echo, free_port
from test_command import quiet, rows_of

from locustfile import TCPSocketClient

TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
COMMANDS = [block.strip() for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)]
Start = Callable[..., Program]
Connect = Callable[..., TCPSocketClient]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead[tuple[Program, Server]]]:
    """Start the commands of the document, with fewer users and less time."""

    def launch(command: str) -> tuple[Program, Server]:
        server, folder = Server(echo), tmp_path_factory.mktemp("run")
        arguments = re.sub(r"--spawn-rate=\S+", "--spawn-rate=20", command.replace("90s", "2s"))
        arguments = re.sub(r"--users=\d+", "--users=20", arguments).replace("12345", str(server.port))
        arguments = arguments.replace("-f locustfile.py", f"-f {ROOT / 'locustfile.py'}")
        return Program(*LOCUST, *arguments.split()[1:], cwd=folder), server

    ahead = Ahead(launch, COMMANDS)
    yield ahead
    for program, server in ahead.started.values():
        program.kill()
        server.stop()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_ends_with_code_0(runs: Ahead[tuple[Program, Server]], command: str) -> None:
    program, _ = runs[command]
    assert program.ends() == 0
    assert rows_of(program.output)["connect"] == (20, 0)
    assert quiet(program.output)


def test_every_picture_is_used_and_every_picture_used_is_there() -> None:
    guide = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"images/([\w-]+\.png)", TEXT + guide))
    assert used == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (ROOT / "docs" / "images").iterdir())


def test_the_options_and_illnesses_of_the_document_exist() -> None:
    from locust.argument_parser import get_parser

    options = set(get_parser(default_config_files=[])._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= options
    done = subprocess.run([sys.executable, ROOT / "docs" / "sick_server.py", "--help"], capture_output=True, text=True)
    modes = set(re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE))
    assert set(re.findall(r"sick_server\.py (\w+)", TEXT)) <= modes


def test_the_script_of_the_pictures_makes_all_of_them() -> None:
    script = ROOT / "docs" / "take_pictures.py"
    done = subprocess.run([sys.executable, script, "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    runs = set(re.findall(r"\w+", done.stderr.rpartition("write some of ")[2]))
    assert {path.stem for path in (ROOT / "docs" / "images").iterdir()} == runs | {"web-ui", "report"}


def sick(start: Start, *arguments: str) -> int:
    """Start the sick server; return its port."""
    port = free_port()
    start(sys.executable, ROOT / "docs" / "sick_server.py", *arguments, f"--port={port}").prints("Ctrl-C ends it")
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
    assert first <= times[0] < first + 150 and times[-1] >= last


@pytest.mark.parametrize("illness", [["limit", "0"], ["stall", "20000"]], ids=lambda value: str(value[0]))
def test_the_sick_server_does_not_answer(start: Start, connect: Connect, illness: list[str]) -> None:
    assert connect(sick(start, *illness), timeout=0.5).send_chat("hello") is None
