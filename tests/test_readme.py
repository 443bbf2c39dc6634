"""Every command of the README and of the look-up page runs, and what they list is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gevent
import pytest
from programs import LOCUST, PATH, ROOT, Program, Start, WebUI, quiet, rows_of, wait_until
from servers import Answers, Serve, echo, free_port, lines, with_the_line

import locustfile

README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOKED_UP = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BOTH = f"{README}\n{LOOKED_UP}"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", BOTH, re.MULTILINE | re.DOTALL)
IN_TABLES = re.findall(r"^\| .* \| `(locust .*)` \|$", BOTH, re.MULTILINE)
IN_SENTENCES = re.findall(r"(?<!`)`((?:locust|python)\s[^`]+)`(?! \|$)", BOTH, re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()] + IN_TABLES
COMMANDS += sorted({" ".join(command.split()) for command in IN_SENTENCES} - {*COMMANDS})
PYTHON = re.findall(r"^```python\n(.*?)^```", BOTH, re.MULTILINE | re.DOTALL)


def commands_with(*texts: str, without: str = "nothing") -> list[str]:
    """Return the commands that contain all texts, and not one that the pattern finds."""
    found = [command for command in COMMANDS if all(text in command for text in texts)]
    return [command for command in found if not re.search(without, command)]


def example(name: str) -> str:
    """Return the Python example that defines a name."""
    return next(str(code) for code in PYTHON if name in code)


def with_fewer_users(command: str, port: int) -> str:
    """Return the command for the server at port, with at most 20 users that start at once.

    Its server may be as slow as a busy machine makes it.
    """
    command = re.sub(r"--users=\d{3,}", "--users=20", command)
    command = re.sub(r"--spawn-rate=\d+", "--spawn-rate=20", command)
    command = re.sub(r"--chat-max-p95=\d+", "--chat-max-p95=60000", command)
    return command.replace(".venv/bin/", "").replace("12345", str(port))


def started_in_copy(start: Start, folder: Path, line: str, **variables: str) -> Program:
    """Run a command line in a folder with a copy of the project's file, and of the plugins."""
    shutil.copy(ROOT / "locustfile.py", folder)
    shutil.copytree(ROOT / "plugins", folder / "plugins", dirs_exist_ok=True)
    bus = str(free_port())
    variables |= {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus, "PATH": PATH}
    return start("bash", "-c", f"exec env {line}", cwd=folder, **variables)


def interrupted(running: Program) -> int:
    """Stop a run as Ctrl-C does, once all of its users are there; return its exit code."""
    running.prints("All users spawned")
    wait_until(lambda: has_printed_echoes(running.output))
    assert quiet(running.output), running.output
    return running.interrupt()


def has_printed_echoes(output: str) -> bool:
    """Return whether one of the tables of every two seconds has echoes, and is printed wholly.

    Locust drops a Ctrl-C that comes while it prints one.
    """
    return bool(re.search(r"echo_response.*Aggregated[^\n]*\n\n", output, re.DOTALL))


# ---------------------------------------------------------------------------------------- commands


def test_there_is_no_command_that_no_test_runs() -> None:
    tested = [
        *commands_with("pip install"),
        *commands_with("python "),
        *commands_with("locust ", "--help"),  # it is Locust's own
        *commands_with("tls://"),  # by test_tls.py
        *commands_with("certificate_chat.py"),  # by test_tls.py
        *commands_with("plugins/", without="verdict"),  # by the tests of each plugin
        *commands_with("my_chat.py"),
        *RUNS,
        *IN_BROWSER,
        *commands_with("--master"),
    ]
    assert {*tested} == {*COMMANDS}
    assert len(BLOCKS) == 10 and len(IN_TABLES) == 12


