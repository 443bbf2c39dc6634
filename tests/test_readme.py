"""Every command of the README runs, and what it lists is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from programs import LOCUST, PATH, ROOT, Program, quiet, rows_of, wait_until
from servers import Server, echo, free_port, lines

import locustfile

Start = Callable[..., Program]
Serve = Callable[..., Server]

README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOKED_UP = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
IN_TABLES = re.findall(r"^\| .* \| `(locust .*)` \|$", README, re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()] + IN_TABLES
PYTHON = re.findall(r"^```python\n(.*?)^```", README + LOOKED_UP, re.MULTILINE | re.DOTALL)


def commands_with(*texts: str, without: str = "nothing") -> list[str]:
    """Return the commands that contain all texts, and not one that the pattern finds."""
    found = [command for command in COMMANDS if all(text in command for text in texts)]
    return [command for command in found if not re.search(without, command)]


def example(name: str) -> str:
    """Return the Python example that defines a name."""
    return next(str(code) for code in PYTHON if name in code)


def with_fewer_users(command: str, port: int) -> str:
    """Return the command for the server at port, with at most 20 users that start at once."""
    command = re.sub(r"--users=\d{3,}", "--users=20", command)
    command = re.sub(r"--spawn-rate=\d+", "--spawn-rate=20", command)
    return command.replace(".venv/bin/", "").replace("12345", str(port))


def shortened(command: str, port: int) -> str:
    """Return the command for the server at port, with fewer users, and two seconds of time."""
    return re.sub(r"--run-time=\w+", "--run-time=2s", with_fewer_users(command, port))


class Echo:
    """A handler that sends every line back, and keeps it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection."""
        for line in lines(connection):
            self.lines.append(line)
            connection.sendall(line + b"\n")


def started_in_copy(start: Start, folder: Path, line: str, **variables: str) -> Program:
    """Run a command line in a folder with a copy of the project's file."""
    shutil.copy(ROOT / "locustfile.py", folder)
    bus = str(free_port())
    variables |= {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus, "PATH": PATH}
    return start("bash", "-c", f"exec env {line}", cwd=folder, **variables)


def stopped(running: Program) -> int:
    """Stop a run as Ctrl-C does, once all of its users are there; return its exit code."""
    running.prints("All users spawned")
    running.prints("echo_response")  # in the table of every two seconds
    assert quiet(running.output)  # with --run-time, gevent prints what Ctrl-C raises
    return running.interrupt()


# ---------------------------------------------------------------------------------------- commands


def test_there_is_no_command_that_no_test_runs() -> None:
    tested = [
        *commands_with("pip install"),
        *commands_with("python locustfile.py"),
        *commands_with("tls://"),  # by test_tls.py
        *commands_with("plugins/"),  # by the tests of each plugin
        *RUNS,
        *IN_BROWSER,
        *commands_with("--master"),
    ]
    assert sorted(tested) == sorted(COMMANDS)
    assert len(BLOCKS) == 9 and len(IN_TABLES) == 11


def test_the_first_command_ends_by_itself_without_a_failure(start: Start, tmp_path: Path) -> None:
    (command,) = commands_with("--echo-server", "--headless")
    line = command.rpartition("&& ")[2].replace("--run-time 10s", "--run-time 4s")
    running = started_in_copy(
        start, tmp_path, line.replace(".venv/bin/", ""), TCP_PORT=str(free_port())
    )
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"}
    assert {failures for _, failures in rows.values()} == {0}
    assert quiet(running.output)


RUNS = commands_with("--headless", without="plugins/|--master|tls://|--echo-server")


@pytest.mark.parametrize("command", RUNS)
def test_a_headless_command_runs_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path, command: str
) -> None:
    handler = Echo()
    line = with_fewer_users(command, serve(handler).port)
    running = started_in_copy(start, tmp_path, line)
    wait_until(lambda: len(handler.lines) >= 10)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"}
    assert {failures for _, failures in rows.values()} == {0}
    for report in re.findall(r"--html=(\S+)", command):
        assert (tmp_path / report).stat().st_size > 10_000
    for prefix in re.findall(r"--csv=(\S+)", command):
        assert (tmp_path / f"{prefix}_stats_history.csv").exists()


IN_BROWSER = commands_with("locust ", without="--headless|--worker")


