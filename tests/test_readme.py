"""Every command of the README and of the look-up page runs, and what they list is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gevent
import pytest
from clients import HOOKS
from programs import (
    LOCUST,
    PATH,
    ROOT,
    Program,
    Start,
    WebUI,
    code_blocks,
    content_of,
    documented_commands,
    quiet,
    rows_of,
    section_of,
    the_one_with,
    wait_for_lines,
    wait_until,
)
from servers import Answers, Serve, echo, free_port, lines, with_the_line

import locustfile

README = content_of("README.md")
LOOKED_UP = content_of("docs/troubleshooting.md")
BOTH = f"{README}\n{LOOKED_UP}"
BLOCKS = code_blocks(BOTH, "sh")
PYTHON = code_blocks(BOTH, "python")
IN_TABLES: list[str] = re.findall(
    r"^\| .* \| `(locust .*)` \|$",
    BOTH,
    re.MULTILINE,
)
IN_SENTENCES: list[str] = re.findall(
    r"(?<!`)`((?:locust|python)\s[^`]+)`(?! \|$)",
    BOTH,
    re.MULTILINE,
)
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
FILES = [ROOT / "locustfile.py", *PLUGINS]
SOURCES = "".join(map(content_of, FILES))
ROWS = {"connect", "send_chat", "echo_response"}
CODE = re.compile(r"`([^`]+)`")
ECHOES_IN_A_TABLE = re.compile(r"echo_response.*Aggregated[^\n]*\n\n", re.DOTALL)


def all_commands() -> list[str]:
    """Return the commands of both documents, none in a sentence that stands elsewhere too."""
    commands = "".join(BLOCKS).splitlines() + IN_TABLES
    in_sentences = {" ".join(command.split()) for command in IN_SENTENCES}
    return commands + sorted(in_sentences - {*commands})


COMMANDS = all_commands()


def commands_with(*texts: str, without: str = "nothing") -> list[str]:
    """Return the commands that contain all texts, and not one that the pattern finds."""
    found = COMMANDS
    for text in texts:
        found = [command for command in found if text in command]
    return [command for command in found if not re.search(without, command)]


def with_fewer_users(command: str, port: int) -> str:
    """Return the command for the server at port, with at most 20 users that start at once.

    Its server may be as slow as a busy machine makes it.
    """
    command = re.sub(r"--users=\d{3,}", "--users=20", command)
    command = re.sub(r"--spawn-rate=\d+", "--spawn-rate=20", command)
    command = re.sub(r"--chat-max-p95=\d+", "--chat-max-p95=60000", command)
    command = command.replace(".venv/bin/", "")
    return command.replace("12345", str(port))


def started_in_copy(start: Start, folder: Path, line: str, **variables: str) -> Program:
    """Run a command line in a folder with a copy of the project's file, and of the plugins."""
    plugins = folder / "plugins"
    shutil.copy(ROOT / "locustfile.py", folder)
    shutil.copytree(ROOT / "plugins", plugins, dirs_exist_ok=True)
    return start(
        *("bash", "-c", f"exec env {line}"),
        cwd=folder,
        PATH=PATH,
        **variables,
        **bus_variables(),
    )


def bus_variables() -> dict[str, str]:
    """Return what gives a master and its workers a port of their own to speak over."""
    port = str(free_port())
    return {
        "LOCUST_MASTER_BIND_PORT": port,
        "LOCUST_MASTER_NODE_PORT": port,
    }


def write_example(path: Path) -> None:
    """Write the class of the README that logs in, ``MyChat``, to a file."""
    path.write_text(the_one_with("class MyChat", PYTHON), encoding="utf-8")


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
    return ECHOES_IN_A_TABLE.search(output) is not None


def rows_without_a_failure(running: Program) -> set[str]:
    """Return the names of a run's rows, in which nothing may have failed."""
    rows = rows_of(running.output)
    for counts in rows.values():
        assert counts.failures == 0
    return set(rows)


def last_printed(running: Program) -> str:
    """Return the last line that a program has printed."""
    return running.output.splitlines()[-1]


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
    assert len(BLOCKS) == 10
    assert len(IN_TABLES) == 12


