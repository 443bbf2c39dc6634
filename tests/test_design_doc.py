"""The commands of docs/design.md, each run as it stands there, but shorter."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import (
    PATH,
    ROOT,
    Start,
    code_blocks,
    content_of,
    documented_commands,
    latest_counts,
    program,
    rows_of,
    section_of,
    the_one_with,
    wait_until,
)
from servers import Serve, lines

SOURCE = content_of("locustfile.py")
DOCUMENT = content_of("docs/design.md")
COMMANDS = code_blocks(DOCUMENT, "sh")
LIFE = section_of(DOCUMENT, "The life of a message")


def command_with(word: str) -> str:
    """Return the one command of the document that has this word in it."""
    command = the_one_with(word, COMMANDS)
    return command.strip().replace(".venv/bin/", "")


def shortened(command: str, old: str, new: str) -> str:
    """Return the command with one part replaced."""
    assert command.count(old) == 1
    return command.replace(old, new)


def run(start: Start, command: str) -> str:
    """Run a command to its end; return what it printed."""
    shell = ("bash", "-euo", "pipefail", "-c")
    running = start(*shell, command, PATH=PATH)
    assert running.ends(280) == 0, running.output
    return running.output


def names_in_source() -> Iterator[str]:
    """Yield what the file defines, and the words in its ``__slots__``."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_what_the_life_of_a_message_names_is_in_the_file() -> None:
    _, picture, text = LIFE.split("```")
    in_picture = re.findall(r"\b\w*_\w+|\b[A-Z]+[a-z]\w+|(?<=\.)[a-z]\w+", picture)
    in_text = re.findall(r"`(?:\w+\.)?(\w+)", text)
    named = {*in_picture, *in_text}
    assert {"send_chat", "flush", "_deliver", "MessageQueue", "_on_deadline"} <= named
    named.remove("wait")  # ``wait=False``, a parameter
    assert named <= set(names_in_source())


def test_the_parts_of_the_first_table_are_classes_of_the_file() -> None:
    named = re.findall(r"^\| `([A-Z]\w+)` \|", LIFE, re.MULTILINE)
    classes = re.findall(r"^class (\w+)", SOURCE, re.MULTILINE)
    assert len(named) == 9
    assert set(named) <= set(classes)


def test_no_command_is_without_a_test() -> None:
    words = [
        "python3 -m venv",
        "HOSTILE_CASES",
        "coverage run",
        "timeit",
        "benchmarks/pairs.py",
    ]
    tested = map(command_with, words)
    assert len(set(tested)) == len(COMMANDS)


def test_the_suite_is_run_by_the_same_command_as_in_the_readme() -> None:
    readme = content_of("README.md").replace(".venv/bin/", "")
    assert command_with("python3 -m venv") in readme


@pytest.mark.together
def test_more_cases_of_a_hostile_server_can_be_asked_for(start: Start) -> None:
    command = command_with("HOSTILE_CASES")
    output = run(start, shortened(command, "100000", "5"))
    assert re.search(r"\d+ passed", output)


@pytest.mark.together
def test_what_the_tests_do_not_reach_can_be_listed(start: Start, tmp_path: Path) -> None:
    command = command_with("coverage run")
    one_test = "-m pytest tests/test_source.py -k crlf"  # it runs users, in greenlets
    command = shortened(command, "-m pytest", one_test)
    output = run(start, f"export COVERAGE_FILE={tmp_path}/coverage; {command}")
    assert re.search(r"^locustfile\.py +\d+", output, re.MULTILINE)


@pytest.mark.together
def test_the_two_ways_to_find_a_tag_can_be_timed(start: Start) -> None:
    command = command_with("timeit")
    output = run(start, command.replace("-m timeit", "-m timeit -n 1 -r 1"))
    assert output.count("sec per loop") == 2


@pytest.mark.together
def test_the_plugin_of_the_document_works(start: Start, serve: Serve, tmp_path: Path) -> None:
    (code,) = code_blocks(DOCUMENT, "python")
    plugin = tmp_path / "plugins" / "questions.py"
    plugin.parent.mkdir()
    plugin.write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    everybody: set[socket.socket] = set()

    def room(connection: socket.socket) -> None:
        everybody.add(connection)
        for line in lines(connection):
            for member in everybody:
                member.sendall(line + b"\n")

    (command,) = documented_commands(code)
    port = serve(room).port
    command = shortened(command, "12345", str(port))
    command = shortened(command, "--users=20", "--users=3")
    arguments = shlex.split(command)
    running = start("env", *arguments, cwd=tmp_path, PATH=PATH, CHAT_WAIT="0.1")
    wait_until(lambda: latest_counts(running, "heard").requests > 10)
    assert running.stop() == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", "heard"}


HAS_HISTORY = (ROOT / ".git").exists()


@pytest.mark.together
@pytest.mark.skipif(not HAS_HISTORY, reason="needs the project's git history")
def test_two_versions_are_compared_in_one_process(start: Start, tmp_path: Path) -> None:
    """Over TLS and in open loop: in ``test_benchmarks.py``."""
    program("git")
    program("cc")
    command = command_with("benchmarks/pairs.py")
    command = command.replace("/tmp", str(tmp_path))
    command = shortened(command, "--users 100", "--users 5 --slices 2")
    output = run(start, command)
    assert re.search(r"processor time a message: [\d.]*[1-9]", output)
    assert "failed requests: 0, 0" in output