@pytest.mark.together
def test_the_first_command_ends_by_itself_with_a_last_line_as_in_the_readme(
    start: Start, tmp_path: Path
) -> None:
    (command,) = commands_with("--echo-server", "--headless")
    line = command.rpartition("&& ")[2].replace("--run-time 10s", "--run-time 3s")
    running = started_in_copy(
        start, tmp_path, line.replace(".venv/bin/", ""), TCP_PORT=str(free_port())
    )
    assert running.ends() == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"}
    assert {failures for _, failures in rows.values()} == {0}
    assert quiet(running.output)
    (documented,) = re.findall(r"^chat: .*$", README, re.MULTILINE)
    with_any_numbers = re.sub(r"\d[\d\\.,]*", r"[\\d.,e-]+", re.escape(documented))
    assert re.match(with_any_numbers, running.output.splitlines()[-1])


RUNS = commands_with("--headless", without=r"plugins/(?!verdict)|--master|tls://|--echo-server")


class HeadlessRun:
    """A run of a command of the README in a folder of its own, against an echo server."""

    def __init__(self, start: Start, serve: Serve, folder: Path, command: str) -> None:
        self.command = command
        self._folder = folder
        folder.mkdir()
        self._chat = Answers(with_the_line)
        line = with_fewer_users(command, serve(self._chat).port)
        self._running = started_in_copy(start, folder, line)

    def has_echoes(self) -> bool:
        """Return whether a row ``echo_response`` has been seen, and some messages."""
        reports = [path.read_text("utf-8") for path in self._folder.glob("*_history.csv")]
        is_seen = has_printed_echoes(self._running.output) or "echo_response" in "".join(reports)
        return is_seen and len(self._chat.received) >= 10

    def check(self) -> None:
        """End the run in good order, and look at what it leaves."""
        self._running.prints("All users spawned")
        wait_until(self.has_echoes)
        assert quiet(self._running.output), self._running.output
        assert self._running.interrupt() == 0, self._running.output
        rows = rows_of(self._running.output)
        assert set(rows) == {"connect", "send_chat", "echo_response"}
        assert {failures for _, failures in rows.values()} == {0}
        for report in re.findall(r"--html=(\S+)", self.command):
            assert (self._folder / report).stat().st_size > 10_000
        for prefix in re.findall(r"--csv=(\S+)", self.command):
            assert (self._folder / f"{prefix}_stats_history.csv").exists()
        if "verdict.py" in self.command:
            assert "verdict passed" in self._running.output.splitlines()[-1]


@pytest.mark.together
def test_the_headless_commands_run_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """All at once, as most of their time is spent waiting."""
    runs = [
        HeadlessRun(start, serve, tmp_path / str(number), command)
        for number, command in enumerate(RUNS)
    ]
    checks = [gevent.spawn(run.check) for run in runs]
    gevent.joinall(checks, raise_error=True)
    assert len(runs) == 9


IN_BROWSER = commands_with("locust ", without=r"--headless|--worker|--help|\w+_\w+\.py")


@pytest.mark.together
def test_the_commands_with_the_web_ui_open_it(start: Start, serve: Serve, tmp_path: Path) -> None:
    opened = [opened_in_browser(start, serve, tmp_path, command) for command in IN_BROWSER]
    assert len(opened) == 3
    for web, running in opened:
        web.swarm()
        wait_until(web.has_echoes)
        assert quiet(running.output)


def opened_in_browser(
    start: Start, serve: Serve, folder: Path, command: str
) -> tuple[WebUI, Program]:
    """Start a command with the web UI; return that, and the program."""
    port = free_port() if "--echo-server" in command else serve(echo).port
    web = WebUI()
    line = f"{with_fewer_users(command, port)} {' '.join(web.options)}"
    variables = {"TCP_PORT": str(port)} if "--echo-server" in command else {}
    return web, started_in_copy(start, folder, line, **variables)