@pytest.mark.parametrize("command", IN_BROWSER)
def test_a_command_with_the_web_ui_opens_it(
    start: Start, serve: Serve, tmp_path: Path, command: str
) -> None:
    port = free_port() if "--echo-server" in command else serve(echo).port
    web = f"http://127.0.0.1:{free_port()}"
    variables = {"TCP_PORT": str(port)} if "--echo-server" in command else {}
    variables |= {"LOCUST_WEB_HOST": "127.0.0.1", "LOCUST_WEB_PORT": web.rpartition(":")[2]}
    running = started_in_copy(start, tmp_path, with_fewer_users(command, port), **variables)
    wait_until(lambda: answers(web))
    form = {"user_count": 2, "spawn_rate": 2}
    assert requests.post(f"{web}/swarm", data=form, timeout=60).json()["success"]
    wait_until(lambda: "echo_response" in requests.get(f"{web}/stats/requests", timeout=60).text)
    assert quiet(running.output)


def answers(address: str) -> bool:
    """Return whether a web server listens at an address."""
    try:
        return requests.get(address, timeout=60).ok
    except requests.ConnectionError:
        return False


def test_the_commands_of_master_and_worker_work_together(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    ((master, worker),) = [block.splitlines() for block in BLOCKS if "--worker" in block]
    handler = Echo()
    bus = str(free_port())
    ports = {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus}
    line = with_fewer_users(master, serve(handler).port)
    running = start(*shlex.split(line), PATH=PATH, **ports)
    helping = start(*shlex.split(worker), cwd=tmp_path, PATH=PATH, **ports)
    wait_until(lambda: len(handler.lines) >= 20)
    assert stopped(running) == 0
    assert helping.ends() == 0
    assert rows_of(running.output)["connect"] == (20, 0)


def test_the_standalone_command_works(start: Start, serve: Serve) -> None:
    (command,) = commands_with("python locustfile.py")
    arguments = shlex.split(with_fewer_users(command, serve(echo).port))[1:]
    assert start(sys.executable, *arguments).ends() == 0


def test_the_test_command_is_this_one() -> None:
    (command,) = commands_with("pytest")
    assert command.split(" && ") == [
        "python3 -m venv .venv",
        ".venv/bin/pip install -r requirements.txt -r tests/requirements.txt",
        ".venv/bin/python -m pytest",
    ]
    (first,) = commands_with("pip install", without="pytest")
    assert first.split(" && ")[:2] == [
        "python3 -m venv .venv",
        ".venv/bin/pip install -r requirements.txt",
    ]


# ----------------------------------------------------------------------------------------- plugins


def start_of(command: str) -> list[str]:
    """Return the files and the class that a command names, without its options."""
    return [word for word in shlex.split(command) if not word.startswith("--")]


def commands_of_plugin(path: str) -> list[list[str]]:
    """Return what the commands in the first lines of a plugin name."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    joined = re.sub(r"\\\n\s*", "", docstring)
    return [start_of(line) for line in joined.splitlines() if line.strip().startswith("locust ")]


@pytest.mark.parametrize("command", commands_with("plugins/"))
def test_a_command_of_a_plugin_stands_in_the_first_lines_of_the_plugin(command: str) -> None:
    path = re.findall(r"plugins/\w+\.py", command)[-1]
    assert start_of(command) in commands_of_plugin(path)


def test_every_plugin_is_in_the_readme() -> None:
    named = set(re.findall(r"plugins/(\w+\.py)", "\n".join(IN_TABLES)))
    assert named == {path.name for path in (ROOT / "plugins").glob("*.py")}


# ---------------------------------------------------------------------------------------- examples


def test_the_scenario_of_the_readme_works_in_the_file(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    handler = Echo()
    source = (ROOT / "locustfile.py").read_text(encoding="utf-8")
    method = "".join(f"    {line}\n" for line in example("special_command").splitlines())
    marker = "    @task(1)\n"
    assert source.count(marker) == 1
    changed = source.replace(marker, f"{method}\n{marker}")
    (tmp_path / "locustfile.py").write_text(changed, encoding="utf-8")
    options = ("--headless", f"--host={serve(handler).address}", "--chat-wait=0.01")
    running = start(*LOCUST, *options, cwd=tmp_path)

    def commands() -> list[bytes]:
        return [line for line in handler.lines if re.fullmatch(rb"/command special_\d+", line)]

    wait_until(lambda: len(commands()) > 1)  # so the first has been answered
    assert stopped(running) == 0
    assert rows_of(running.output)["command"][0] >= 1


def test_the_protocol_example_of_the_readme_works(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    messages: list[bytes] = []

    def server(connection: socket.socket) -> None:
        framing = locustfile.LengthPrefixFraming(">I")
        answers = {
            b'{"login": "kim"}': (b'{"news": 0}', b'{"welcome": 1}', b'{"ping": 1}'),
            b'{"pong": 1}': (),
        }
        while data := connection.recv(65536):
            for payload in framing.feed(data):
                messages.append(payload)
                usual = (b'{"echo": ' + payload + b"}",)
                for answer in answers.get(payload, usual):
                    connection.sendall(framing.encode(answer))

    (tmp_path / "json_chat.py").write_text(example("JsonChat"), encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    address = serve(server).address
    options = ("-f", "json_chat.py", "JsonChat", "--headless", f"--host={address}")
    running = start(*LOCUST, *options, "--chat-wait=0.05", cwd=tmp_path)
    wait_until(lambda: len(messages) > 10)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", "login"}
    assert {failures for _, failures in rows.values()} == {0}
    assert messages[0] == b'{"login": "kim"}'
    assert b'{"pong": 1}' in messages


# ---------------------------------------------------------------------------------------- lists


def test_the_option_table_lists_the_options_that_there_are(start: Start) -> None:
    running = start(sys.executable, ROOT / "locustfile.py", "--help")
    assert running.ends() == 0
    options = set(re.findall(r"--(?:chat|tcp|echo)-[a-z0-9-]+", running.output))
    assert options == set(re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE))
    assert len(options) > 7
    variables = set(re.findall(r"\[env var: (\w+)\]", " ".join(running.output.split())))
    assert all(f"`{variable}`" in README for variable in variables)


def test_the_hooks_and_attributes_of_the_table_exist() -> None:
    table = README.partition("| attribute or method |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = set(re.findall(r"`(\w+)", " ".join(cells)))
    assert len(names) == 10
    assert all(hasattr(locustfile.TCPChatUser, name) for name in names)


def test_the_errors_of_the_documents_exist_with_these_texts() -> None:
    names = re.findall(r"`((?:Echo|Message|Handler|Framing)[A-Z]\w+)", README + LOOKED_UP)
    assert len(set(names)) >= 8
    assert all(issubclass(getattr(locustfile, name), locustfile.ChatError) for name in names)
    for name, text in re.findall(r"`(\w+)\('(The [^']*)'\)`", LOOKED_UP):
        assert str(getattr(locustfile, name)()) == text


def test_the_failures_of_delivery_exist() -> None:
    source = (ROOT / "plugins" / "delivery.py").read_text(encoding="utf-8")
    names = set(re.findall(r"`(Delivery[A-Z]\w+)`", LOOKED_UP))
    assert names == {"DeliveryLost", "DeliveryRepeated", "DeliveryReordered"}
    assert all(f"class {name}(" in source for name in names)


@pytest.mark.parametrize(
    "arguments",
    [
        ["localhost"],
        ["http://localhost:12345"],
        ["127.0.0.1:1", "--chat-rate=2", "--chat-wait=1"],
        ["127.0.0.1:1", "--chat-source=192.0.2.1"],
    ],
)
def test_the_errors_before_a_run_are_the_ones_in_the_table(
    start: Start, arguments: list[str]
) -> None:
    host, *options = arguments
    running = start(*LOCUST, "--headless", f"--host={host}", *options)
    assert running.ends() == 1
    texts = re.findall(r"`('.*? will not do: .*?)(?:, …|…)?` \|", LOOKED_UP)
    assert len(texts) == 4
    assert any(f"locust: error: {text.strip()}" in running.output for text in texts)


def test_a_plugin_that_is_listed_before_the_locustfile_is_the_error_in_the_table(
    start: Start,
) -> None:
    (text,) = re.findall(r"`(.*conflicting option string.*?)`", LOOKED_UP)
    files = "plugins/verdict.py,locustfile.py"
    running = start(*LOCUST, "-f", files, "--headless", "--host=127.0.0.1:1", cwd=ROOT)
    assert running.ends() == 1
    assert text in running.output
