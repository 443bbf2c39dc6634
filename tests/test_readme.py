"""Every command of the README runs, and what it lists is what there is."""

from __future__ import annotations

import builtins
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import LOCUST, PATH, ROOT, Ahead, Program, Server, echo, free_port, wait_until
from test_command import quiet, rows_of
from test_delivery import Room

Start = Callable[..., Program]
Serve = Callable[..., Server]

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
IN_TABLES = [line.strip("`") for line in re.findall(r"`(?:locust|python) [^`]*`", README) if "--host" in line]
COMMANDS = [block.strip() for block in BLOCKS] + IN_TABLES
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def example(name: str) -> str:
    """Return the Python example that defines a name."""
    return next(str(code) for code in PYTHON if name in code)


SHORTER = {"10s": "3s", "1m": "2s", "5m": "2s", "10m": "2s", "8h": "2s"}


def shortened(command: str, port: int) -> str:
    """Return the command for the server at port, with fewer users and less time."""
    command = re.sub(r"--run-time[= ](\w+)", lambda match: f"--run-time={SHORTER[match[1]]}", command)
    command = re.sub(r"--users=\d{3,}", "--users=20", re.sub(r"--spawn-rate=\d+", "--spawn-rate=20", command))
    return command.replace("12345", str(port))


def test_the_readme_has_the_commands_that_it_is_to_have() -> None:
    assert len(BLOCKS) == 13 and len(IN_TABLES) == 8 and len(PYTHON) == 3


HEADLESS = [c for c in COMMANDS if "--headless" in c and "--master" not in c and "tls://" not in c]


class Run(NamedTuple):
    """A command under way."""

    program: Program
    folder: Path
    server: Server | None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead[Run]]:
    """Start the commands that end by themselves, each in a folder and against a server of its own."""

    def launch(command: str) -> Run:
        handler = Room() if "--chat-delivery" in command else echo
        folder, server = tmp_path_factory.mktemp("run"), None if "--echo-server" in command else Server(handler)
        port, bus = server.port if server else free_port(), str(free_port())
        for name in ("locustfile.py", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "examples", folder / "examples")
        line = shortened(command.rpartition("&& ")[2].replace(".venv/bin/", ""), port)
        variables = {"PATH": PATH}
        variables |= {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus}
        variables |= {"CAPACITY_STEP_TIME": "1", "CAPACITY_MAX_USERS": "20"}
        variables |= {} if server else {"TCP_PORT": str(port)}
        return Run(Program("bash", "-euo", "pipefail", "-c", line, cwd=folder, **variables), folder, server)

    ahead = Ahead(launch, HEADLESS)
    yield ahead
    for run in ahead.started.values():
        run.program.kill()
        if run.server:
            run.server.stop()


@pytest.mark.parametrize("command", HEADLESS)
def test_a_headless_command_ends_by_itself_with_code_0(runs: Ahead[Run], command: str) -> None:
    program, folder, server = runs[command]
    assert program.ends(90) == 0, program.output
    assert server is None or server.opened > 0
    assert quiet(program.output)
    rows = rows_of(program.output)
    if "examples/" not in command:
        assert set(rows) - {"delivery"} == {"connect", "send_chat", "echo_response"}
        assert ("delivery" in rows) == ("--chat-delivery" in command)
        assert all(requests > 0 and failures == 0 for requests, failures in rows.values())
    for report in re.findall(r"--html=(\S+)", command):
        assert (folder / report).stat().st_size > 10_000
    for prefix in re.findall(r"--csv=(\S+)", command):
        assert (folder / f"{prefix}_stats_history.csv").exists()
    assert ("verdict passed" in program.output) == ("--chat-max" in command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "locust " in c and not re.search("--headless|--worker", c)])
def test_a_command_with_the_web_ui_opens_it(start: Start, serve: Serve, command: str) -> None:
    port = free_port() if "--echo-server" in command else serve(echo).port
    web = free_port()
    line = "exec env " + shortened(command.replace(".venv/bin/", ""), port)
    running = start(
        *("bash", "-c", line),
        PATH=PATH,
        LOCUST_WEB_PORT=str(web),
        LOCUST_WEB_HOST="127.0.0.1",
        **({"TCP_PORT": str(port)} if "--echo-server" in command else {}),
    )
    running.prints("Starting web interface")
    import requests

    def swarm() -> bool:
        try:
            form = {"user_count": 2, "spawn_rate": 2}
            return bool(requests.post(f"http://127.0.0.1:{web}/swarm", data=form, timeout=5).json()["success"])
        except requests.ConnectionError:
            return False

    wait_until(swarm)
    wait_until(lambda: "echo_response" in requests.get(f"http://127.0.0.1:{web}/stats/requests", timeout=5).text)
    assert quiet(running.output)