@pytest.mark.together
def test_the_first_command_ends_by_itself_with_a_last_line_as_in_the_readme(
    start: Start, tmp_path: Path
) -> None:
    (command,) = commands_with("--echo-server", "--headless")
    _, _, line = command.rpartition("&& ")
    line = line.replace(".venv/bin/", "")
    line = line.replace("--run-time 10s", "--run-time 3s")
    port = str(free_port())
    running = started_in_copy(start, tmp_path, line, TCP_PORT=port)
    assert running.ends() == 0
    assert rows_without_a_failure(running) == ROWS
    assert quiet(running.output)
    (documented,) = re.findall(r"^chat: .*$", README, re.MULTILINE)
    with_any_numbers = re.sub(r"\d[\d\\.,]*", r"[\\d.,e-]+", re.escape(documented))
    assert re.match(with_any_numbers, last_printed(running))


RUNS = commands_with("--headless", without=r"plugins/(?!verdict)|--master|tls://|--echo-server")


class HeadlessRun:
    """A run of a command of the README in a folder of its own, against an echo server."""

    def __init__(self, start: Start, serve: Serve, folder: Path, command: str) -> None:
        self.command = command
        self._folder = folder
        self._chat = Answers(with_the_line)
        folder.mkdir()
        server = serve(self._chat)
        line = with_fewer_users(command, server.port)
        self._running = started_in_copy(start, folder, line)

    def has_echoes(self) -> bool:
        """Return whether a row ``echo_response`` has been seen, and some messages."""
        is_printed = has_printed_echoes(self._running.output)
        is_seen = is_printed or self._has_reported_echoes()
        return is_seen and len(self._chat.received) >= 10

    def _has_reported_echoes(self) -> bool:
        for path in self._folder.glob("*_history.csv"):
            if "echo_response" in path.read_text(encoding="utf-8"):
                return True
        return False

    def check(self) -> None:
        """End the run in good order, and look at what it leaves."""
        running = self._running
        running.prints("All users spawned")
        wait_until(self.has_echoes)
        assert quiet(running.output), running.output
        assert running.interrupt() == 0, running.output
        assert rows_without_a_failure(running) == ROWS
        self._check_reports()
        if "verdict.py" in self.command:
            assert "verdict passed" in last_printed(running)

    def _check_reports(self) -> None:
        for name in re.findall(r"--html=(\S+)", self.command):
            report = self._folder / name
            assert report.stat().st_size > 10_000
        for prefix in re.findall(r"--csv=(\S+)", self.command):
            report = self._folder / f"{prefix}_stats_history.csv"
            assert report.exists()


@pytest.mark.together
def test_the_headless_commands_run_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """All at once, as most of their time is spent waiting."""
    checks = []
    for number, command in enumerate(RUNS):
        folder = tmp_path / str(number)
        run = HeadlessRun(start, serve, folder, command)
        checks.append(gevent.spawn(run.check))
    gevent.joinall(checks, raise_error=True)
    assert len(checks) == 9


IN_BROWSER = commands_with("locust ", without=r"--headless|--worker|--help|\w+_\w+\.py")


@pytest.mark.together
def test_the_commands_with_the_web_ui_open_it(start: Start, serve: Serve, tmp_path: Path) -> None:
    opened = []
    for command in IN_BROWSER:
        web, running = opened_in_browser(start, serve, tmp_path, command)
        opened.append((web, running))
    assert len(opened) == 3
    for web, running in opened:
        web.swarm()
        wait_until(web.has_echoes)
        assert quiet(running.output)


def opened_in_browser(
    start: Start, serve: Serve, folder: Path, command: str
) -> tuple[WebUI, Program]:
    """Start a command with the web UI; return that, and the program."""
    web = WebUI()
    options = " ".join(web.options)
    variables = {}
    if "--echo-server" in command:
        port = free_port()
        variables["TCP_PORT"] = str(port)
    else:
        port = serve(echo).port
    line = f"{with_fewer_users(command, port)} {options}"
    return web, started_in_copy(start, folder, line, **variables)