@pytest.mark.together
def test_the_commands_of_master_and_worker_work_together(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """With the files of the README, too: its own class, beside ``locustfile.py``."""
    ((master, worker),) = [block.splitlines() for block in BLOCKS if "--worker" in block]
    (files,) = re.findall(r"`-f (locustfile.py,my_chat.py MyChat)`", README)
    (tmp_path / "my_chat.py").write_text(example("MyChat"), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    chat = Answers(welcomed)
    bus = str(free_port())
    ports = {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus}
    line = with_fewer_users(master, serve(chat).port).replace("locustfile.py", files)
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    running = start(*shlex.split(line), cwd=tmp_path, PATH=PATH, **ports)
    helping = start(*shlex.split(worker), cwd=tmp_path / "elsewhere", PATH=PATH, **ports)
    wait_until(lambda: len(chat.received) >= 50)
    assert interrupted(running) == 0
    assert helping.ends() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == rows["login"] == (20, 0)
    assert set(rows) == {"connect", "login", "send_chat", "echo_response"}


def welcomed(line: bytes) -> bytes:
    """Answer a line as a server does that greets who logs in."""
    return b"Welcome!\n" if line.startswith(b"/login ") else with_the_line(line)


@pytest.mark.together
def test_the_commands_before_a_load_work_with_the_echo_server(start: Start) -> None:
    port = str(free_port())
    (serving,) = commands_with("python ", "--echo-server")
    (messages,) = commands_with("python locustfile.py", "12345")
    (diagnosis,) = commands_with("python plugins/diagnose.py")
    serving, messages, diagnosis = (
        line.replace("python ", f"{sys.executable} ").replace("12345", port)
        for line in (serving, messages, diagnosis)
    )
    start(*shlex.split(serving), TCP_PORT=port).prints("Ctrl-C ends it")
    assert start(*shlex.split(messages)).ends() == 0
    diagnosing = start(*shlex.split(diagnosis))
    assert diagnosing.ends() == 0
    _, *found = shlex.split(diagnosing.output.splitlines()[-1])
    assert start(sys.executable, *found).ends() == 0


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


def commands_in_first_lines(path: str) -> list[list[str]]:
    """Return what the commands in the first lines of a plugin or an example name."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    joined = re.sub(r"\\\n\s*", "", docstring)
    return [start_of(line) for line in joined.splitlines() if line.strip().startswith("locust ")]


@pytest.mark.parametrize("command", [line for line in IN_TABLES if "plugins/" in line])
def test_a_command_of_a_plugin_stands_in_the_first_lines_of_its_last_file(command: str) -> None:
    path = re.findall(r"(?:plugins|examples)/\w+\.py", command)[-1]
    assert start_of(command) in commands_in_first_lines(path)


def test_every_plugin_has_a_command_in_the_readme() -> None:
    named = set(re.findall(r"plugins/(\w+\.py)", "\n".join(COMMANDS)))
    assert named == {path.name for path in (ROOT / "plugins").glob("*.py")}


@pytest.mark.together
def test_a_room_of_ones_own_is_run_as_documented(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    everybody: set[socket.socket] = set()

    def room(connection: socket.socket) -> None:
        everybody.add(connection)
        for line in lines(connection):
            for member in everybody:
                member.sendall(line + b"\n")

    (command,) = commands_with("my_room.py")
    (bases,) = re.findall(r"`class\s+MyRoom(\(.*?\))`", LOOKED_UP)
    code = f"{example('MyChat').replace('TCPChatUser', 'ChatClient')}\nimport delivery\n"
    code = code.replace("    def on_connect", "    def unused")  # this server knows no login
    (tmp_path / "my_room.py").write_text(f"{code}class MyRoom{bases}: pass\n", encoding="utf-8")
    options = f"--headless --users=3 --spawn-rate=3 --chat-wait=0.1 --host={serve(room).address}"
    running = started_in_copy(start, tmp_path, f"{command} {options}")
    running.prints(" delivery ")
    running.interrupt()  # what was on its way then is not looked at here
    assert rows_of(running.output)["delivery"].successes > 0
    assert "delivery: " in running.output.splitlines()[-1]


# ---------------------------------------------------------------------------------------- examples


@pytest.mark.together
def test_the_scenario_of_the_readme_works_in_the_file(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    chat = Answers(with_the_line)
    source = (ROOT / "locustfile.py").read_text(encoding="utf-8")
    method = "".join(f"    {line}\n" for line in example("special_command").splitlines())
    marker = "    @task(1)\n"
    assert source.count(marker) == 1
    changed = source.replace(marker, f"{method}\n{marker}")
    (tmp_path / "locustfile.py").write_text(changed, encoding="utf-8")
    options = ("--headless", f"--host={serve(chat).address}", "--chat-wait=0.01")
    running = start(*LOCUST, *options, cwd=tmp_path)

    def commands() -> list[bytes]:
        return [line for line in chat.received if re.fullmatch(rb"/command special_\d+", line)]

    wait_until(lambda: len(commands()) > 1)  # so the first has been answered
    assert interrupted(running) == 0
    assert rows_of(running.output)["command"][0] >= 1


@pytest.mark.together
def test_the_class_of_the_readme_logs_in_and_sends_its_own_texts(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    chat = Answers(lambda line: b"Somebody said something.\n" + welcomed(line))
    (tmp_path / "my_chat.py").write_text(example("MyChat"), encoding="utf-8")
    (command,) = commands_with("my_chat.py")
    options = f"--headless --host={serve(chat).address}"
    running = started_in_copy(start, tmp_path, f"{command} {options}")
    wait_until(lambda: len(chat.received) > 2)
    assert interrupted(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", "login"}
    assert {failures for _, failures in rows.values()} == {0}
    login, *messages = chat.received
    assert re.fullmatch(rb"/login user[0-9a-f]{8}", login)
    texts = {message.decode().partition("] ")[2] for message in messages}
    assert all(text in example("MyChat") for text in texts)


# ---------------------------------------------------------------------------------------- lists


@pytest.mark.together
def test_the_option_table_lists_the_options_that_there_are(start: Start) -> None:
    (command,) = commands_with("python ", "--help")
    running = start(sys.executable, *shlex.split(command)[1:])
    assert running.ends() == 0
    options = set(re.findall(r"--(?:chat|tcp|echo)-[a-z0-9-]+", running.output))
    assert options == set(re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE))
    assert len(options) > 7
    variables = set(re.findall(r"\[env var: (\w+)\]", " ".join(running.output.split())))
    assert all(f"`{variable}`" in README for variable in variables)


def test_the_table_lists_the_attributes_and_hooks_that_there_are() -> None:
    table = README.partition("| attribute or method |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = set(re.findall(r"`(\w+)", " ".join(cells)))
    hooks = {name for name in vars(locustfile.ChatHooks) if not name.startswith("_")}
    defaults = set(locustfile.TCPChatUser.__annotations__) - {"client"} | {"wait_time"}
    left_to_docstrings = {"context", "on_echo", "report_error"}
    assert names == hooks - left_to_docstrings | defaults


# ------------------------------------------------------------------------------- what is looked up


def test_each_failure_can_be_looked_up_by_its_text() -> None:
    for failure in failures():
        assert f"{failure.__name__}('{failure().args[0]}')" in LOOKED_UP


def failures() -> list[type[locustfile.ChatError]]:
    """Return the errors of the core that rows fail with."""
    classes = [value for value in vars(locustfile).values() if isinstance(value, type)]
    found = [each for each in classes if issubclass(each, locustfile.ChatError)]
    assert len(found) > 10
    return [each for each in found if each is not locustfile.ChatError]


class Text(NamedTuple):
    """A text that a user may see, or the longest part of it that is always the same."""

    path: str
    constant: str


SAYING = {"warning", "warn_once", "exit", "OSError", "ValueError", "TimeoutError"}
PLACEHOLDER = re.compile(r"%[.\d]*[sdf%]|\n")
FILES = [ROOT / "locustfile.py", *sorted((ROOT / "plugins").glob("*.py"))]


def said_in(path: Path) -> Iterator[Text]:
    """Yield the warnings and errors in a file: what calls are given, and the texts of classes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        constants = [
            piece.strip()
            for part in parts_of_text(node)
            for child in ast.walk(part)
            if isinstance(child, ast.Constant) and isinstance(child.value, str)
            for piece in PLACEHOLDER.split(child.value)
        ]
        longest = max(constants, key=len, default="").removeprefix("locust: error:").strip()
        if len(longest) > 10:
            yield Text(path.name, longest)


def parts_of_text(node: ast.AST) -> list[ast.expr]:
    """Return the expressions of a warning or an error; none for any other node."""
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ""
        name = function.id if isinstance(function, ast.Name) else name
        if name == "Fault":
            return node.args[2:3]  # behind its kind and its size, before its remedy
        return node.args if name in SAYING else []
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        is_text = any(name == "text" or name.startswith("NO_") for name in names)
        return [node.value] if is_text else []
    return []


def test_each_warning_and_error_in_the_sources_can_be_looked_up() -> None:
    # What diagnose.py prints is a report, and says itself what to do.
    said = [text for path in FILES if path.name != "diagnose.py" for text in said_in(path)]
    said = [text for text in said if text.constant != locustfile.ChatError.text]
    assert len(said) > 40
    unknown = [text for text in said if beginning(text.constant) not in LOOKED_UP]
    assert not unknown


def beginning(text: str) -> str:
    """Return the first words of a text: the document may leave out the rest of a long one."""
    return " ".join(text.split()[:12]).rstrip(",;:")


def test_what_is_said_of_last_lines_is_what_the_sources_print() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in FILES)
    joined = re.sub(r'"\s*f?"', "", sources)
    named = ("The last line", "What the generator did wrong", "What the plugins say")
    sections = [LOOKED_UP.partition(f"## {name}\n")[2].partition("\n## ")[0] for name in named]
    sections.append(LOOKED_UP.partition("One line sums up")[2].partition("\n## ")[0])
    cells = re.findall(r"^\| (.*?`) \|", "\n".join(sections), re.MULTILINE)
    texts = re.findall(r"`([^`]+)`", "\n".join(cells))
    changing = re.compile(r"members\.csv|Lobby|[\d.,:;()…%×]+")
    pieces = {piece.strip() for text in texts for piece in changing.split(text)}
    phrases = {piece for piece in pieces if piece.count(" ") > 1} - {"CPU usage above"}
    assert len(phrases) > 30
    assert not {phrase for phrase in phrases if phrase not in joined}


def test_each_setting_that_can_be_wrong_can_be_looked_up() -> None:
    sources = " ".join(path.read_text(encoding="utf-8") for path in FILES)
    pattern = r'(?:SettingError|parse_positive)\(\s*\w[\w.\s]*,\s*"([\w -]+)"'
    settings = set(re.findall(pattern, sources))
    assert {"--host", "framing", "time-out", "percentile"} <= settings
    (row,) = (line for line in LOOKED_UP.splitlines() if line.startswith("| `… is not a valid"))
    assert {name for name in settings if f"`{name}`" not in row} == {"--host"}


# What is wrong before a run, and the exit code.
WRONG_COMMANDS = [
    ("--host=localhost", 1),
    ("--host=http://localhost:12345", 1),
    ("", 1),
    ("--host=127.0.0.1:1 --chat-framing=", 2),
    ("--host=127.0.0.1:1 --chat-rate=2 --chat-wait=1", 1),
    ("--host=127.0.0.1:1 --chat-source=192.0.2.1", 1),
    ("--host=127.0.0.1:1 --port=12345", 2),
    ("--host=tls://localhost:12345 --echo-server", 1),
    ("--host=127.0.0.1:1 -f plugins/verdict.py,locustfile.py", 1),
    ("--host=127.0.0.1:1 -f locustfile.py,plugins/verdict.py", 1),
]


@pytest.mark.together
def test_the_errors_before_a_run_are_those_of_the_table(start: Start) -> None:
    """All commands at once, as each has to load Locust."""
    table = LOOKED_UP.partition("## Before the run")[2].partition("\n## ")[0]
    texts = [re.escape(text).replace("…", ".*") for text in re.findall(r"`([^`]+)`", table)]
    running = [
        (start(*LOCUST, "--headless", *shlex.split(options), cwd=ROOT), code)
        for options, code in WRONG_COMMANDS
    ]
    for program, code in running:
        assert program.ends() == code, program.output
        (said,) = re.findall(r"^locust: error: (?:argument --[\w-]+: )?(.*)$", program.output, re.M)
        assert any(re.fullmatch(text, said) for text in texts), said