def test_the_commands_of_master_and_worker_work_together(start: Start, serve: Serve, tmp_path: Path) -> None:
    master, worker = (next(c for c in COMMANDS if option in c) for option in ("--master ", "--worker"))
    bus, port = str(free_port()), serve(echo).port
    variables = {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus}
    variables["PATH"] = PATH
    running = start(*shlex.split(shortened(master, port)), **variables)
    helping = start(*shlex.split(worker), cwd=tmp_path, **variables)
    assert running.ends(60) == 0
    assert helping.ends() == 0
    assert rows_of(running.output)["connect"] == (20, 0)


def test_the_standalone_command_works(start: Start, serve: Serve) -> None:
    command = next(c for c in COMMANDS if c.startswith("python "))
    arguments = shlex.split(shortened(command, serve(echo).port))[1:]
    assert start(sys.executable, *arguments).ends() == 0


def test_the_test_command_is_this_one() -> None:
    command = next(c for c in COMMANDS if "pytest" in c)
    parts = command.split(" && ")
    assert parts == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt", ".venv/bin/python -m pytest"]
    assert next(c for c in COMMANDS if "&&" in c).split(" && ")[:2] == parts[:2]


def test_the_scenario_of_the_readme_works_in_the_file(start: Start, serve: Serve, tmp_path: Path) -> None:
    received: list[bytes] = []

    def server(connection: object) -> None:
        from conftest import lines

        for line in lines(connection):  # type: ignore[arg-type]
            received.append(line)
            connection.sendall(b"as you wish\n" if line.startswith(b"/") else line + b"\n")  # type: ignore[attr-defined]

    source = (ROOT / "locustfile.py").read_text(encoding="utf-8")
    method = "".join(f"    {line}\n" for line in example("special_command").splitlines())
    marker = "    @task(1)\n"
    assert source.count(marker) == 1
    (tmp_path / "locustfile.py").write_text(source.replace(marker, f"{method}\n{marker}"), encoding="utf-8")
    running = start(
        *LOCUST, "--headless", f"--host={serve(server).address}", "--chat-wait=0.01", "--run-time=2s", cwd=tmp_path
    )
    assert running.ends() == 0
    assert any(re.fullmatch(rb"/command special_\d{1,3}", line) for line in received)


def test_the_protocol_example_of_the_readme_works(start: Start, serve: Serve, tmp_path: Path) -> None:
    from locustfile import LengthPrefixFraming

    messages: list[bytes] = []

    def server(connection: object) -> None:
        framing = LengthPrefixFraming(">I")
        while data := connection.recv(65536):  # type: ignore[attr-defined]
            for payload in framing.feed(data):
                messages.append(payload)
                connection.sendall(framing.encode(b'{"ok": true, "echo": ' + payload + b"}"))  # type: ignore[attr-defined]

    (tmp_path / "json_chat.py").write_text(example("JsonChat"), encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    running = start(
        *(
            *LOCUST,
            "-f",
            tmp_path / "json_chat.py",
            "--headless",
            f"--host={serve(server).address}",
            "--chat-wait=0.05",
        ),
        *("--run-time=2s", "JsonChat"),
    )
    assert running.ends() == 0
    assert messages[0] == b'{"login": "kim"}'
    assert rows_of(running.output)["echo_response"][1] == 0


def test_the_option_table_lists_the_options_that_there_are(start: Start) -> None:
    running = start(sys.executable, ROOT / "locustfile.py", "--help")
    assert running.ends() == 0
    options = set(re.findall(r"--(?:chat|tcp|echo)-[a-z0-9-]+", running.output))
    source = (ROOT / "examples" / "find_capacity.py").read_text(encoding="utf-8")
    options |= {f"--capacity-{name}" for name in re.findall(r'^    "([a-z0-9-]+)": \(', source, re.MULTILINE)}
    table = set(re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE))
    assert options == {option for option in table if re.match("--(chat|tcp|echo|capacity)-", option)}
    assert len(options) > 12
    variables = set(re.findall(r"\[env var: (\w+)\]", " ".join(running.output.split())))
    assert all(f"`{variable}`" in README for variable in variables)


def test_the_error_names_of_the_readme_exist() -> None:
    import locustfile

    for name in re.findall(r"`((?:Echo|Message|Connection)[A-Z]\w+)`", README):
        assert hasattr(locustfile, name) or hasattr(builtins, name)