@pytest.mark.together
def test_the_commands_of_master_and_worker_work_together(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """With the files of the README, too: its own class, beside ``locustfile.py``."""
    master, worker = the_one_with("--worker", BLOCKS).splitlines()
    files = "locustfile.py,my_chat.py MyChat"
    assert f"`-f {files}`" in README
    write_example(tmp_path / "my_chat.py")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    chat = Answers(welcomed)
    line = with_fewer_users(master, serve(chat).port)
    line = line.replace("locustfile.py", files)
    variables = {"PATH": PATH, **bus_variables()}
    running = start(*shlex.split(line), cwd=tmp_path, **variables)
    helping = start(*shlex.split(worker), cwd=elsewhere, **variables)
    wait_for_lines(chat, 50)
    assert interrupted(running) == 0
    assert helping.ends() == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (20, 0)
    assert rows["login"] == (20, 0)
    assert set(rows) == {*ROWS, "login"}


def welcomed(line: bytes) -> bytes:
    """Answer a line as a server does that greets who logs in."""
    if line.startswith(b"/login "):
        return b"Welcome!\n"
    return with_the_line(line)


@pytest.mark.together
def test_the_commands_before_a_load_work_with_the_echo_server(start: Start) -> None:
    port = str(free_port())
    (serving,) = commands_with("python ", "--echo-server")
    (messages,) = commands_with("python locustfile.py", "12345")
    (diagnosis,) = commands_with("python plugins/diagnose.py")
    server = start(*of_this_python(serving, port), TCP_PORT=port)
    server.prints("Ctrl-C ends it")
    sending = start(*of_this_python(messages, port))
    assert sending.ends() == 0
    diagnosing = start(*of_this_python(diagnosis, port))
    assert diagnosing.ends() == 0
    found = last_printed(diagnosing)
    sending_again = start(*of_this_python(found, port))
    assert sending_again.ends() == 0


def of_this_python(command: str, port: str = "") -> list[str]:
    """Return the words of a command for the server at port, run by this Python."""
    command = command.replace("12345", port)
    program, *arguments = shlex.split(command)
    assert program.startswith("python")
    return [sys.executable, *arguments]


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


WITH_A_PLUGIN = [line for line in IN_TABLES if "plugins/" in line]


def start_of(command: str) -> list[str]:
    """Return the files and the class that a command names, without its options."""
    words = shlex.split(command)
    return [word for word in words if not word.startswith("--")]


@pytest.mark.parametrize("command", WITH_A_PLUGIN)
def test_a_command_of_a_plugin_stands_in_the_first_lines_of_its_last_file(command: str) -> None:
    *_, path = re.findall(r"(?:plugins|examples)/\w+\.py", command)
    tree = ast.parse(content_of(path))
    documented = documented_commands(ast.get_docstring(tree))
    assert start_of(command) in map(start_of, documented)


def test_every_plugin_has_a_command_in_the_readme() -> None:
    commands = "\n".join(COMMANDS)
    named = set(re.findall(r"plugins/(\w+\.py)", commands))
    assert named == {path.name for path in PLUGINS}


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
    (tmp_path / "my_room.py").write_text(room_class(), encoding="utf-8")
    options = "--headless --users=3 --spawn-rate=3 --chat-wait=0.1"
    address = serve(room).address
    line = f"{command} {options} --host={address}"
    running = started_in_copy(start, tmp_path, line)
    running.prints(" delivery ")
    running.interrupt()  # what was on its way then is not looked at here
    rows = rows_of(running.output)
    assert rows["delivery"].successes > 0
    assert "delivery: " in last_printed(running)


def room_class() -> str:
    """Return the file with the class that is documented for a room of one's own."""
    (bases,) = re.findall(r"`class\s+MyRoom(\(.*?\))`", LOOKED_UP)
    base = the_one_with("class MyChat", PYTHON)
    base = base.replace("TCPChatUser", "ChatClient")
    base = base.replace("def on_connect", "def unused")  # this server knows no login
    return f"{base}\nimport delivery\nclass MyRoom{bases}: pass\n"


# ---------------------------------------------------------------------------------------- examples


@pytest.mark.together
def test_the_scenario_of_the_readme_works_in_the_file(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    chat = Answers(with_the_line)
    scenario = the_one_with("special_command", PYTHON)
    method = textwrap.indent(scenario, "    ")
    source = content_of("locustfile.py")
    marker = "    @task(1)\n"
    assert source.count(marker) == 1
    changed = source.replace(marker, f"{method}\n{marker}")
    (tmp_path / "locustfile.py").write_text(changed, encoding="utf-8")
    host = f"--host={serve(chat).address}"
    running = start(*LOCUST, "--headless", host, "--chat-wait=0.01", cwd=tmp_path)
    special = re.compile(rb"^/command special_\d+$", re.MULTILINE)

    def has_sent_two() -> bool:
        sent = special.findall(b"\n".join(chat.received))
        return len(sent) > 1  # so the first has been answered

    wait_until(has_sent_two)
    assert interrupted(running) == 0
    rows = rows_of(running.output)
    assert rows["command"].requests >= 1


@pytest.mark.together
def test_the_class_of_the_readme_logs_in_and_sends_its_own_texts(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    chat = Answers(lambda line: b"Somebody said something.\n" + welcomed(line))
    write_example(tmp_path / "my_chat.py")
    (command,) = commands_with("my_chat.py")
    host = f"--host={serve(chat).address}"
    running = started_in_copy(start, tmp_path, f"{command} --headless {host}")
    wait_for_lines(chat, 3)
    assert interrupted(running) == 0
    assert rows_without_a_failure(running) == {*ROWS, "login"}
    login, *messages = chat.received
    assert re.fullmatch(rb"/login user[0-9a-f]{8}", login)
    code = the_one_with("class MyChat", PYTHON)
    for message in messages:
        _, _, text = message.decode().partition("] ")
        assert text in code


# ---------------------------------------------------------------------------------------- lists


@pytest.mark.together
def test_the_option_table_lists_the_options_that_there_are(start: Start) -> None:
    (command,) = commands_with("python ", "--help")
    running = start(*of_this_python(command))
    assert running.ends() == 0
    output = " ".join(running.output.split())
    options = set(re.findall(r"--(?:chat|tcp|echo)-[a-z0-9-]+", output))
    listed = re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE)
    assert options == set(listed)
    assert len(options) > 7
    for variable in re.findall(r"\[env var: (\w+)\]", output):
        assert f"`{variable}`" in README


def test_the_table_lists_the_attributes_and_hooks_that_there_are() -> None:
    _, _, rest = README.partition("| attribute or method |")
    table, _, _ = rest.partition("\n\n")
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = re.findall(r"`(\w+)", " ".join(cells))
    left_to_docstrings = {"context", "on_echo", "report_error"}
    hooks = HOOKS - left_to_docstrings
    attributes = set(locustfile.TCPChatUser.__annotations__) - {"client"}
    assert set(names) == {*hooks, *attributes, "wait_time"}


# ------------------------------------------------------------------------------- what is looked up


def test_each_failure_can_be_looked_up_by_its_text() -> None:
    for failure in failures():
        assert repr(failure()) in LOOKED_UP


def failures() -> list[type[locustfile.ChatError]]:
    """Return the errors of the core that rows fail with."""
    found = []
    for value in vars(locustfile).values():
        if isinstance(value, type) and issubclass(value, locustfile.ChatError):
            found.append(value)
    assert len(found) > 10
    found.remove(locustfile.ChatError)
    return found


class Text(NamedTuple):
    """A text that a user may see, or the longest part of it that is always the same."""

    path: str
    constant: str


SAYING = {
    "warning",
    "warn_once",
    "exit",
    "OSError",
    "ValueError",
    "TimeoutError",
}
PLACEHOLDER = re.compile(r"%[.\d]*[sdf%]|\n")


def said_in(path: Path) -> Iterator[Text]:
    """Yield the warnings and errors in a file: what calls are given, and the texts of classes."""
    tree = ast.parse(content_of(path))
    for node in ast.walk(tree):
        pieces: list[str] = []
        for part in parts_of_text(node):
            pieces += constant_pieces(part)
        longest = max(pieces, key=len, default="")
        longest = longest.removeprefix("locust: error:").strip()
        if len(longest) > 10:
            yield Text(path.name, longest)


def constant_pieces(part: ast.expr) -> Iterator[str]:
    """Yield what always is the same in an expression of a text."""
    for node in ast.walk(part):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for piece in PLACEHOLDER.split(node.value):
                yield piece.strip()


def parts_of_text(node: ast.AST) -> list[ast.expr]:
    """Return the expressions of a warning or an error; none for any other node."""
    if isinstance(node, ast.Call):
        return parts_of_call(node)
    if isinstance(node, ast.Assign) and names_a_text(node):
        return [node.value]
    return []


def parts_of_call(call: ast.Call) -> list[ast.expr]:
    """Return the arguments of a call that says them."""
    name = ""
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
    elif isinstance(call.func, ast.Name):
        name = call.func.id
    if name == "Fault":
        return call.args[2:3]  # behind its kind and its size, before its remedy
    if name in SAYING:
        return call.args
    return []


def names_a_text(assignment: ast.Assign) -> bool:
    """Return whether a constant is given a name that those of texts have."""
    if not isinstance(assignment.value, ast.Constant):
        return False
    for target in assignment.targets:
        if isinstance(target, ast.Name) and re.match("text$|NO_", target.id):
            return True
    return False


def test_each_warning_and_error_in_the_sources_can_be_looked_up() -> None:
    said: list[Text] = []
    for path in FILES:
        if path.name != "diagnose.py":  # what it prints is a report, and says itself what to do
            said += said_in(path)
    # The text of all errors, each of which has another.
    said = [text for text in said if text.constant != locustfile.ChatError.text]
    assert len(said) > 40
    unknown = [text for text in said if beginning(text.constant) not in LOOKED_UP]
    assert not unknown


def beginning(text: str) -> str:
    """Return the first words of a text: the document may leave out the rest of a long one."""
    words = text.split()
    return " ".join(words[:12]).rstrip(",;:")


# Of the document, with the last lines of the core and of the plugins in their tables.
ON_LAST_LINES = (
    "The last line",
    "What the generator did wrong",
    "What the plugins say",
)
COUNTED = re.compile(r"\{counted\([\w.]+, '(\w+)'(?:, '(\w+)')?\)\}")
CHANGING = re.compile(r"members\.csv|Lobby|[\d.,:;()…%×]+")


def plural(counted: re.Match[str]) -> str:
    """Return the noun that the sources count in a text, as it stands there for most counts."""
    return counted[1] + (counted[2] or "s")


def test_what_is_said_of_last_lines_is_what_the_sources_print() -> None:
    joined = re.sub(r'"\s*f?"', "", SOURCES)
    joined = COUNTED.sub(plural, joined)
    phrases = phrases_of_last_lines()
    phrases.remove("CPU usage above")
    assert len(phrases) > 30
    unknown = [phrase for phrase in phrases if phrase not in joined]
    assert not unknown


def phrases_of_last_lines() -> set[str]:
    """Return what the document says that last lines have: three words and more, without figures."""
    phrases = set()
    for cell in re.findall(r"^\| (.*?`) \|", tables_of_last_lines(), re.MULTILINE):
        for text in CODE.findall(cell):
            pieces = [piece.strip() for piece in CHANGING.split(text)]
            phrases |= {piece for piece in pieces if piece.count(" ") > 1}
    return phrases


def tables_of_last_lines() -> str:
    """Return the sections of the document that say what stands in last lines."""
    sections = [section_of(LOOKED_UP, heading) for heading in ON_LAST_LINES]
    delivery = section_of(LOOKED_UP, "Delivery to the others")
    _, found, summary = delivery.partition("One line sums up")
    assert found
    return "\n".join([*sections, summary])


def test_each_setting_that_can_be_wrong_can_be_looked_up() -> None:
    pattern = r'(?:SettingError|parse_positive)\(\s*\w[\w.\s]*,\s*"([\w -]+)"'
    settings = set(re.findall(pattern, SOURCES))
    assert {"--host", "framing", "time-out", "percentile"} <= settings
    row = the_one_with("| `… is not a valid", LOOKED_UP.splitlines())
    named = set(CODE.findall(row))
    assert settings - named == {"--host"}


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
    running = []
    for options, code in WRONG_COMMANDS:
        program = start(*LOCUST, "--headless", *shlex.split(options))
        running.append((program, code))
    patterns = patterns_before_a_run()
    error = re.compile(r"^locust: error: (?:argument --[\w-]+: )?(.*)$", re.MULTILINE)
    for program, code in running:
        assert program.ends() == code, program.output
        (said,) = error.findall(program.output)
        assert any(re.fullmatch(pattern, said) for pattern in patterns), said


def patterns_before_a_run() -> list[str]:
    """Return the texts that the document explains of what ends a run before it begins."""
    table = section_of(LOOKED_UP, "Before the run")
    texts = CODE.findall(table)
    return [re.escape(text).replace("…", ".*") for text in texts]
